"""No jar is used that is not the one in the committed list."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import rich
from rich.console import Console
from typer.testing import CliRunner

from labkit import Lab
from labkit.cli import doctor
from labkit.cli.main import app
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.lab.runs import Run
from labkit.lab.status import lab_table
from labkit.runtime.jars import LISTS, NOTEBOOKS, Jar, connect_jars, jar_files, read_list, streams_jars
from labkit.runtime.which_kafka import Connection, connect, private

CONTENT = {f"lib{number}": f"jar {number}".encode() * 1000 for number in range(12)}
JARS = [Jar("org.example", name, "1.0", "", hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items()]


class Repository:
    """In place of Maven: hands out the content, and notes what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.content = dict(CONTENT)

    def __call__(self, jar: Jar, below: Path) -> Path:
        self.asked.append(jar.artifact)
        path = below / jar.file_name
        path.write_bytes(self.content[jar.artifact])
        return path


def test_fetched_once_and_in_order(tmp_path: Path) -> None:
    repository = Repository()
    paths = jar_files(tmp_path / "jars", JARS, repository)
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert sorted(repository.asked) == sorted(CONTENT)
    assert jar_files(tmp_path / "jars", JARS, repository) == paths
    assert len(repository.asked) == len(JARS)
    assert {path.name for path in (tmp_path / "jars").iterdir()} == {path.name for path in paths} | {"lock"}


def test_a_fetch_shows_its_progress_on_a_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=shown, force_terminal=True, width=100))
    jar_files(tmp_path, JARS, Repository())
    assert "Fetching Apache Kafka" in shown.getvalue()
    assert "12/12" in shown.getvalue()
    shown.truncate(0)
    jar_files(tmp_path, JARS, Repository())
    assert not shown.getvalue()


