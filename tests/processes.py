"""Waiting for what other processes do, with deadlines."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

STRETCH = 4


def wait_until(condition: Callable[[], object], timeout: float = 10.0, what: str = "") -> None:
    """Wait until `condition()` is true. Fails the test, naming what was waited for, after `timeout` seconds; what a
    halted machine sleeps beyond its time does not count, as nobody else got on with it either.

    Such a limit only ends a hang. So it is stretched: other tests, or other work, may leave this one a tenth of a core.
    """
    deadline = time.monotonic() + STRETCH * timeout
    while not condition():
        looked = time.monotonic()
        if looked > deadline:
            faulthandler.dump_traceback(2)  # of all threads: who has not come back
            pytest.fail(f"not within {timeout:g} s: {what or condition}")
        time.sleep(0.01)
        deadline += max(0.0, time.monotonic() - looked - 0.25)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(folder: Path) -> list[psutil.Process]:
    """Running processes, this one apart, with `folder` in their command line or as their LABKIT_STATE."""
    found = []
    for process in psutil.process_iter():
        try:
            named = any(str(folder) in argument for argument in process.cmdline())
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            if named or process.environ().get("LABKIT_STATE", "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found
