"""A subscription to a store: a callback in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeAlias, TypeVar

from labkit.closing import Closing
from labkit.patterns.key_value_store.contents import Changes

V = TypeVar("V")
Callback: TypeAlias = Callable[[str, V | None, V | None], object]

log = logging.getLogger(__name__)


class Subscription(Closing, Generic[V]):
    """One subscriber of a store. Ends with the store, or by `close`."""

    def __init__(self, store: str, callback: Callback[V]) -> None:
        self._store, self.callback = store, callback
        self._changes: Changes[V] = {}  # still to be passed on; the newest of each key
        self._calling = False
        self._open = True
        self._wake = threading.Condition()
        threading.Thread(target=self._run, name=f"subscriber of {store}", daemon=True).start()

    @property
    def behind(self) -> int:
        """How many changes the callback has still to get, or is handling now."""
        with self._wake:
            return len(self._changes) + self._calling

    def close(self) -> None:
        """Call no more, not even for changes that wait."""
        with self._wake:
            self._open = False
            self._changes.clear()
            self._wake.notify()

    def _note(self, changes: Changes[V]) -> None:
        with self._wake:
            for key, (old, new) in changes.items() if self._open else ():
                before, _ = self._changes.get(key, (old, None))
                self._changes[key] = (before, new)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._calling = False
                self._wake.wait_for(lambda: self._changes or not self._open)
                if not self._open:
                    return
                key = next(iter(self._changes))
                old, new = self._changes.pop(key)
                self._calling = True
            if old is None and new is None:
                continue  # the entry came and went meanwhile
            try:
                self.callback(key, old, new)
            except Exception:
                with suppress(Exception):  # some errors cannot even be logged
                    log.exception("a subscriber of store %s failed at %r", self._store, key)
