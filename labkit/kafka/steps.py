"""The named steps of consuming: what a running consumer tells whoever runs it.

Tests and baselines crash a process *at a step*, so a failure happens where it is meant to, never by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from labkit.kafka.errors import place_of
from labkit.kafka.records import Message, Record


class Step(Enum):
    """Where a record, or the member that holds it, has got to."""

    ASSIGNED = "assigned"
    """Partitions came to this member. Subject: list of (topic, partition, first offset to be read)."""
    HANDLING = "handling"
    """The handler is about to be called. Subject: the record."""
    HANDLED = "handled"
    """The handler returned; nothing is committed yet. Subject: the record."""
    FAILED = "failed"
    """The handler raised, or the record did not decode. Subject: the Failure, decision included."""
    RECOVERED = "recovered"
    """A lane that had failed goes on: its record was handled, set aside, or taken away. Subject: the Failure."""
    COMMITTING = "committing"
    """Offsets are to be committed; what is sent now, before them. Told again for as long as something that was sent is
    not confirmed. Subject: {(topic, partition): offset}."""
    FLUSHED = "flushed"
    """Everything that was sent is confirmed, and the commit follows. Subject: None."""
    COMMITTED = "committed"
    """The broker has the offsets. Subject: {(topic, partition): offset}."""
    REVOKED = "revoked"
    """Partitions left this member, after its drain. Subject: list of (topic, partition)."""
    LOST = "lost"
    """Partitions were taken while this member was away; nothing is committed. Subject: list of (topic, partition)."""
    MEASURED = "measured"
    """A service, a view or a store counted something. Subject: Measured."""


@dataclass(frozen=True)
class Measured:
    """Figures that only their process knows, by name. Told again as often as they change."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Totals since the process started: of several processes the sum counts, and how fast it grows."""
    gauges: Mapping[str, float] = field(default_factory=dict)
    """Values of now: of several processes the highest counts."""


Report: TypeAlias = Callable[[Step, Any], None]
"""Called from the thread in which the step happens, handler threads included: be quick and thread-safe."""


@dataclass(frozen=True)
class Retry:
    """Call the handler again after `after` seconds; the lane waits, its order is kept."""

    after: float


@dataclass(frozen=True)
class Ask:
    """Ask again about the same failure after `after` seconds, without calling the handler; the lane waits."""

    after: float


@dataclass(frozen=True)
class Done:
    """The record counts as finished: it was set aside somewhere else (confirmed before the commit)."""


@dataclass(frozen=True)
class Stop:
    """The consumer stops with this error, else the handler's; the record stays uncommitted."""

    error: Exception | None = None


Decision: TypeAlias = Retry | Ask | Done | Stop


def _nothing() -> None:
    """A failure that no loop holds."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt at one record.

    `record` is None for a poison record, which has no value to show; `key` is then what could be read of it.
    """

    topic: str
    partition: int
    offset: int
    key: str | None
    record: Record[Any] | None
    error: BaseException
    attempt: int
    """1 for the first call."""
    since: float
    """When the first attempt failed, in seconds since 1970."""
    decision: Decision | None = None
    raw: Message | None = field(default=None, repr=False, compare=False)
    """The record as it was fetched: a poison record too has bytes that can be set aside."""
    reconsider: Callable[[], None] = field(default=_nothing, repr=False, compare=False)
    """Ask about this failure again now, as after `Ask`: for who decides otherwise while the lane backs off. From any
    thread; it does nothing once the record is finished or its partition was given up."""

    @property
    def place(self) -> str:
        """`topic/partition/offset`."""
        return place_of(self.topic, self.partition, self.offset)


OnFailure: TypeAlias = Callable[[Failure], Decision]
"""What becomes of a failed record. Called in the handler's thread; if it raises, the lane backs off and asks again."""


def keep_trying(first: float = 0.1, cap: float = 10.0) -> OnFailure:
    """The default: keep the lane and its order, back off from `first` seconds, doubling up to `cap`, without end."""

    def decide(failure: Failure) -> Decision:
        return Retry(min(cap, first * 2.0 ** min(failure.attempt - 1, 60)))

    return decide
