"""Load: records sent at a steady rate from a thread, with a ledger of what the broker confirmed.

The ledger, not the topic, says what was sent: a producer that loses records must not be able to hide it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Generic

from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.records import T
from labkit.kafka.topics import Topic
from labkit.lab.anomalies import Sent


class Load(Generic[T]):
    """Sends `values` to `topic`, `rate` a second. Runs until all are sent or `stop` is called."""

    _stays_in_the_notebook = "a handler sends with topic.send(...)"

    def __init__(
        self,
        topic: Topic[T],
        values: Iterable[T],
        rate: float,
        identify: Callable[[T], str],
        key: Callable[[T], str | None],
    ) -> None:
        self.topic = topic
        self.error: str | None = None
        self._values, self._rate, self._identify, self._key = iter(values), rate, identify, key
        self._ledger: list[Sent] = []
        self._confirmed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"load {topic.short}", daemon=True)
        self._thread.start()

    @property
    def sent(self) -> list[Sent]:
        """The ledger: every record in sending order, marked whether the broker confirmed it."""
        return list(self._ledger)

    @property
    def count(self) -> int:
        """How many the broker confirmed."""
        return self._confirmed

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def wait(self, timeout: float = 60.0) -> None:
        """Wait until all is sent and confirmed. Raises TimeoutError, or DeliveryFailed with what went wrong."""
        self._thread.join(timeout)
        if not self.done:
            raise TimeoutError(f"load on {self.topic.short} is not done after {timeout:g} s: {self!r}")
        if self.error:
            raise DeliveryFailed(self.error)

    def stop(self) -> None:
        """Send no more; what was sent is confirmed."""
        self.cancel()
        self._thread.join(35)

    def cancel(self) -> None:
        """The same, without waiting."""
        self._stop.set()

    def __repr__(self) -> str:
        return f"Load: {self._confirmed:,} sent to {self.topic.short}, {'done' if self.done else f'{self._rate:g}/s'}"

    def _run(self) -> None:
        try:
            begun, order = time.monotonic(), 0
            while not self._stop.is_set():
                due = int((time.monotonic() - begun) * self._rate) + 1 - order
                batch = list(islice(self._values, max(0, due)))
                if due > 0 and not batch:
                    return
                for value in batch:
                    key = self._key(value)
                    self._ledger.append(Sent(self._identify(value), key, order, confirmed=False))
                    self.topic.send(value, key)
                    order += 1
                self._confirm()
                self._stop.wait(0.02)
        except Exception as error:  # shown by repr, wait and the audit; a thread has nobody to raise to
            self.error = f"{type(error).__name__}: {error}"

    def _confirm(self) -> None:
        self.topic.flush()
        for number in range(self._confirmed, len(self._ledger)):
            self._ledger[number] = self._ledger[number]._replace(confirmed=True)
        self._confirmed = len(self._ledger)


def identifier(by: str | Callable[[Any], Any]) -> Callable[[Any], str]:
    """A function from a value to its business id: a field's name (Struct, dataclass or dict), or a function."""
    if callable(by):
        return lambda value: str(by(value))
    field = by
    return lambda value: str(value[field] if isinstance(value, dict) else getattr(value, field))
