"""The settings of a consumer, as plain data, and the checks on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.failures import OnFailure, keep_trying
from labkit.kafka.consumer.steps import Report
from labkit.kafka.errors import LabkitError
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic


@dataclass(frozen=True)
class Spec:
    """What to read, as which group, what to do with each record, and within which bounds. See `Consumer`."""

    topics: Topic[Any] | Sequence[Topic[Any]]
    handler: Callable[..., Any]
    """A plain function that takes a record. If it raises, `on_failure` decides."""
    group: str = ""
    guarantee: Literal["at least once", "exactly once"] = "at least once"
    """With "exactly once", what the handler sends and the offsets are committed in one transaction. It may then send by
    `topic.send` only, and readers must be read_committed, as labkit's are."""
    slot: str = ""
    """Exactly once: the name of this process among the members of its group, which it keeps when it is restarted. In a
    pod it is the pod's name."""
    order: Literal["partition", "key"] = "partition"
    """What is kept in order: all records of a partition, or only those of one key (more run at once)."""
    on_failure: OnFailure = field(default_factory=keep_trying)
    start: Literal["earliest", "latest"] = "earliest"
    """Where a group begins that has committed nothing in a topic yet. Partitions that are added later are read from
    their beginning. A committed offset that is out of the topic's range means the first record there is."""
    workers: int = 16
    """How many records may be handled at once."""
    max_ahead: int = 4000
    """The consumer reads at most this many records beyond a partition's lowest unfinished one; exactly once, beyond its
    committed offset. This bounds what a crash redelivers, and what is held for the next transaction."""
    deadline: float = 60.0
    """Seconds one call of the handler may take; past it the process dumps its stacks and exits."""
    drain: float = 5.0
    """Seconds that running handlers get when partitions are revoked or the consumer stops."""
    commit_interval: float = 0.2
    batch: int | None = None
    """With a number, the handler takes a list of up to so many records of one lane instead, at least one. A
    record that does not decode is replaced by its PoisonRecord. If the handler raises, the same records come one by
    one, so that `on_failure` is asked about the right one. What it sends names no cause."""
    positions: Callable[[Sequence[tuple[str, int]]], Mapping[tuple[str, int], int]] | None = None
    """Returns the offset at which to start each (topic, partition), instead of the group's committed one: for handlers
    that store offsets with their effect. A partition it leaves out begins at `start`. It is asked again while it raises
    Unavailable. The consumer ends if it raises anything else, or returns an offset out of the topic's range."""
    on_step: Report | None = None
    """A hook called at every step (see `Step`): where tests and baselines crash."""
    on_change: Report | None = None
    """The same without HANDLING and HANDLED, which come with every record: it costs nothing."""
    co_partitioned: Mapping[str, Sequence[Topic[Any]]] = field(default_factory=dict)
    """By topic: other topics among `sources`. The group does not assign their partitions: partition n comes and goes
    with partition n of this topic."""
    store: Topic[Any] | None = None
    """A compacted topic that keeps the handler's state, with as many partitions as `topics`; exactly once only.

    The handler is then `handler(state, record)`. It reads `state`, a mapping of the values of this partition, and
    returns its changes as a mapping, None for a key that is deleted; or None. They are applied when it has returned,
    and committed with what it sent and the offset. The thread that polls calls it: it must be quick, and depend on
    nothing but its arguments. So it is not called again for a record that it fails on: `on_failure` says SetAside, or
    the consumer ends. Only the group's members may write to the store.

    With `batch` it is `handler(state, messages)`: messages as they came, of one partition; state and changes are bytes
    by bytes. If it raises, the halves of the batch come, down to the record that it fails on."""
    not_before: Mapping[str, Callable[[Record[Any]], float]] = field(default_factory=dict)
    """By topic: a record's time, in seconds since 1970, before which the handler is not called; its lane waits. With a
    store the lane is the partition."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise LabkitError("a Consumer needs at least one topic")
        if len({topic.cluster for topic in self.sources}) > 1:
            raise LabkitError("the topics of one Consumer must be on one cluster")
        if self.order not in ("partition", "key"):
            raise LabkitError(f"order is 'partition' or 'key', not {self.order!r}")
        if self.start not in ("earliest", "latest"):
            raise LabkitError(f"start is 'earliest' or 'latest', not {self.start!r}")
        if self.guarantee not in ("at least once", "exactly once"):
            raise LabkitError(f"guarantee is 'at least once' or 'exactly once', not {self.guarantee!r}")
        if self.guarantee == "exactly once":
            self._refuse_what_has_no_transaction()
        if self.store is not None:
            self._refuse_what_has_no_state(self.store)
        if not callable(self.handler):
            raise LabkitError(f"the handler must be a function that takes a record, not {self.handler!r}")
        self._refuse_what_runs_nothing()
        for name in ("workers", "max_ahead", "deadline", "drain", "commit_interval"):
            if getattr(self, name) <= 0:
                raise LabkitError(f"{name} must be positive, not {getattr(self, name)!r}")
        if self.batch is not None and self.batch < 1:
            raise LabkitError(f"batch is how many records the handler takes at once, at least 1, not {self.batch!r}")
        if self.batch is not None and self.not_before:
            raise LabkitError("records that must wait for their time come one by one: leave out batch")

    def _refuse_what_has_no_transaction(self) -> None:
        if self.positions is not None:
            raise LabkitError(
                "exactly once keeps the positions in Kafka, with what the handler sends: leave out positions; or, if "
                "the handler stores them with its effect elsewhere, leave out guarantee: that is exactly once already"
            )
        if self.batch is not None and self.order == "key":
            raise LabkitError(
                "exactly once cannot part a batch in order of keys: what it sends belongs to records before and after "
                "the committed offset. Leave out batch, or order='key'"
            )

    def _refuse_what_has_no_state(self, store: Topic[Any]) -> None:
        if self.guarantee != "exactly once":
            raise LabkitError('a state is committed with the offsets: a store needs guarantee="exactly once"')
        if self.order == "key":
            raise LabkitError("a handler with state takes its records in order of the partition: leave out order='key'")
        if store.cluster != self.cluster:
            raise LabkitError(f"store {store.short} must be on the cluster of the topics: one transaction writes both")
        if store in self.sources:
            raise LabkitError(f"store {store.short} cannot be read by the consumer that writes it")

    def _refuse_what_runs_nothing(self) -> None:
        handler = self.handler
        while isinstance(handler, partial):
            handler = handler.func
        kinds = {
            "coroutine": inspect.iscoroutinefunction,
            "generator": inspect.isgeneratorfunction,
            "generator of coroutines": inspect.isasyncgenfunction,
        }
        for kind, is_one in kinds.items():
            if is_one(handler) or is_one(type(handler).__call__):
                name = getattr(handler, "__qualname__", type(handler).__qualname__)
                raise LabkitError(
                    f"the handler {name} is a {kind} function: calling it runs nothing. Make it a plain `def`, "
                    "with `asyncio.run(...)` inside if need be; workers=N handles N records at once"
                )

    @property
    def sources(self) -> tuple[Topic[Any], ...]:
        """The topics it reads."""
        return (self.topics,) if isinstance(self.topics, Topic) else tuple(self.topics)

    @property
    def cluster(self) -> Cluster:
        """Where they are."""
        return self.sources[0].cluster
