"""Which Java runs the broker, and which AOT cache goes with it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import Kafka
from labkit.runtime.java import Java, find_java


def install(home: Path, release: str | None) -> Path:
    """A Java that only tells its version."""
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "java").touch(0o755)
    if release is not None:
        (home / "release").write_text(release)
    return home


def test_the_one_that_comes_with_labkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABKIT_JAVA_HOME", raising=False)
    java = find_java()
    assert java.version >= 25
    assert os.access(java.path, os.X_OK)


@pytest.mark.parametrize(
    ("release", "version"),
    [('IMPLEMENTOR="X"\nJAVA_VERSION="21.0.4"\n', 21), ('JAVA_VERSION="26"\n', 26)],
)
def test_own_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, version: int) -> None:
    monkeypatch.setenv("LABKIT_JAVA_HOME", str(install(tmp_path / "jdk", release)))
    assert find_java().version == version
    assert find_java().path == tmp_path / "jdk/bin/java"


def test_a_home_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /usr is one."""
    real = install(tmp_path / "jdk", 'JAVA_VERSION="21.0.4"')
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/java").symlink_to(real / "bin/java")
    monkeypatch.setenv("LABKIT_JAVA_HOME", str(tmp_path / "usr"))
    assert find_java().version == 21


@pytest.mark.parametrize("release", ['JAVA_VERSION="1.8.0_402"', 'JAVA_VERSION="11.0.2"', "hello", None])
def test_unsuitable_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str | None) -> None:
    monkeypatch.setenv("LABKIT_JAVA_HOME", str(install(tmp_path / "jdk", release)))
    with pytest.raises(LabkitError, match=r"(is Java (8|11) .*17 or newer|does not say its version)"):
        find_java()


def test_no_java_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_JAVA_HOME", str(tmp_path))
    with pytest.raises(LabkitError, match=rf"no Java at {tmp_path}/bin/java .*LABKIT_JAVA_HOME"):
        find_java()


def test_an_aot_cache_belongs_to_one_java_and_exactly_these_jars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jars = [tmp_path / "a.jar", tmp_path / "b.jar"]
    for jar in jars:
        jar.write_text("x")
        os.utime(jar, (1, 1))
    java = Java(tmp_path / "java", 25, "25.0.2")
    kafka = Kafka(java, tuple(jars), tmp_path)
    name = kafka.aot_cache
    assert Kafka(java, tuple(jars), tmp_path).aot_cache == name

    others = {
        "another Java": Kafka(replace(java, identity="25.0.3"), tuple(jars), tmp_path).aot_cache,
        "another order": Kafka(java, tuple(reversed(jars)), tmp_path).aot_cache,
    }
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:+UseCompactObjectHeaders")
    others["other options"] = Kafka(java, tuple(jars), tmp_path).aot_cache
    monkeypatch.delenv("JAVA_TOOL_OPTIONS")
    os.utime(jars[0], (2, 2))
    others["a touched jar"] = Kafka(java, tuple(jars), tmp_path).aot_cache
    assert name not in others.values()
    assert len(set(others.values())) == len(others)
    kafka.aot_cache.touch()
    assert f"-XX:AOTCache={name}" in kafka.command(tmp_path)
    name.unlink()
    assert not any("AOT" in argument for argument in kafka.command(tmp_path))
