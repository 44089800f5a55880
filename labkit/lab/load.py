"""Load: records sent at a steady rate from a thread, with a ledger of what the broker confirmed.

The ledger, not the topic, says what was sent: a producer that loses records must not be able to hide it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Generic

from labkit.kafka.effects import Sent
from labkit.kafka.errors import DeliveryFailed, LabkitError, error_text, safe_text
from labkit.kafka.producer import Producer
from labkit.kafka.records import T, encode
from labkit.kafka.topics import Topic

PATIENCE = 600.0  # seconds without Kafka: a learner who kills it reads for a while


class Load(Generic[T]):
    """Sends `values` to `topic`, `rate` a second. Runs until all are sent or `stop` is called, or until it fails.

    It has a producer of its own, so that its failures and those of other senders in this process stay apart.
    """

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
        """Why it ended early: the broker refused records or was away for PATIENCE seconds, or `values` raised."""
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

    def confirmed_since(self, start: int) -> list[Sent]:
        """What the broker confirmed, from the `start`th record on."""
        return self._ledger[start : self._confirmed]

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout: float = 60.0) -> None:
        """Wait until all is sent and confirmed.

        Raises TimeoutError after `timeout` seconds, DeliveryFailed with what went wrong.
        """
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
        """Like `stop`, without waiting."""
        self._stop.set()

    def __repr__(self) -> str:
        state = f"failed: {self.error}" if self.error else "done" if self.done else f"{self._rate:g}/s"
        return f"Load: {self._confirmed:,} sent to {self.topic.short}, {state}"

    def _run(self) -> None:
        try:
            producer = Producer(self.topic.cluster, PATIENCE)  # destroyed at the end, because it holds threads
            begun, order = time.monotonic(), 0
            while not self._stop.is_set():
                due = int((time.monotonic() - begun) * self._rate) + 1 - order
                batch = list(islice(self._values, max(0, due)))
                if due > 0 and not batch:
                    return
                for value in batch:
                    key = self._key(value)
                    self._ledger.append(Sent(self._identify(value), key, order, confirmed=False))
                    producer.send(self.topic.name, encode(value), key)
                    order += 1
                self._confirm(producer)
                if order == len(batch):  # the first records may take a second: no burst to make up for it
                    begun = time.monotonic() - order / self._rate
                self._stop.wait(0.02)
        except Exception as error:  # nobody would catch it; repr, `wait` and the verdict show it
            self.error = error_text(error)

    def _confirm(self, producer: Producer) -> None:
        while producer.unconfirmed(0.2) and not self._stop.is_set():
            pass
        producer.flush()
        for number in range(self._confirmed, len(self._ledger)):
            self._ledger[number] = self._ledger[number]._replace(confirmed=True)
        self._confirmed = len(self._ledger)


def identifier(by: str | Callable[[Any], Any]) -> Callable[[Any], str]:
    """A function from a value to its business id: a field's name (Struct, dataclass or dict), or a function.

    It raises LabkitError for a value without an id, whatever the value or the function raises.
    """

    def identify(value: Any) -> str:
        try:
            if callable(by):
                return str(by(value))
            return str(value[by] if isinstance(value, dict) else getattr(value, by))
        except Exception as error:
            shown, how = safe_text(value, of=repr), "name its id by by='…' or by=a function"
            if not callable(by) and isinstance(error, KeyError | AttributeError):
                raise LabkitError(f"{shown} has no field {by!r}: {how}") from None
            raise LabkitError(f"{shown} does not tell its id ({error_text(error)}): {how}") from error

    return identify
