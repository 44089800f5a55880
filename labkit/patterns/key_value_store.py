"""Pattern 3: a key-value store in memory, kept in a compacted topic.

The topic is the store: Kafka keeps the latest value of each key however old it is, whoever wants one reads all of them
into memory, and from then on follows what is written. A read asks nobody. Several processes may have a store on one
topic; each of them may write. Where another client's partitioner has put a key into a second partition, the newer
record counts.

An entry costs some 300 to 500 bytes, its key and value as Python objects included: a million of them, with a Struct of
three fields, took 0.4 GB, and some seconds to load. A data set that is larger than that belongs in a table.
"""

from __future__ import annotations

import html
import logging
import os
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from contextlib import suppress
from typing import Any, Generic, Self, TypeAlias, TypeVar, overload
from weakref import WeakSet

from labkit.kafka.consumer.steps import Measured
from labkit.kafka.errors import (
    ClientRefused,
    ClusterUnreachable,
    DeliveryFailed,
    LabkitError,
    PoisonRecord,
    TopicMismatch,
    TopicMissing,
    Unavailable,
    error_text,
)
from labkit.kafka.lag import end_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import encode, parser, whole
from labkit.kafka.topics import Topic
from labkit.patterns.store_contents import Changes, Contents, differences

V = TypeVar("V")
D = TypeVar("D")
Place: TypeAlias = tuple[str, int]
Callback: TypeAlias = Callable[[str, V | None, V | None], object]

PATIENCE = 30.0  # seconds for a store to be loaded
CONFIRM = 10.0  # seconds for a write to be confirmed
TURN = 0.1  # seconds that a store waits for something new, before it looks whether it was closed
BUSY_TURN = 0.001  # the same, while a write waits to be confirmed
LOOK = 3.0  # seconds from one look at the topic's ends to the next

log = logging.getLogger(__name__)


class StoreNotReady(Unavailable):
    """A store was read before all of its topic was loaded: what it does not have might still come."""


class StoreClosed(LabkitError):
    """A store was used after `close`, or in a process that was forked from the one that made it."""


