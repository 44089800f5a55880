"""How a store follows its topic: one thread alone reads the topic and changes entries."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Generic, TypeAlias, TypeVar
from weakref import WeakSet

from labkit.kafka.errors import (
    ClientRefused,
    ClusterUnreachable,
    LabkitError,
    TopicMismatch,
    TopicMissing,
    Unavailable,
    error_text,
)
from labkit.kafka.lag import end_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store.contents import Changes, Contents, differences
from labkit.patterns.key_value_store.subscription import Subscription
from labkit.patterns.periodic_check import PeriodicCheck

V = TypeVar("V")
Partition: TypeAlias = tuple[str, int]

TURN = 0.1  # seconds that a store waits for something new, before it looks whether it was closed
BUSY_TURN = 0.001  # the same, while a write waits to be confirmed
LOOK = 3.0  # seconds from one look at the topic's ends to the next

log = logging.getLogger(__name__)


class StoreNotReady(Unavailable):
    """A store was read before all of its topic was loaded: a key that it lacks may still come."""


class StoreClosed(LabkitError):
    """A store was used after `close`, or in a process that was forked from the one that made it."""


class Follower(Generic[V]):
    """The part of a store that is no mapping: the entries of its topic, and the thread that keeps them up to date."""

    def __init__(self, topic: Topic[V]) -> None:
        self.topic = topic
        self.loads = 0
        """How often the topic was loaded: again if this process was away for longer than Kafka keeps tombstones."""
        # Empty until all is loaded, and again once it has ended: so a read that finds something needs no further look.
        self._entries: dict[str, V] = {}
        self._contents: Contents[V] = Contents(topic.value)
        self._timed = False  # whether its contents go by timestamps: a key was found in two partitions
        self._positions: dict[Partition, int] = {}
        self._id: str | None = None  # the topic's, as Kafka knows it
        self._subscriptions: list[Subscription[V]] = []
        self._writes: list[Write] = []
        self._producer: Producer | None = None
        self._lock = threading.Lock()  # for the lists above, and for the order in which subscribers get changes
        self._loaded = False
        self._known = threading.Event()  # it was loaded, or never will be
        self._trouble = "it has only just begun"
        self._failure: LabkitError | None = None
        _followers.add(self)
        self._thread = threading.Thread(target=self._run, name=f"store {topic.short}", daemon=True)
        self._thread.start()

    @property
    def scattered(self) -> dict[str, tuple[int, ...]]:
        """The keys that lie in more than one partition, with the partitions: clients with different partitioners write
        them. Of the newest records in these partitions, the one with the latest timestamp counts."""
        return {key: tuple(sorted(found)) for key, found in self._contents.scattered.copy().items()}

    def lag(self) -> int:
        """How many records of the topic this store has still to read. Raises ClusterUnreachable."""
        return behind(self._positions, self._ends())

    def _check(self) -> None:
        self._check_open()
        if not self._loaded:
            raise StoreNotReady(f"store {self.topic.short} is not loaded: call wait_ready() first ({self._trouble})")

    def _check_open(self) -> None:
        if (failure := self._failure) is not None:
            raise type(failure)(str(failure)) from failure

    def _end(self, why: LabkitError) -> None:
        """Read and write nothing from now on, and wake everybody who waits."""
        with self._lock:
            self._failure = self._failure or why
            self._loaded, self._entries = False, {}
            self._known.set()
            for write in self._writes:
                write.done.set()
            for subscription in self._subscriptions:
                subscription.close()

    def _end_in_fork(self) -> None:
        """End the store in a forked process, which has no thread that follows the topic: its entries would grow stale.

        The locks are made anew, because threads of the other process may hold the old ones.
        """
        self._lock, self._known, self._writes = threading.Lock(), threading.Event(), []
        for subscription in self._subscriptions:
            subscription._wake = threading.Condition()
        short = self.topic.short
        self._end(
            StoreClosed(
                f"store {short} belongs to the process that this one was forked from, and does not follow its topic "
                "here: make another store, KeyValueStore(store.topic), after the fork"
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
                self._trouble = str(error)  # the cluster comes back, and loading begins anew
                time.sleep(TURN)  # it may have refused at once
            except LabkitError as error:
                self._end(error)
            except Exception as error:  # raised to whoever reads next
                self._end(LabkitError(f"store {self.topic.short} ended: {error_text(error)}"))

    def _check_topic(self) -> float:
        """How long the topic keeps tombstones, in seconds. Raises TopicMismatch if it cannot hold a store."""
        config = self.topic.check_compacted("hold a store")
        # The id of the first time: a topic made anew is another topic.
        self._id = self._id or self.topic.cluster.topic_id(self.topic.name)
        return max(1.0, int(config["delete.retention.ms"]) / 1000)

    def _load(self, reader: Reader[V], keeps: float) -> float:
        """Read the topic to its present end, and show it. Returns when it began; 0 if all must be read again.

        The end is behind open transactions, too: only there it is known what becomes of them.
        """
        began, ends = time.time(), self._ends()
        contents: Contents[V] = Contents(self.topic.value, self._timed)
        while left := behind(reader.positions(), ends):
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
                    self._pass_on(differences(self._entries, contents.entries))
                self._entries, self._contents, self._positions = contents.entries, contents, reader.positions()
                self.loads += 1
                self._loaded = True
                self._known.set()
        if scattered := self.scattered:
            (key, found), *more = scattered.items()
            log.warning(
                "store %s: key %r%s lies in partitions %s. The record with the latest timestamp counts. Another client "
                "puts keys elsewhere than labkit and Java: give it the setting partitioner=murmur2_random. Then write "
                "the entries to a topic of another name: once Kafka has forgotten that a key was deleted in one "
                "partition, its value in the other one is back. store.scattered names the keys",
                self.topic.short,
                key,
                f", as {len(more):,} more," if more else "",
                " and ".join(map(str, found)),
            )
        return began

    def _goes_by_time(self, contents: Contents[V]) -> bool:
        """Whether all must be read again, with timestamps: the entries in memory have none to compare."""
        self._timed |= contents.unsure
        return contents.unsure

    def _follow(self, reader: Reader[V], keeps: float, fresh: float) -> None:
        """Take in what comes. `fresh` is when this store was last known to have all there was.

        Returns when all must be read again, for one of two reasons. A key came from a second partition. Or a tombstone
        may have come and gone unseen, while Kafka was away or this process stood still.
        """
        with PeriodicCheck(lambda: (time.time(), self._ends()), min(LOOK, keeps / 4)) as look:
            while self._failure is None and time.time() - fresh <= keeps:
                fresh = max(fresh, self._all_was_read(look.answer()))
                self._take(reader)
                if self._goes_by_time(self._contents):
                    return

    def _all_was_read(self, seen: tuple[float, dict[Partition, int]] | None) -> float:
        """When the ends were seen, if all before them is read by now; else 0."""
        return seen[0] if seen is not None and not behind(self._positions, seen[1]) else 0.0

    def _take(self, reader: Reader[V]) -> None:
        if messages := reader.messages(BUSY_TURN if self._writes else TURN):
            with self._lock:
                self._pass_on(self._contents.follow(messages, bool(self._subscriptions)))
            if self._contents.unsure:
                return  # not all of these were taken in: writes wait for the next load
        self._positions = reader.positions()
        if self._producer is not None:
            self._producer.poll()
            for write in list(self._writes):
                write.settle(self._positions)

    def _ends(self) -> dict[Partition, int]:
        """The topic's ends. Raises TopicMissing when the topic was deleted: the client would wait for ever without a
        word. Raises TopicMismatch when partitions were added: the client would never read them.
        """
        read, ends = self._positions, end_offsets(self.topic.cluster, [self.topic.name])
        if not ends:
            raise self._unlisted()
        if any(at > ends.get(partition, 0) for partition, at in read.items()):
            raise self._unlisted()
        if len(ends) > self.topic.partitions:
            # To read these too would not help. Keys have moved there, and nobody knows which of two records in two
            # partitions is the newer one.
            raise TopicMismatch(
                f"topic {self.topic.short} was given more partitions, {len(ends)} instead of {self.topic.partitions}: "
                "its keys belong elsewhere now, and an old value may hide a new one. Write its entries to a topic of "
                "another name, and give the partitions of that one when it is made"
            )
        return ends

    def _unlisted(self) -> LabkitError:
        """The error for a topic that is not listed, or that ends too early. Neither proves that it was deleted: Kafka
        lists a new topic a moment later than it knows it, and a broker that has just come back may show old ends."""
        with suppress(TopicMissing):
            if self._id in (None, self.topic.cluster.topic_id(self.topic.name)):
                return ClusterUnreachable(f"topic {self.topic.short} is not all at {self.topic.cluster.bootstrap} yet")
        return TopicMissing(f"topic {self.topic.short} was deleted: a store needs one of another name")

    def _pass_on(self, changes: Changes[V]) -> None:
        if changes:
            for subscription in self._subscriptions:
                subscription._note(changes)


_followers: WeakSet[Follower[Any]] = WeakSet()


def _end_all_in_fork() -> None:
    for follower in list(_followers):
        follower._end_in_fork()


os.register_at_fork(after_in_child=_end_all_in_fork)


class Write:
    """Records that a caller has sent and waits for."""

    def __init__(self, records: int) -> None:
        self.records = records
        self.confirmed: list[tuple[int, int]] = []  # partition, offset
        self.refused: str | None = None
        self.done = threading.Event()

    def on_delivery(self, refused: str | None, partition: int, offset: int) -> None:
        """The broker has stored one of the records, or refused it."""
        if refused is None:
            self.confirmed.append((partition, offset))
        else:
            self.refused = refused

    def settle(self, positions: Mapping[Partition, int]) -> None:
        """Wake the caller once one record was refused, or once all are confirmed and the store has read them."""
        if self.refused is not None:
            self.done.set()
        elif len(self.confirmed) == self.records:
            here = {partition: at for (_, partition), at in positions.items()}
            # A partition that was added is never read: the next look at the topic's ends raises.
            if all(here.get(partition, 0) > offset for partition, offset in self.confirmed):
                self.done.set()


def behind(positions: Mapping[Partition, int], ends: Mapping[Partition, int]) -> int:
    return sum(max(0, end - positions.get(partition, 0)) for partition, end in ends.items())
