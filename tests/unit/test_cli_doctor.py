"""`labkit doctor` names the fix of what is wrong, and does not crash itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labkit.cli import doctor
from labkit.cli.main import app
from labkit.kafka.errors import LabkitError


def raising(error: Exception) -> doctor.Check:
    def check() -> str:
        raise error

    return check


CHECKS: dict[str, tuple[doctor.Check, str]] = {
    "good": (lambda: "fine", "no need"),
    "bad": (raising(doctor.Problem("broken", "mend it")), "the usual"),
    "ours": (raising(LabkitError("no Java")), "install one"),
    "unforeseen": (raising(ZeroDivisionError("oops")), "start anew"),
}


def found(name: str) -> doctor.Finding:
    """What the check of this name finds on this machine."""
    (finding,) = doctor.examine({name: doctor.CHECKS[name]})
    return finding


def test_every_kind_of_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", CHECKS)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "ok       good:       fine\n" in done.output
    assert "PROBLEM  bad:        broken\n         fix:        mend it\n" in done.output
    assert "PROBLEM  ours:       no Java\n         fix:        install one\n" in done.output
    assert "ZeroDivisionError: oops\n         fix:        start anew\n" in done.output
    assert done.output.endswith("To look into: bad, ours, unforeseen.\n")


def test_json_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {"good": CHECKS["good"]})
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.output) == {"healthy": True, "checks": [{"check": "good", "text": "fine", "fix": ""}]}


def test_wrong_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEWEST", (3, 10))
    with pytest.raises(doctor.Problem) as problem:
        doctor.python()
    assert "make clean lab PYTHON=" in problem.value.fix


def test_folder_that_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file"))
    disk = found("disk")
    assert "LABKIT_CACHE" in disk.text
    assert disk.fix.startswith("make the folder writable")


def test_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Permission bits allow it, and the file system does not: full, or mounted read-only. No test can mount one."""

    def refused(dir: Path) -> None:  # noqa: A002
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    disk = found("disk")
    assert disk.text == f"{tmp_path} cannot be written to: Read-only file system"
    assert "LABKIT_CACHE" in disk.fix


def test_full_disk_and_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "DISK_MB", 10**12)
    monkeypatch.setattr(doctor, "MEMORY_MB", 10**12)
    with pytest.raises(doctor.Problem, match="MB are free") as no_disk:
        doctor.disk()
    assert no_disk.value.fix == "free some, or set LABKIT_CACHE to a folder on another disk"
    with pytest.raises(doctor.Problem, match="MB are available") as no_memory:
        doctor.memory()
    assert no_memory.value.fix == "close other programs"


def test_java_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_JAVA_HOME", str(tmp_path))
    finding = found("Java")
    assert "LABKIT_JAVA_HOME" in finding.text
    assert finding.fix.startswith("`make clean lab`")


def test_java_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    java = tmp_path / "bin" / "java"
    java.write_text("#!/bin/sh\necho 'cannot execute' >&2; exit 1\n")
    java.chmod(0o755)
    (tmp_path / "release").write_text('JAVA_VERSION="25.0.1"\n')
    monkeypatch.setenv("LABKIT_JAVA_HOME", str(tmp_path))
    assert found("Java").fix == "set LABKIT_JAVA_HOME to the folder of a Java 17 or newer"


@pytest.mark.long
def test_unreachable_cluster_is_a_problem_naming_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    finding = found("Kafka")
    assert "KAFKA_BOOTSTRAP_SERVERS" in finding.text
    assert "correct or unset it" in finding.fix


def test_package_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["msgspec>=0.18", "no-such-thing[extra]>=1"])
    with pytest.raises(doctor.Problem, match=r"^cannot be loaded: msgspec \(.*\), no_such_thing \(") as problem:
        doctor.python()
    assert problem.value.fix == doctor.REMAKE


def test_jupyterlab_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jupyterlab", None)
    with pytest.raises(doctor.Problem, match="cannot be loaded: jupyterlab") as problem:
        doctor.jupyter()
    assert problem.value.fix == doctor.REMAKE


def test_jupyterlab_without_widgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *_: [str(tmp_path)])
    with pytest.raises(doctor.Problem, match="lacks the extension that draws widgets") as problem:
        doctor.jupyter()
    assert problem.value.fix == doctor.REMAKE


def test_kernel_of_another_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `python -m ipykernel install --user` in some other environment leaves it."""
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["/elsewhere/python"], "display_name": "x"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(doctor.Problem, match="runs /elsewhere/python, not this environment") as problem:
        doctor.jupyter()
    assert "jupyter kernelspec remove python3" in problem.value.fix


@pytest.mark.parametrize("name", ["Python", "JupyterLab", "disk"])
def test_this_machine_passes(name: str) -> None:
    assert found(name).fix == "", found(name)
