"""`make` on a machine whose Python does not do: a message that says what to do, and nothing changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def fake_python(folder: Path, name: str, version: str, fits: bool, complete: bool = True) -> Path:
    """A Python that answers the questions which the Makefile asks."""
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        f"  *sys.exit*) exit {int(not fits)};;\n"
        f"  *ensurepip*) exit {int(not complete)};;\n"
        f"  *) echo {version};;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return path


def make(
    clone: Path, *arguments: str, path: str = os.environ["PATH"], target: str = "environment"
) -> subprocess.CompletedProcess[str]:
    command = [str(shutil.which("make")), target, *arguments]
    # Without what the make has set that may run these tests.
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "ARGS"))}
    return subprocess.run(
        command, cwd=clone, env={**environment, "PATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("version", "fits"), [((3, 10), False), ((3, 11), True), ((3, 14), True), ((3, 15), False)])
def test_what_fits(version: tuple[int, int], fits: bool) -> None:
    """The question itself, as make asks it."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    told = dict(line.split(" := ", 1) for line in lines if " := " in line)
    question = told["FITS"].replace("$(OLDEST)", told["OLDEST"]).replace("$(NEWEST)", told["NEWEST"])
    code = f"import sys; sys.version_info = {(*version, 0, 'final', 0)}; {question}"
    assert (subprocess.run([sys.executable, "-c", code], check=False).returncode == 0) is fits


@pytest.mark.parametrize("version", ["3.10.13", "3.15.0"])
def test_too_old_or_too_new(clone: Path, tmp_path: Path, version: str) -> None:
    fake_python(tmp_path, "fake", version, fits=False)
    done = make(clone, "PYTHON=../fake")
    assert done.returncode != 0
    assert f"labkit needs Python 3.11–3.14. ../fake is {version}" in done.stderr
    assert "make lab PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


def test_all_that_was_found_is_named(clone: Path, tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for tool in ("sh", "cat", "cksum"):
        (bin_folder / tool).symlink_to(str(shutil.which(tool)))
    done = make(clone, path=str(bin_folder))
    assert "No python3 runs here" in done.stderr
    fake_python(bin_folder, "python3", "3.9.1", fits=False)
    assert "python3 is 3.9.1" in make(clone, path=str(bin_folder)).stderr


def test_python_without_venv(clone: Path, tmp_path: Path) -> None:
    fake_python(tmp_path, "fake", "3.12.3", fits=True, complete=False)
    done = make(clone, "PYTHON=../fake")
    assert done.returncode != 0
    assert "apt install python3-venv" in done.stderr


def make_environment(clone: Path) -> Path:
    """One that is up to date; its bin folder."""
    stamp = subprocess.run(
        ["sh", "-c", "cat requirements.lock pyproject.toml | cksum"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=True,
    )
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (clone / ".venv" / "made-from").write_text(f"{stamp.stdout.strip()} {clone.resolve()}\n")
    return clone / ".venv" / "bin"


def test_an_environment_that_is_up_to_date_is_left_alone(clone: Path) -> None:
    make_environment(clone)
    done = make(clone)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("target", "program", "ran"),
    [
        ("lab", "labkit", "labkit lab\n"),
        ("test-long", "python", "tests/kafka tests/unit"),
    ],
    ids=["lab", "test-long"],
)
def test_what_fails_fails_make(clone: Path, target: str, program: str, ran: str) -> None:
    path = make_environment(clone) / program
    path.unlink(missing_ok=True)
    version = ".".join(map(str, sys.version_info[:3]))
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {version} && exit\necho "{program} $*"\nexit 3\n')
    path.chmod(0o755)
    done = make(clone, target=target)
    assert done.stdout.rstrip().endswith(ran.rstrip()), done.stdout
    assert done.returncode != 0


def test_make_test_lints_and_runs_everything_with_the_notebooks(clone: Path) -> None:
    make_environment(clone)
    commands = make(clone, "--dry-run", target="test").stdout.splitlines()
    assert [words for words in ("ruff check", "ruff format --check", "mypy", "importlinter") if words in str(commands)]
    assert "--nbval-lax" in commands[-1]
    assert commands[-1].endswith("notebooks tests/browser tests/notebooks tests/kafka tests/unit ")


def test_an_environment_cut_short_is_made_anew(clone: Path, tmp_path: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "half-made").write_text("")
    fake_python(tmp_path, "fake", "3.12.3", fits=True)
    done = make(clone, "PYTHON=../fake")  # the fake makes no environment, so this goes no further
    assert "Making the environment .venv with Python 3.12.3" in done.stdout
    assert not (clone / ".venv" / "half-made").exists()
