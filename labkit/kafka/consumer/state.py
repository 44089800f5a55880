"""Handlers with state: the thread that polls calls them, and their state is committed with the offsets.

State belongs to a partition *number*: the topic and its co-partitioned topics share it. It is kept in the same
number of a compacted topic, the store, and read from there when the partition is assigned. The handler reads the
state and returns its changes. They are applied after it has returned, so a failed attempt leaves nothing behind. The
newest value of each changed key is an output of the next transaction.

Because one thread polls, calls the handler and commits, positions and state always match, and nothing is locked. The
price: such a handler must be quick, and must not wait for anybody.

A record that is not due yet (`not_before`) waits in its partition's lane, uncommitted, and so do the records behind it.
Other partitions go on, those of the same number too.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import Empty
from types import MappingProxyType
from typing import Any, TypeVar

from labkit.kafka.consumer.commits import Commits
from labkit.kafka.consumer.failures import FailedRecord, Retry, SetAside, Stop
from labkit.kafka.consumer.lanes import Lane, Partition
from labkit.kafka.consumer.run import Run
from labkit.kafka.consumer.spec import Spec
from labkit.kafka.consumer.steps import Step
from labkit.kafka.consumer.watchdog import EXIT_DEADLINE, Watchdog, overrun
from labkit.kafka.consumer.workers import Workers
from labkit.kafka.errors import HandlerExit, LabkitError, PoisonRecord, TopicMismatch, error_text, safe_text
from labkit.kafka.producer import HandlerContext, Output, handling
from labkit.kafka.reader import Reader
from labkit.kafka.records import Message, Record, coordinates, encode, parser
from labkit.kafka.topics import Topic

V = TypeVar("V")

AT_ONCE = 100_000  # records, however fast the handler is
FIRST = 8  # records at once in the beginning; how long they take says how many may follow
RESTORE = 120.0  # seconds for a state to be read from its store
SLICE = 0.2  # seconds for which the handler is called before the loop polls again
OVERHEAD = 200  # bytes of a record in a batch beside its key and value, generously

Changes = Mapping[bytes, bytes | None]


class PartitionState:
    """Values by key of one partition number, as they are in the store."""

    __slots__ = ("changes", "number", "values", "view")

    def __init__(self, number: int) -> None:
        self.number = number
        self.values: dict[bytes, bytes] = {}
        self.view: Mapping[bytes, bytes] = MappingProxyType(self.values)  # read-only, for handlers
        self.changes: dict[bytes, bytes | None] = {}  # not committed yet: the newest of each key, None if deleted

    def apply(self, changes: Changes) -> None:
        """Apply the changes that a handler has returned."""
        self.changes.update(changes)
        for key, value in changes.items():
            if value is None:
                self.values.pop(key, None)
            else:
                self.values[key] = value

    def committed(self, changes: Changes) -> None:
        """These changes are in the store; later ones are still to be written."""
        for key, value in changes.items():
            if key in self.changes and self.changes[key] is value:
                del self.changes[key]


class Values(Mapping[str, V]):
    """A state as a handler of single records sees it. Each look decodes a value anew, so changing a value in place has
    no effect."""

    def __init__(self, raw: Mapping[bytes, bytes], parse: Callable[[bytes], V]) -> None:
        self._raw, self._parse = raw, parse

    def __getitem__(self, key: str) -> V:
        return self._parse(self._raw[key.encode()])

    def __iter__(self) -> Iterator[str]:
        return (key.decode() for key in self._raw)

    def __len__(self) -> int:
        return len(self._raw)


def check_store(spec: Spec) -> None:
    """Raises TopicMismatch when the store cannot keep the state of this consumer, TopicMissing, ClusterUnreachable."""
    store = spec.store
    if store is None:
        return
    store.check_compacted("keep a state")
    there = store.cluster.topics()
    kept = there.get(store.name)
    own = {topic.name for topics in spec.co_partitioned.values() for topic in topics}
    for topic in spec.sources:
        read = there.get(topic.name)
        if topic.name not in own and read and kept and read != kept:
            raise _other_number(topic.short, read, store.short, kept)


def most_bytes(store: Topic[Any]) -> int:
    """How many bytes a key and its value may have. Raises TopicMissing, ClusterUnreachable."""
    return max(1, int(store.cluster.topic_config(store.name)["max.message.bytes"]) - OVERHEAD)


def _other_number(topic: str, read: int, store: str, kept: int) -> TopicMismatch:
    return TopicMismatch(
        f"topic {topic} has {read} partitions, and its store {store} has {kept}. The state of partition n is kept in "
        f"partition n, so both need the same number. If {topic} was given more, its keys have moved away from their "
        "state: make both topics anew, with the new number and other names"
    )


def restore(run: Run, numbers: Iterable[int]) -> dict[int, PartitionState]:
    """The states of these partition numbers, read from the store up to its end.

    Called when the group has answered where the partitions begin. By then each transaction that moved the offsets is
    decided, but its marker may still be missing in the store. So it reads to the end of uncommitted records, and waits
    for the marker there. Raises TopicMismatch, ClusterUnreachable.
    """
    states, store = {number: PartitionState(number) for number in numbers}, run.spec.store
    if store is None or not states:
        return {}
    if max(states) >= store.partitions:  # partitions were added
        raise _other_number(run.spec.sources[0].short, max(states) + 1, store.short, store.partitions)
    with Reader(store, partitions=sorted(states)) as reader:
        for messages in reader.messages_to_end(RESTORE):
            for message in messages:
                key, value, values = message.key(), message.value(), states[message.partition()].values
                if value is not None and key is not None:
                    values[key] = value
                elif key is not None:
                    values.pop(key, None)
            if run.stop.is_set() or run.fatal is not None:
                break
    return states


class StateHandler:
    """Calls the handler, in the thread that polls, with single records or with batches that are not decoded."""

    def __init__(self, run: Run, commits: Commits, workers: Workers) -> None:
        self.run, self.commits, self.workers, self.spec = run, commits, workers, run.spec
        store = run.spec.store
        assert store is not None  # noqa: S101
        self.store = store
        self.parse = parser(store.value)
        self.most = most_bytes(store)
        self.due = {name: (of, workers.decode[name]) for name, of in run.spec.not_before.items()}
        self.at_once = FIRST  # records to fetch: at most what the handler does in a slice
        self.done, self.took = 0, 0.0  # records of this turn, and seconds for them
        self.context: HandlerContext
        self.watchdog = Watchdog(run.spec.deadline, EXIT_DEADLINE)
        self.watchdog.start("deadline of the handler")

    def handle(self, partition: Partition, messages: list[Message]) -> None:
        """Handle what was fetched. If it takes too long, the rest is fetched again after the loop has polled."""
        if partition.topic in self.spec.not_before:
            for lane in partition.add(messages, by_key=False):
                self._handle_due(lane)
            return
        messages = partition.unseen(messages)
        if not messages:
            return
        partition.at_end = False
        with self._called_in() as until:
            done = 0
            while done < len(messages) and self.run.fatal is None:
                if done and time.monotonic() > until:  # it has become slow
                    partition.seeking = True
                    break
                many = min(self.spec.batch or 1, self.at_once)
                part = self._announced(messages[done : done + many], until)
                self._attempt(partition, part)
                done += len(part)
            self.done += done

    def go_on(self) -> None:
        """Handle records that are due now, and those behind them."""
        ready = self.workers.ready
        for _ in range(ready.qsize()):  # a lane that wants more comes back at the next turn
            with suppress(Empty):
                if (lane := ready.get_nowait()) is not None:
                    self._handle_due(lane)

    def _handle_due(self, lane: Lane) -> None:
        """Handle the records of a lane one by one, until one is not due yet."""
        partition, (not_before, decode) = lane.partition, self.due[lane.partition.topic]
        with self._called_in() as until:
            while self.run.fatal is None and not partition.rest(lane):
                message = lane.queue[0]
                try:
                    if self.workers.waits(lane, not_before(decode(message))):
                        return
                except Exception as error:  # `not_before` may raise, too
                    self.context.record = None
                    self._failed(partition, (message,), error)
                else:
                    self._attempt(partition, self._announced([message], until))
                self.done += 1
                if time.monotonic() > until:
                    self.workers.ready.put(lane)
                    return

    @contextmanager
    def _called_in(self) -> Iterator[float]:
        """The context in which the handler is called. Yields until when (time.monotonic()) it may be called."""
        self.context = HandlerContext(self.commits.producer, refuses=self.commits.refuses)
        token, began = handling.set(self.context), time.monotonic()
        try:
            yield began + SLICE
        finally:
            handling.reset(token)
        self.took += time.monotonic() - began

    def adapt(self) -> None:
        """After a turn: decide how many records may come in the next one. There are more only if this turn was full,
        because the time of a few records says nothing about many."""
        if self.took > SLICE:
            self.at_once = max(1, int(self.done * SLICE / self.took))
        elif self.took < SLICE / 4 and self.done >= self.at_once:
            self.at_once = min(2 * self.at_once, AT_ONCE)
        self.done, self.took = 0, 0.0

    def close(self) -> None:
        self.watchdog.close()

    def _announced(self, messages: list[Message], until: float) -> list[Message]:
        """Call the hooks for records that are about to be handled; if the hooks are slow, only for the first ones."""
        if self.run.hooks:
            for number, message in enumerate(messages, 1):
                self._tell(Step.HANDLING, message)
                if time.monotonic() > until:
                    return messages[:number]
        return messages

    def _tell(self, step: Step, message: Message) -> None:
        record = Record(message, None, None)
        if self.spec.batch is None:
            try:
                record = self.workers.decode[message.topic()](message)
            except PoisonRecord:
                return
        for hook in self.run.hooks:
            hook(step, record)

    def _attempt(self, partition: Partition, messages: Sequence[Message]) -> None:
        """Handle these records. If the handler raises, handle their halves, down to the record that fails."""
        state, context = partition.state, self.context
        assert state is not None  # noqa: S101
        context.record, context.collecting = None, True
        self.watchdog.what = overrun(messages[0], self.spec.deadline)
        changes: Changes = {}
        failure: BaseException | None = None
        try:
            with self.watchdog:
                changes = self._called(state, messages)
        except BaseException as error:
            failure = error
        outputs = context.take()
        if failure is not None:
            self._failed(partition, messages, failure)
            return
        if outputs:
            self.commits.publish(partition, messages, outputs)
        if changes:
            state.apply(changes)
        partition.finish(messages[-1])
        if self.run.hooks:
            for message in messages:
                self._tell(Step.HANDLED, message)

    def _called(self, state: PartitionState, messages: Sequence[Message]) -> Changes:
        """The handler's changes, checked and encoded."""
        changes: Any
        if self.spec.batch is None:
            record = self.context.record = self.workers.decode[messages[0].topic()](messages[0])
            changes = self.spec.handler(Values(state.view, self.parse), record)
        else:
            changes = self.spec.handler(state.view, messages)
        if changes is None:
            return {}
        if not isinstance(changes, Mapping):
            raise TypeError(f"a handler with state returns its changes by key, or None, not {changes!r}")
        if self.spec.batch is None:
            changes = self._encoded(changes)
        for key, value in changes.items():
            if not (isinstance(key, bytes) and (value is None or isinstance(value, bytes))):
                raise TypeError(f"changes of a batch are bytes by bytes, not {value!r} by {key!r}")
            if len(key) + len(value or b"") > self.most:
                raise LabkitError(
                    f"the value of {key!r} has {len(value or b''):,} bytes, and store {self.store.short} takes "
                    f"{self.most:,}: keep less by one key, or give the store a larger max.message.bytes"
                )
        checked: Changes = changes
        return checked

    def _encoded(self, changes: Mapping[str, Any]) -> Changes:
        raw: dict[bytes, bytes | None] = {}
        for key, value in changes.items():
            raw[key.encode()] = encoded = None if value is None else encode(value)
            if encoded is not None:
                self.parse(encoded)  # else nobody could read it later
        return raw

    def _failed(self, partition: Partition, messages: Sequence[Message], error: BaseException) -> None:
        """Halve these until one record is left. Set that aside in the transaction: another attempt would fail, too."""
        if isinstance(error, KeyboardInterrupt):  # somebody interrupts the run in the main thread
            self.run.end(error)
            return
        if not isinstance(error, Exception):
            told = f"the handler ended the process ({safe_text(error, of=repr)}) on {coordinates(messages[0])}"
            self.run.end(HandlerExit(f"{told}, which is not committed"))
            return
        if len(messages) > 1:
            half = len(messages) // 2
            for part in (messages[:half], messages[half:]):
                if self.run.fatal is None:
                    self._attempt(partition, part)
            return
        (message,), record = messages, self.context.record
        failed = FailedRecord(message, lambda _: None)
        failed.fail(record, error)
        failed.decision = decision = self.workers.decision(failed)
        self.workers.log_failed(failed)
        self.run.report(Step.FAILED, failed)
        match decision:
            case SetAside():
                self.context.record = record or Record(message, None, None)  # the cause of its copy
                self.commits.set_aside(partition, message, decision, lambda _: None)
                partition.finish(message)
                self.run.report(Step.RECOVERED, failed)
            case Stop(other):
                self.run.end(other or error)
            case Retry():
                self.run.end(
                    LabkitError(
                        f"{failed.place} failed, and a handler with state is called once for a record, as another "
                        f"attempt would fail as well: {error_text(error)}. Let on_failure set such records aside, as "
                        "a RetryingConsumer does"
                    )
                )


_keeping = threading.Lock()
_kept: list[bool] = []  # for each consumer that wants no collection now: whether it was on before


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Switch garbage collection off: with 10,000 messages in memory, at which the collector looks again and again, it
    takes half of the time."""
    with _keeping:
        _kept.append(gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _keeping:
            if _kept.pop():  # the first entry is the last to go, whichever consumer leaves first
                gc.enable()


def outputs_of(state: PartitionState, changes: Changes, store: str) -> Iterator[Output]:
    """These changes as outputs of the transaction."""
    for key, value in changes.items():
        yield Output(store, value, key, state.number, [])
