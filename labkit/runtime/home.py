"""The two folders that labkit keeps for a user, the one it brings along, and locks on files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from labkit.kafka.errors import LabkitError

CACHE = "LABKIT_CACHE"
STATE = "LABKIT_STATE"
BROUGHT = Path(__file__).parents[1] / "notebooks"  # in a wheel; a clone has them beside the package


def cache_dir() -> Path:
    """The folder for what can be made again: jars, Java's caches, the template. `LABKIT_CACHE` names another one.

    Raises LabkitError when it cannot be written to.
    """
    return _writable(CACHE, platformdirs.user_cache_path("labkit"))


def state_dir() -> Path:
    """The folder for the broker's state and data, logs, runs. `LABKIT_STATE` names another one, with its own broker.

    Raises LabkitError when it cannot be written to.
    """
    return _writable(STATE, platformdirs.user_state_path("labkit"))


def _writable(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable) or default).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write there")
    except OSError as error:
        reason = error.strerror or str(error)
        raise LabkitError(
            f"labkit cannot use its folder {folder}: {reason}. Make it writable, or set {variable} to a folder that is."
        ) from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file `path` as a lock, among processes and threads. The kernel frees it when its holder dies."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
