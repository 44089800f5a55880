"""A record that fails: one object, which its lane owns, and what becomes of it.

The policy is a pure function from the FailedRecord to a decision. Dashboards and the
command line learn of a failure from steps. They may put a command on the record; the policy then decides again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.producer import Headers
from labkit.kafka.records import Message, Placed, Record

TIMES = 50  # the newest failed attempts whose times are kept


@dataclass(frozen=True)
class Retry:
    """Call the handler again `after` seconds after this attempt failed; the lane waits, its order is kept."""

    after: float


@dataclass(frozen=True)
class SetAside:
    """Keep the record in this topic instead. It counts as finished once the broker has confirmed it there."""

    topic: str
    key: str | bytes | None
    value: bytes | None
    headers: Headers = ()


@dataclass(frozen=True)
class Stop:
    """The consumer stops with this error, else the handler's; the record stays uncommitted."""

    error: Exception | None = None


Decision: TypeAlias = Retry | SetAside | Stop


class FailedRecord(Placed):
    """A record whose attempts have failed so far, from the first failure until it is finished or taken away.

    `record` is None for a poison record, which has no value to show; `message` has its bytes in any case. Times are
    seconds since 1970.
    """

    def __init__(self, message: Message, wake: Callable[[FailedRecord], None]) -> None:
        self.topic, self.partition, self.offset = message.topic(), message.partition(), message.offset()
        self.message = message
        self.record: Record[Any] | None = None
        self.error: BaseException = Exception()
        """Of the newest attempt."""
        self.attempt = 0
        """How many calls have failed, since the process started."""
        self.times: list[float] = []
        """When the newest of them failed."""
        self.since = time.time()
        """When the first one failed."""
        self.decision: Decision | None = None
        self.due = 0.0
        """When its lane goes on."""
        self.command: Any = None
        """A command from outside, such as a skip; the policy answers it."""
        self.refused: DeliveryFailed | None = None
        """Why it could not be set aside at the last attempt."""
        self.times_refused = 0
        self.in_flight: set[str] = set()
        """The topics to which it was sent, and which have not refused it."""
        self.confirmed = False
        """Whether one of these has confirmed it."""
        self.recheck = False
        """Whether the policy is asked next, instead of the handler."""
        self._wake = wake

    def fail(self, record: Record[Any] | None, error: BaseException) -> None:
        """Note one more failed attempt."""
        self.record, self.error = record, error
        self.refused, self.times_refused = None, 0
        self.attempt += 1
        self.times = [*self.times, time.time()][-TIMES:]

    @property
    def key(self) -> str | None:
        """Its key as text, as far as it decodes."""
        key = self.message.key()
        return None if key is None else key.decode(errors="replace")

    def put_command(self, command: Any) -> None:
        """Put a command on it, and have the policy answer now, even during a back-off. Any thread may call this. It
        does nothing once the record is finished or its partition was given up."""
        self.command = command
        self._wake(self)

    def __repr__(self) -> str:
        return f"FailedRecord({self.place}, attempt {self.attempt}: {type(self.error).__name__})"


OnFailure: TypeAlias = Callable[[FailedRecord], Decision]
"""Decides what becomes of a failed record: a pure function. If it raises, `keep_trying` decides."""


def keep_trying(first: float = 0.1, cap: float = 10.0) -> OnFailure:
    """The default: keep the lane and its order, back off from `first` seconds, doubling up to `cap`, without end."""

    def decide(failed: FailedRecord) -> Decision:
        return Retry(min(cap, first * 2.0 ** min(failed.attempt - 1, 60)))

    return decide
