"""Who follows a store: a callback in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Self, TypeAlias, TypeVar

from labkit.patterns.key_value_store.contents import Changes

V = TypeVar("V")
Callback: TypeAlias = Callable[[str, V | None, V | None], object]

log = logging.getLogger(__name__)


class Subscription(Generic[V]):
    """One who follows a store. Ends with the store, or by `close`."""

    def __init__(self, store: str, callback: Callback[V]) -> None:
        self._store, self.callback = store, callback
        self._changes: Changes[V] = {}  # not yet told; the newest of each key
        self._telling = False
        self._open = True
        self._wake = threading.Condition()
        threading.Thread(target=self._run, name=f"subscriber of {store}", daemon=True).start()

    @property
    def behind(self) -> int:
        """Changes that were not told yet."""
        with self._wake:
            return len(self._changes) + self._telling

    def close(self) -> None:
        """Tell nothing more, not even what is waiting."""
        with self._wake:
            self._open = False
            self._changes.clear()
            self._wake.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, changes: Changes[V]) -> None:
        with self._wake:
            for key, (old, new) in changes.items() if self._open else ():
                told, _ = self._changes.get(key, (old, None))
                self._changes[key] = (told, new)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._telling = False
                self._wake.wait_for(lambda: self._changes or not self._open)
                if not self._open:
                    return
                key = next(iter(self._changes))
                old, new = self._changes.pop(key)
                self._telling = True
            if old is None and new is None:
                continue  # it came and went meanwhile
            try:
                self.callback(key, old, new)
            except Exception:
                with suppress(Exception):  # of an error whose traceback cannot be had
                    log.exception("a subscriber of store %s failed at %r", self._store, key)
