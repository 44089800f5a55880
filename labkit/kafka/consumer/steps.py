"""The named steps that a running consumer reports.

Tests and baselines crash a process *at a step*, so a failure happens where it is meant to, never by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias


class Step(Enum):
    """Where a record, or the member that holds it, has got to."""

    ASSIGNED = "assigned"
    """Partitions came to this member. Subject: list of (topic, partition, first offset to be read)."""
    HANDLING = "handling"
    """The handler is about to be called. Subject: the record."""
    HANDLED = "handled"
    """The handler returned, and what it sent is on its way, or held for the transaction; nothing is committed yet.
    Subject: the record."""
    FAILED = "failed"
    """The handler raised, or the record did not decode. Subject: the FailedRecord, decision included."""
    BLOCKED = "blocked"
    """Its lane waits for the next attempt, or for a topic that refuses the record. Subject: the FailedRecord."""
    RECOVERED = "recovered"
    """A lane that had failed goes on: its record was handled, set aside, or taken away. Subject: the FailedRecord."""
    COMMITTING = "committing"
    """Offsets are about to be committed. At least once: what a hook sends now is confirmed first, and the step is
    reported again until all outputs are confirmed. Exactly once: a transaction is about to begin.
    Subject: {(topic, partition): offset}."""
    OFFSETS_SENT = "offsets sent"
    """Exactly once: the transaction has the offsets; the outputs follow. Subject: None."""
    FLUSHED = "flushed"
    """Everything that was sent is confirmed, and the commit follows. Subject: None."""
    COMMITTED = "committed"
    """The broker has the offsets. Subject: {(topic, partition): offset}."""
    REVOKED = "revoked"
    """Partitions left this member, after its drain. Subject: list of (topic, partition)."""
    LOST = "lost"
    """Others got partitions while this member was away; nothing is committed. Subject: list of (topic, partition)."""
    MEASURED = "measured"
    """A service, a view, a store or a guarantee counted something. Subject: Measured."""


@dataclass(frozen=True)
class Measured:
    """Figures that only their process knows, by name; reported again whenever they change."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Totals since the process started; boards show their sum over all processes, and how fast it grows."""
    gauges: Mapping[str, float] = field(default_factory=dict)
    """Present values; boards show the highest of all processes."""


Report: TypeAlias = Callable[[Step, Any], None]
"""Called from the thread in which the step happens, handler threads included: be quick and thread-safe."""