class KeyValueStore(Mapping[str, V]):
    """A mapping from keys to values of the topic's type. It begins to load when it is made.

    Reading is local: it takes no lock, asks no broker, and never goes back to an older value. Reading before the store
    is loaded raises StoreNotReady. A key whose newest record does not decode raises PoisonRecord when it is read, until
    the key is written again; records without a key are passed over (`ignored`). Values are handed out as they are, not
    copied: do not change them.

    It travels to a pod as the coordinates of its topic, and is loaded there anew.
    """

    def __init__(self, topic: Topic[V]) -> None:
        self.topic = topic
        self.loads = 0
        """How often it was loaded: more than once if this process was away for longer than Kafka keeps tombstones."""
        # Empty until all is loaded, and again in the end: what is found needs no further look, what is missing does.
        self._entries: dict[str, V] = {}
        self._contents: Contents[V] = Contents(topic.value)
        self._parse = parser(topic.value)
        self._timed = False  # whether its contents go by timestamps: a key was found in two partitions
        self._positions: dict[Place, int] = {}
        self._id: str | None = None  # what Kafka calls the topic
        self._subscriptions: list[Subscription[V]] = []
        self._writes: list[_Write] = []
        self._producer: Producer | None = None
        self._lock = threading.Lock()  # of the lists above, and of what subscribers are told
        self._loaded = False
        self._known = threading.Event()  # it was loaded, or never will be
        self._trouble = "it has only just begun"
        self._failure: LabkitError | None = None
        _stores.add(self)
        self._thread = threading.Thread(target=self._run, name=f"store {topic.short}", daemon=True)
        self._thread.start()

    # -- reading ---------------------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float = PATIENCE) -> Self:
        """Wait until it is loaded.

        Raises StoreNotReady, saying what it waits for; TopicMismatch when the topic is not compacted or has another
        number of partitions; TopicMissing; ClientRefused; StoreClosed.
        """
        if not self._known.wait(timeout):
            raise StoreNotReady(f"store {self.topic.short} was not loaded within {timeout:g} s: {self._trouble}")
        self._check()
        return self

    @property
    def ready(self) -> bool:
        """Whether it can be read."""
        return self._loaded

    @overload
    def get(self, key: str, /) -> V | None: ...
    @overload
    def get(self, key: str, /, default: V | D) -> V | D: ...
    def get(self, key: str, /, default: Any = None) -> Any:
        """The newest value of `key`, else `default`. Raises StoreNotReady, StoreClosed, PoisonRecord."""
        value = self._entries.get(key)
        return self._missing(key, default) if value is None else value

    def __getitem__(self, key: str) -> V:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def __len__(self) -> int:
        self._check()
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.snapshot())

    def snapshot(self) -> dict[str, V]:
        """A copy of all entries, as they are at one moment. What iterates goes over one too."""
        self._check()
        return self._entries.copy()

    def values(self) -> ValuesView[V]:
        return self.snapshot().values()

    def items(self) -> ItemsView[str, V]:
        return self.snapshot().items()

    @property
    def ignored(self) -> int:
        """Records without a key that were passed over."""
        return self._contents.ignored

    @property
    def unreadable(self) -> dict[str, PoisonRecord]:
        """The keys that cannot be read, and their newest records, which do not decode."""
        return {key: one.error for key, one in self._contents.unreadable.copy().items()}

    @property
    def scattered(self) -> dict[str, tuple[int, ...]]:
        """The keys that were found in more than one partition, and in which: clients with different partitioners write
        them. Of the newest record in each of these, the one with the latest timestamp counts."""
        return {key: tuple(sorted(found)) for key, found in self._contents.scattered.copy().items()}

    def lag(self) -> int:
        """Records of the topic that this store has still to read. Raises ClusterUnreachable."""
        return _behind(self._positions, self._ends())

    def measured(self) -> Measured:
        """Its figures, to be reported as Step.MEASURED: `<topic> loads`, `<topic> entries`, and `<topic> read`, the sum
        of the offsets up to which it has read."""
        short = self.topic.short
        gauges = {f"{short} entries": float(len(self._entries)), f"{short} read": float(sum(self._positions.values()))}
        return Measured({f"{short} loads": self.loads}, gauges)

    # -- writing ---------------------------------------------------------------------------------------------------

    def put(self, key: str, value: V, timeout: float = CONFIRM) -> None:
        """Write one entry. Returns once the broker has it and this store shows it. Of two writers the last one wins.

        Raises DeliveryFailed when it is refused, or not confirmed within `timeout` seconds: then it may still come;
        LabkitError, before anything is sent, for a value that no store on the topic could read.
        """
        self.update({key: value}, timeout)

    def update(self, entries: Mapping[str, V], timeout: float = CONFIRM) -> None:
        """Write many entries and wait once, as `put` does. They become visible one after the other."""
        if entries:
            self._write([(key, self._encoded(key, value)) for key, value in entries.items()], timeout)

    def delete(self, key: str, timeout: float = CONFIRM) -> None:
        """Take an entry out, by a record without a value (a tombstone). One that is not there may be deleted too.

        One that lies in several partitions is deleted in each. Returns and raises as `put` does.
        """
        self._write([(key, None)], timeout)

    # -- following -------------------------------------------------------------------------------------------------

    def subscribe(self, callback: Callback[V]) -> Subscription[V]:
        """Call `callback(key, old, new)` for every entry there is (`old` is None), and from then on at every change.

        `new` is None when the key was deleted. Each subscriber has a thread of its own: it may take its time, or write
        to this store. To one that is slower than the changes the newest of a key is told, with the value that it was
        told before. What it raises is logged, and the next change is told.
        """
        with self._lock:
            self._check_open()
            subscription = Subscription(self, callback)
            self._subscriptions = [*(one for one in self._subscriptions if one._open), subscription]
            subscription._note({key: (None, value) for key, value in self._entries.items()})
        return subscription

    def close(self) -> None:
        """Stop following the topic. It cannot be read any more; the entries stay in the topic. May be called again."""
        self._end(StoreClosed(f"store {self.topic.short} is closed"))
        if self._thread is not threading.current_thread():
            self._thread.join(2.0)

    def __enter__(self) -> Self:
        """Wait until it is loaded: see `wait_ready`."""
        try:
            return self.wait_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        holds = f"{len(self._entries):,} entries" if self.ready else "closed" if self._failure else "not loaded"
        return f"KeyValueStore({self.topic.short}, {holds})"

    def _repr_html_(self) -> str:
        return f"<span title='{html.escape(self.topic.name, quote=True)}'>{html.escape(repr(self))}</span>"

    def __reduce__(self) -> tuple[type[KeyValueStore[V]], tuple[Topic[V]]]:
        return type(self), (self.topic,)

    __hash__ = object.__hash__  # a Mapping has none; this one is no value

    # -- inside ----------------------------------------------------------------------------------------------------

    def _missing(self, key: str, default: Any) -> Any:
        """What a read answers that found nothing."""
        if not self._loaded:
            self._check()
        if (found := self._contents.unreadable.get(key)) is not None:
            error = found.error
            raise PoisonRecord(error.topic, error.partition, error.offset, error.reason)
        return self._entries.get(key, default)  # it may have become readable between the two looks

    def _check(self) -> None:
        self._check_open()
        if not self._loaded:
            raise StoreNotReady(f"store {self.topic.short} is not loaded: call wait_ready() first ({self._trouble})")

    def _check_open(self) -> None:
        if (failure := self._failure) is not None:
            raise type(failure)(str(failure)) from failure

    def _encoded(self, key: str, value: V) -> bytes:
        """A value as it is sent: one of another type would be unreadable for everybody, this store too."""
        if value is None:
            raise LabkitError(f"None is no value for {key!r} in store {self.topic.short}: delete the key instead")
        if whole(self.topic.value) is not None:
            raise LabkitError(f"store {self.topic.short} keeps whole records: send {key!r} with its headers instead")
        try:
            raw = encode(value)
            self._parse(raw)
        except Exception as error:  # of a value type, whose own checks may raise anything
            kind = getattr(self.topic.value, "__name__", self.topic.value)
            raise LabkitError(
                f"a {type(value).__name__} is no value for {key!r} in store {self.topic.short}: write one of the "
                f"type that its topic has, {kind} ({error_text(error)})"
            ) from error
        return raw

    def _write(self, records: list[tuple[str, bytes | None]], timeout: float) -> None:
        """Write records and wait for them. A key goes where it lies, even if another client's partitioner has put it
        there; a new one goes where ours says (-1). Only a tombstone goes wherever the key lies."""
        self._check_open()
        with self._lock:
            places = self._contents.places
            sends = [
                (key, value, partition)
                for key, value in records
                for partition in (places(key) or (-1,))[: None if value is None else 1]
            ]
            write = _Write(len(sends))
            self._producer = producer = self._producer or Producer(self.topic.cluster, reports=True)
            self._writes.append(write)
        try:
            for key, value, partition in sends:
                producer.send(self.topic.name, value, key, partition=partition, on_delivery=write.told)
            done = write.done.wait(timeout)
        finally:
            with self._lock:
                self._writes.remove(write)
        self._check_open()
        what = f"{records[0][0]!r} in store {self.topic.short}" if len(records) == 1 else f"store {self.topic.short}"
        if write.refused is not None:
            raise DeliveryFailed(f"the write to {what} was refused: {write.refused}")
        if done:
            return
        if len(write.confirmed) < write.records:
            why = "is the broker up? It may still take effect: read it before you write again"
        else:
            why = "the broker has it, but an open transaction on the topic keeps it from being read"
        raise DeliveryFailed(f"the write to {what} was not confirmed within {timeout:g} s: {why}")

    def _end(self, why: LabkitError) -> None:
        """Nothing is read or written from now on; everybody who waits hears of it."""
        with self._lock:
            self._failure = self._failure or why
            self._loaded, self._entries = False, {}
            self._known.set()
            for write in self._writes:
                write.done.set()
            for subscription in self._subscriptions:
                subscription.close()

    def _end_in_fork(self) -> None:
        """A forked process has no thread that follows the topic: what it reads would stay as it was.

        The locks are made anew: threads that are not there may hold those of before.
        """
        self._lock, self._known, self._writes = threading.Lock(), threading.Event(), []
        for subscription in self._subscriptions:
            subscription._wake = threading.Condition()
        short = self.topic.short
        self._end(
            StoreClosed(
                f"store {short} belongs to the process that this one was forked from, and would not follow its topic "
                "here: make another one, KeyValueStore(store.topic), after the fork"
            )
        )

    # -- the store's thread: it alone reads the topic and changes entries ------------------------------------------

    def _run(self) -> None:
        while self._failure is None:
            try:
                keeps = self._check_topic()
                with Reader(self.topic) as reader:
                    self._follow(reader, keeps, self._load(reader, keeps))
            except ClientRefused as error:
                self._end(error)
            except ClusterUnreachable as error:
                self._trouble = str(error)  # it comes back, and loading begins anew
                time.sleep(TURN)  # who is refused at once must not ask again at once
            except LabkitError as error:
                self._end(error)
            except Exception as error:  # a thread has nobody to raise to; who reads next is told
                self._end(LabkitError(f"store {self.topic.short} ended: {error_text(error)}"))

    def _check_topic(self) -> float:
        """How long the topic keeps tombstones, in seconds. Raises TopicMismatch for one that cannot hold a store."""
        cluster, name, short = self.topic.cluster, self.topic.name, self.topic.short
        config = cluster.topic_config(name)
        if (policy := config["cleanup.policy"]) != "compact":
            raise TopicMismatch(
                f"topic {short} cannot hold a store: with cleanup.policy={policy} Kafka deletes what is old, the "
                "latest value of a key too. Make it with cleanup.policy=compact; in a lab: lab.topic(…, compacted=True)"
            )
        if (there := cluster.topics().get(name)) is None:
            raise self._unlisted()
        if there != self.topic.partitions:
            raise TopicMismatch(f"topic {short} has {there} partitions, not {self.topic.partitions}: use that number")
        self._id = self._id or cluster.topic_id(name)  # that of the first time: one made anew is another topic
        return max(1.0, int(config["delete.retention.ms"]) / 1000)

    def _load(self, reader: Reader[V], keeps: float) -> float:
        """Read the topic to the end that it has now, and show it. Returns when it began; 0 if all is to be read again.

        Up to the end of what is not committed, too: only behind it one knows what becomes of that.
        """
        began, ends = time.time(), self._ends()
        contents: Contents[V] = Contents(self.topic.value, self._timed)
        while left := _behind(reader.positions(), ends):
            self._trouble = f"{left:,} records are to be read; if that stands still, a transaction on the topic is open"
            contents.apply(reader.messages(TURN))
            if self._failure is not None or self._goes_by_time(contents):
                return 0.0
        if time.time() - began > keeps:
            self._trouble = f"reading it takes longer than its delete.retention.ms ({keeps:g} s): set that higher"
            return 0.0
        with self._lock:
            if self._failure is None:
                if self._subscriptions:
                    self._tell(differences(self._entries, contents.entries))
                self._entries, self._contents, self._positions = contents.entries, contents, reader.positions()
                self.loads += 1
                self._loaded = True
                self._known.set()
        if scattered := self.scattered:
            (key, places), *more = scattered.items()
            log.warning(
                "store %s: key %r%s lies in partitions %s. The record with the latest timestamp counts. Another client "
                "puts keys elsewhere than labkit and Java: give it the setting partitioner=murmur2_random. Then write "
                "the entries to a topic of another name: once Kafka has forgotten that a key was deleted in one "
                "partition, its value in the other one is back. store.scattered names the keys",
                self.topic.short,
                key,
                f", as {len(more):,} more," if more else "",
                " and ".join(map(str, places)),
            )
        return began

    def _goes_by_time(self, contents: Contents[V]) -> bool:
        """Whether all is to be read again, and timestamps to be looked at: what is in memory has none to compare."""
        self._timed |= contents.unsure
        return contents.unsure

    def _follow(self, reader: Reader[V], keeps: float, fresh: float) -> None:
        """Take in what comes. `fresh` is when this store was last known to have all there was.

        Returns when all is to be read again: a tombstone may have come and gone unseen, after a time without Kafka, or
        one in which this process stood still; or a key came from a second partition.
        """
        with _Look(self._ends, min(LOOK, keeps / 4)) as look:
            while self._failure is None and time.time() - fresh <= keeps:
                fresh = max(fresh, look.all_was_read(self._positions))
                self._take(reader)
                if self._goes_by_time(self._contents):
                    return

    def _take(self, reader: Reader[V]) -> None:
        if messages := reader.messages(BUSY_TURN if self._writes else TURN):
            with self._lock:
                self._tell(self._contents.follow(messages, bool(self._subscriptions)))
            if self._contents.unsure:
                return  # not all of these were taken in: who waits for one of them waits for the next load
        self._positions = reader.positions()
        if self._producer is not None:
            self._producer.poll()
            for write in list(self._writes):
                write.settle(self._positions)

    def _ends(self) -> dict[Place, int]:
        """The topic's ends. Raises TopicMissing when it was deleted: the client would wait for ever, without a word.

        TopicMismatch when it has more partitions than it had: the client would not even look at them.
        """
        read, ends = self._positions, end_offsets(self.topic.cluster, [self.topic.name])
        if not ends:
            raise self._unlisted()
        if any(at > ends.get(place, 0) for place, at in read.items()):
            raise self._unlisted()
        if len(ends) > self.topic.partitions:
            # To read them too would not do: keys have moved there, and of two records in two partitions nobody knows
            # which is the newer one.
            raise TopicMismatch(
                f"topic {self.topic.short} was given more partitions, {len(ends)} instead of {self.topic.partitions}: "
                "its keys belong elsewhere now, and an old value may hide a new one. Write its entries to a topic of "
                "another name, and give the partitions of that one when it is made"
            )
        return ends

    def _unlisted(self) -> LabkitError:
        """One that was just made may be known already and be listed a moment later. One whose broker just came back
        may even end where it did some seconds before: that alone tells of no deletion."""
        with suppress(TopicMissing):
            if self._id in (None, self.topic.cluster.topic_id(self.topic.name)):
                return ClusterUnreachable(f"topic {self.topic.short} is not all at {self.topic.cluster.bootstrap} yet")
        return TopicMissing(f"topic {self.topic.short} was deleted: a store needs one of another name")

    def _tell(self, changes: Changes[V]) -> None:
        if changes:
            for subscription in self._subscriptions:
                subscription._note(changes)


