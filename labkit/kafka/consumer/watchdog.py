"""Ends the process when a call never returns: Python cannot end a thread."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from typing import NoReturn

from labkit.kafka.consumer.run import log
from labkit.kafka.records import Message, coordinates

EXIT_DEADLINE = 70  # exit code of a process whose handler overran its deadline


class Watchdog:
    """Ends the process when a call, which one thread makes `with` it, takes more than `limit` seconds of the process's
    own time: a frozen process does not age."""

    def __init__(self, limit: float, exit_code: int) -> None:
        self.limit, self.exit_code = limit, exit_code
        self.what = ""
        """What the log says about the call that runs."""
        self._calls, self._inside = 0, False
        self._closed = threading.Event()

    def __enter__(self) -> None:
        self._calls, self._inside = self._calls + 1, True

    def __exit__(self, *_: object) -> None:
        self._inside = False

    def start(self, name: str) -> None:
        """Begin to watch, in a thread of this name."""
        threading.Thread(target=self._watch, name=name, daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        seen, age, before = 0, 0.0, time.monotonic()
        while not self._closed.wait(min(0.2, self.limit / 2)):
            now = time.monotonic()
            age = age + min(now - before, 1.0) if self._inside and self._calls == seen else 0.0
            seen, before = self._calls, now
            if age > self.limit:
                end_process(self.what, self.exit_code)


def overrun(message: Message, deadline: float) -> str:
    """What the log says about a handler that takes too long with this record."""
    return f"handler of {coordinates(message)} has run for more than its deadline of {deadline:g} s"


def end_process(why: str, exit_code: int) -> NoReturn:
    """End the process at once, and say where its threads are."""
    try:
        log(f"{why}; the process ends, nothing is lost. Stacks:")
        faulthandler.dump_traceback(all_threads=True)
    finally:
        os._exit(exit_code)
