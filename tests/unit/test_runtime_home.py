"""The folders labkit writes to, and the locks on them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from labkit.kafka.errors import LabkitError
from labkit.runtime.home import cache_dir, locked, state_dir

FOLDERS = pytest.mark.parametrize(
    ("variable", "folder"), [("LABKIT_CACHE", cache_dir), ("LABKIT_STATE", state_dir)], ids=["cache", "state"]
)
Folder = Callable[[], Path]


@FOLDERS
def test_made_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, folder: Folder
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "a" / "b"))
    assert folder() == tmp_path / "a" / "b"
    assert folder().is_dir()


@FOLDERS
def test_below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, folder: Folder) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "x"))
    with pytest.raises(LabkitError, match=rf"{tmp_path}/file/x: .*{variable}"):
        folder()


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may write everywhere; become somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@FOLDERS
def test_without_permission(monkeypatch: pytest.MonkeyPatch, variable: str, folder: Folder) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        monkeypatch.setenv(variable, name)
        with ordinary_user(), pytest.raises(LabkitError, match=rf"{name}: no permission.*{variable}"):
            folder()
        monkeypatch.setenv(variable, name + "/x/y")
        with ordinary_user(), pytest.raises(LabkitError, match=rf"{name}/x/y: .*{variable}"):
            folder()


def test_lock_is_freed_by_the_death_of_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import pathlib, sys\nfrom labkit.runtime.home import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
        holder.communicate()
    with locked(lock):
        pass
