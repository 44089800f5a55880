"""`labkit doctor` names the fix of what is wrong, and does not crash itself."""

from __future__ import annotations

import json
import socket
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


CHECKS: dict[str, doctor.Check] = {
    "good": lambda: "fine",
    "optional": raising(doctor.Note("not there, and not needed")),
    "bad": raising(doctor.Problem("broken", "mend it")),
    "ours": raising(LabkitError("no Java: install one")),
    "unforeseen": raising(ZeroDivisionError("oops")),
}


def test_every_kind_of_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", CHECKS)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "ok       good:       fine\n" in done.output
    assert "note     optional:   not there" in done.output
    assert "PROBLEM  bad:        broken\n         fix:        mend it\n" in done.output
    assert "no Java: install one" in done.output
    assert "ZeroDivisionError: oops" in done.output
    assert done.output.endswith("To look into: bad, ours, unforeseen.\n")


def test_json_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: CHECKS[name] for name in ("good", "optional")})
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    answer = json.loads(done.output)
    assert answer["healthy"] is True
    assert [check["state"] for check in answer["checks"]] == ["ok", "note"]


def test_wrong_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEWEST", (3, 10))
    with pytest.raises(doctor.Problem) as problem:
        doctor.python()
    assert "make clean lab PYTHON=" in problem.value.fix


def test_folder_that_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file"))
    found = {finding.check: finding for finding in doctor.examine({"folders": doctor.folders, "disk": doctor.disk})}
    assert found["folders"].state == found["disk"].state == "problem"
    assert "LABKIT_CACHE" in found["folders"].text
    assert found["folders"].fix == found["disk"].fix == doctor._FOLDER


def test_full_disk_and_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "DISK_MB", 10**12)
    monkeypatch.setattr(doctor, "MEMORY_MB", 10**12)
    with pytest.raises(doctor.Problem, match="MB free") as no_disk:
        doctor.disk()
    assert no_disk.value.fix == "free some, or set LABKIT_CACHE to a folder on another disk"
    with pytest.raises(doctor.Problem, match="MB available") as no_memory:
        doctor.memory()
    assert no_memory.value.fix == "close other programs"


def test_java_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_JAVA_HOME", str(tmp_path))
    (finding,) = doctor.examine({"Java": doctor.java})
    assert finding.state == "problem"
    assert "LABKIT_JAVA_HOME" in finding.text
    assert finding.fix.startswith("`make clean lab`")


def test_java_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    java = tmp_path / "bin" / "java"
    java.write_text("#!/bin/sh\necho 'cannot execute' >&2; exit 1\n")
    java.chmod(0o755)
    (tmp_path / "release").write_text('JAVA_VERSION="25.0.1"\n')
    monkeypatch.setenv("LABKIT_JAVA_HOME", str(tmp_path))
    (finding,) = doctor.examine({"Java": doctor.java})
    assert (finding.state, finding.fix) == ("problem", "set LABKIT_JAVA_HOME to the folder of a Java 17 or newer")


def test_jars_that_were_not_fetched_are_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    found = [finding.state for finding in doctor.examine({"jars": doctor.jars, "AOT cache": doctor.aot})]
    assert found == ["note", "note"]


@pytest.mark.long
def test_unreachable_cluster_is_a_problem_naming_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    (finding,) = doctor.examine({"Kafka": doctor.kafka})
    assert finding.state == "problem"
    assert "KAFKA_BOOTSTRAP_SERVERS" in finding.text
    assert "correct or unset it" in finding.fix


def test_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["msgspec>=0.18", "no-such-thing[extra]>=1"])
    with pytest.raises(doctor.Problem, match=r"not installed: no-such-thing$") as problem:
        doctor.packages()
    assert problem.value.fix == doctor.REMAKE


def test_package_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(doctor.Problem, match=r"cannot be loaded: .*msgspec") as problem:
        doctor.packages()
    assert problem.value.fix == doctor.REMAKE


def test_loopback_that_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall cannot be set up in a test: the one call that it would fail, fails."""

    def blocked(*_: object) -> socket.socket:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(doctor.socket, "create_connection", blocked)
    with pytest.raises(doctor.Problem, match=r"127\.0\.0\.1 failed: Operation not permitted") as problem:
        doctor.loopback()
    assert "firewall" in problem.value.fix


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


@pytest.mark.parametrize("error", [LabkitError("broken"), OSError("broken")], ids=("ours", "unforeseen"))
def test_whatever_check_fails_has_a_fix(error: Exception) -> None:
    found = list(doctor.examine(dict.fromkeys(doctor.CHECKS, raising(error))))
    assert [finding.check for finding in found] == list(doctor.CHECKS)
    assert all(finding.state == "problem" and "broken" in finding.text and finding.fix for finding in found)


def test_this_machine_passes_the_rest() -> None:
    names = ("Python", "packages", "folders", "loopback", "JupyterLab")
    found = list(doctor.examine({name: doctor.CHECKS[name] for name in names}))
    assert [(finding.check, finding.state) for finding in found] == [(name, "ok") for name in names], found