_stores: WeakSet[KeyValueStore[Any]] = WeakSet()


def _end_all_in_fork() -> None:
    for store in list(_stores):
        store._end_in_fork()


os.register_at_fork(after_in_child=_end_all_in_fork)


class Subscription(Generic[V]):
    """One who follows a store. Ends with the store, or by `close`."""

    def __init__(self, store: KeyValueStore[V], callback: Callback[V]) -> None:
        self.store, self.callback = store, callback
        self.failures = 0
        """How often the callback raised."""
        self._changes: Changes[V] = {}  # not yet told; the newest of each key
        self._telling = False
        self._open = True
        self._wake = threading.Condition()
        threading.Thread(target=self._run, name=f"subscriber of {store.topic.short}", daemon=True).start()

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
                self.failures += 1
                with suppress(Exception):  # of an error whose traceback cannot be had
                    log.exception("a subscriber of store %s failed at %r", self.store.topic.short, key)


class _Look:
    """Looks every so many seconds where the topic ends. In a thread: while Kafka is away an answer takes its time."""

    def __init__(self, ends: Callable[[], dict[Place, int]], every: float) -> None:
        self._ask, self._every = ends, every
        self._seen: tuple[float, dict[Place, int]] | None = None
        self._failure: LabkitError | None = None
        self._stop = threading.Event()

    def all_was_read(self, positions: Mapping[Place, int]) -> float:
        """The last time of which it is known that all there was is read by now. Raises TopicMissing, TopicMismatch."""
        if self._failure is not None:
            raise self._failure
        return self._seen[0] if self._seen is not None and not _behind(positions, self._seen[1]) else 0.0

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name="look at a topic's end", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            asked = time.time()
            try:
                self._seen = asked, self._ask()
            except ClusterUnreachable:
                pass  # it comes back; meanwhile nothing changes
            except LabkitError as error:
                self._failure = error
                return


class _Write:
    """Records that somebody waits for."""

    def __init__(self, records: int) -> None:
        self.records = records
        self.confirmed: list[tuple[int, int]] = []  # partition, offset
        self.refused: str | None = None
        self.done = threading.Event()

    def told(self, refused: str | None, partition: int, offset: int) -> None:
        """What became of one of them."""
        if refused is None:
            self.confirmed.append((partition, offset))
        else:
            self.refused = refused

    def settle(self, positions: Mapping[Place, int]) -> None:
        """It is done once one record was refused, or all are confirmed and were read."""
        if self.refused is not None:
            self.done.set()
        elif len(self.confirmed) == self.records:
            here = {partition: at for (_, partition), at in positions.items()}
            # Of a partition that was added nothing is read: the next look at the topic's ends tells of it.
            if all(here.get(partition, 0) > offset for partition, offset in self.confirmed):
                self.done.set()


def _behind(positions: Mapping[Place, int], ends: Mapping[Place, int]) -> int:
    return sum(max(0, end - positions.get(place, 0)) for place, end in ends.items())