@pytest.mark.parametrize("damage", ["half", "tampered", "missing", "empty"])
def test_damaged_jar_is_refused_and_fetched_anew(tmp_path: Path, damage: str) -> None:
    repository = Repository()
    paths = jar_files(tmp_path, JARS, repository)
    victim, good = paths[3], paths[3].read_bytes()
    stamp = victim.stat().st_mtime_ns
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"half": good[: len(good) // 2], "tampered": good[:-1] + b"!", "empty": b""}[damage])
    repository.asked.clear()
    assert jar_files(tmp_path, JARS, repository) == paths
    assert repository.asked == ["lib3"]
    assert victim.read_bytes() == good
    assert victim.stat().st_mtime_ns == stamp, "the AOT cache goes by modification times"


def test_what_is_fetched_is_checked_before_it_gets_a_name(tmp_path: Path) -> None:
    repository = Repository()
    repository.content["lib7"] = b"something else"
    with pytest.raises(LabkitError, match=r"lib7-1\.0\.jar.*SHA-256.*refused"):
        jar_files(tmp_path, JARS, repository)
    assert not (tmp_path / "lib7-1.0.jar").exists()
    assert not list(tmp_path.glob(".fetch-*"))
    repository.content["lib7"] = CONTENT["lib7"]
    jar_files(tmp_path, JARS, repository)


def test_a_connection_that_breaks_is_tried_again(tmp_path: Path) -> None:
    """Of a hundred jars one is often cut off."""
    repository = Repository()
    broken = iter([ConnectionResetError(104, "Connection reset by peer")] * 2)

    def fetch(jar: Jar, below: Path) -> Path:
        if jar.artifact == "lib3" and (error := next(broken, None)) is not None:
            raise error
        return repository(jar, below)

    assert len(jar_files(tmp_path, JARS, fetch)) == len(JARS)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and an empty cache folder."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: refused at once
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LABKIT_STATE", str(tmp_path / "state"))
    return tmp_path / "cache"


def test_without_a_network(offline: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """A lab on the shared Kafka can take another Kafka; one with a Kafka of its own is told no such thing."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(LabkitError) as shared:
        connect()
    with pytest.raises(LabkitError) as private:
        Lab("key-value-store", cluster="private")  # the first cell of notebooks 02, 03 and 05
    for error in (shared, private):
        assert "labkit fetch" in str(error.value)
        assert str(offline) in str(error.value)
    others = ("docker compose up -d", "KAFKA_BOOTSTRAP_SERVERS")
    assert [other in str(shared.value) for other in others] == [True, True]
    assert [other in str(private.value) for other in others] == [False, False]
    assert not [record for record in caplog.records if record.name.startswith(("jgo", "urllib3"))]
    assert "jgo" not in "".join(capfd.readouterr()).lower()


def test_what_sections_lack_is_said_by_the_doctor_and_in_the_first_cell(offline: Path) -> None:
    assert "Kafka Connect is not here yet: needed by notebook 01, 02" in doctor.jars()
    assert "Apache Kafka is not here yet: needed by notebook 01, 02, 03, 05" in doctor.jars()
    assert "Kafka Streams is not here yet: needed by notebook 06" in doctor.jars()
    connection = Connection(Cluster("127.0.0.1:9"), "external", "an-id")
    run = Run("consume-and-project", "an-id")
    shown = lab_table("consume-and-project", run, connection, [], "")
    assert "Apache Kafka, Kafka Connect, Debezium: fetched when needed, or now by <code>labkit fetch</code>" in shown
    assert "labkit fetch" not in lab_table("start-here", run, connection, [], "")
    run.forget()


def test_the_notebooks_that_need_jars_are_there() -> None:
    """By the first cell, which names the lab."""
    for name, (number, lists) in NOTEBOOKS.items():
        (path,) = (Path(__file__).parents[2] / "notebooks").glob(f"{number}_*.ipynb")
        text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        assert f'Lab("{name}"' in text
        assert ("lab.connect()" in text) == ("Kafka Connect" in lists)
        assert ('cluster="private"' in text) == ("Apache Kafka" in lists)
        assert ("StreamsCounter(" in text) == ("Kafka Streams" in lists)


@pytest.mark.long
def test_after_a_fetch_no_network_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    done = CliRunner().invoke(app, ["fetch"])
    assert done.exit_code == 0, done.output
    request.getfixturevalue("offline")
    assert doctor.jars() == "all are here"
    assert CliRunner().invoke(app, ["fetch"]).exit_code == 0
    with private() as connection:
        assert connection.cluster.topics() == {}
    assert connect_jars()
    assert streams_jars(rocksdb=False)


@pytest.mark.parametrize("what", ["Kafka Streams", "Kafka Connect", "Debezium"])
def test_jars_beside_kafkas_that_cannot_be_fetched_are_told_with_their_own_fix(tmp_path: Path, what: str) -> None:
    repository = Repository()
    repository.content["lib7"] = b"something else"
    with pytest.raises(LabkitError, match=rf"^{what} could not be fetched: lib7-1\.0\.jar") as error:
        jar_files(tmp_path, JARS, repository, what=what)
    assert str(LISTS[what]) in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "docker" not in str(error.value)


@pytest.mark.parametrize("path", LISTS.values(), ids=LISTS)
def test_the_committed_lists(path: Path) -> None:
    jars = read_list(path)
    assert len({jar.file_name for jar in jars}) == len(jars)
    assert all(len(bytes.fromhex(jar.sha256)) == 32 for jar in jars)
    assert {jar.version for jar in jars if jar.group == "org.apache.kafka"} <= {"4.3.1"}


def test_no_jar_is_in_two_lists() -> None:
    names = [jar.file_name for path in LISTS.values() for jar in read_list(path)]
    assert len(set(names)) == len(names)


def test_the_real_repository(tmp_path: Path) -> None:
    """The smallest jar of the list, by jgo. Skipped only where there is no network at all."""
    jar = next(jar for jar in read_list() if jar.artifact == "jspecify")
    try:
        (path,) = jar_files(tmp_path, [jar])
    except LabkitError as error:
        if "refused" in str(error):
            raise
        pytest.skip("no network")
    assert jar.is_intact(path)
