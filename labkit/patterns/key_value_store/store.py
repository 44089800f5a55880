"""Pattern 3: a key-value store in memory, kept in a compacted topic.

The topic is the store: Kafka keeps the latest value of each key, however old it is. A store reads all of them into
memory, and from then on follows what is written. So a read asks nobody. Several processes may have a store on one
topic, and each of them may write. If another client's partitioner has put a key into a second partition, the newer
record counts.

An entry takes 300 to 500 bytes, its key and value as Python objects included. A million entries, with a Struct of three
fields, took 0.4 GB, and some seconds to load. A larger data set belongs in a table.
"""

from __future__ import annotations

import threading
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any, Self, TypeVar, overload

from labkit.kafka.consumer.steps import Measured
from labkit.kafka.errors import DeliveryFailed, LabkitError, PoisonRecord, error_text
from labkit.kafka.producer import Producer
from labkit.kafka.records import encode, parser, whole
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store.follower import Follower, StoreClosed, StoreNotReady, Write
from labkit.patterns.key_value_store.subscription import Callback, Subscription

V = TypeVar("V")
D = TypeVar("D")

PATIENCE = 30.0  # seconds for a store to be loaded
CONFIRM = 10.0  # seconds for a write to be confirmed


class KeyValueStore(Follower[V], Mapping[str, V]):
    """A mapping from keys to values of the topic's type. A store begins to load when it is made.

    Reading is local: it takes no lock, asks no broker, and never goes back to an older value. Reading before the store
    is loaded raises StoreNotReady. Reading a key whose newest record does not decode raises PoisonRecord, until the key
    is written again. Records without a key are passed over. Values are not copied: do not change them.

    A store travels to a pod as its topic, and is loaded there anew.
    """

    def __init__(self, topic: Topic[V]) -> None:
        self._parse = parser(topic.value)
        super().__init__(topic)

    # -- reading ---------------------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float = PATIENCE) -> Self:
        """Wait until the store is loaded.

        Raises StoreNotReady, which says what the store waits for; TopicMismatch when the topic is not compacted or has
        another number of partitions; TopicMissing; ClientRefused; StoreClosed.
        """
        if not self._known.wait(timeout):
            raise StoreNotReady(f"store {self.topic.short} was not loaded within {timeout:g} s: {self._trouble}")
        self._check()
        return self

    @property
    def ready(self) -> bool:
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
        """A copy of all entries at one moment. Iterating goes over such a copy, too."""
        self._check()
        return self._entries.copy()

    def values(self) -> ValuesView[V]:
        return self.snapshot().values()

    def items(self) -> ItemsView[str, V]:
        return self.snapshot().items()

    @property
    def unreadable(self) -> dict[str, PoisonRecord]:
        """The keys that cannot be read, each with the error of its newest record, which does not decode."""
        return {key: one.error for key, one in self._contents.unreadable.copy().items()}

    def measured(self) -> Measured:
        """The store's figures, to be reported as Step.MEASURED: `<topic> loads`, `<topic> entries`, and `<topic> read`,
        the sum of the offsets up to which the store has read."""
        short = self.topic.short
        gauges = {f"{short} entries": float(len(self._entries)), f"{short} read": float(sum(self._positions.values()))}
        return Measured({f"{short} loads": self.loads}, gauges)

    # -- writing ---------------------------------------------------------------------------------------------------

    def put(self, key: str, value: V, timeout: float = CONFIRM) -> None:
        """Write one entry. Returns once the broker has it and this store shows it. Of two writers the last one wins.

        Raises DeliveryFailed when the broker refuses it, or does not confirm it within `timeout` seconds: then it may
        still come. Raises LabkitError, before anything is sent, for a value that no store on the topic could read.
        """
        self.update({key: value}, timeout)

    def update(self, entries: Mapping[str, V], timeout: float = CONFIRM) -> None:
        """Write many entries, and wait once. They become visible one after the other. Raises as `put` does."""
        if entries:
            self._write([(key, self._encoded(key, value)) for key, value in entries.items()], timeout)

    def delete(self, key: str, timeout: float = CONFIRM) -> None:
        """Delete an entry, by a record without a value (a tombstone). It need not be there.

        A key that lies in several partitions is deleted in each. Returns and raises as `put` does.
        """
        self._write([(key, None)], timeout)

    # -- following -------------------------------------------------------------------------------------------------

    def subscribe(self, callback: Callback[V]) -> Subscription[V]:
        """Call `callback(key, old, new)` for every entry there is (`old` is None), and from then on at every change.

        `new` is None when the key was deleted. Each subscriber has a thread of its own, so `callback` may take its
        time, or write to this store. If changes come faster, it gets only the newest of each key, and `old` is
        what it got before. What `callback` raises is logged, and the next change follows.
        """
        with self._lock:
            self._check_open()
            subscription: Subscription[V] = Subscription(self.topic.short, callback)
            self._subscriptions = [*(one for one in self._subscriptions if one._open), subscription]
            subscription._note({key: (None, value) for key, value in self._entries.items()})
        return subscription

    def close(self) -> None:
        """Stop following the topic. The entries stay in it, but this store cannot be read. May be called again."""
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

    def __reduce__(self) -> tuple[type[KeyValueStore[V]], tuple[Topic[V]]]:
        return type(self), (self.topic,)

    __hash__ = object.__hash__  # a Mapping has none; this one is no value

    # -- inside ----------------------------------------------------------------------------------------------------

    def _missing(self, key: str, default: Any) -> Any:
        """The answer of a read that found nothing."""
        if not self._loaded:
            self._check()
        if (found := self._contents.unreadable.get(key)) is not None:
            error = found.error
            raise PoisonRecord(error.topic, error.partition, error.offset, error.reason)
        return self._entries.get(key, default)  # the key may have become readable between the two looks

    def _encoded(self, key: str, value: V) -> bytes:
        """A value as it is sent. Raises LabkitError for a value that nobody could read, this store included."""
        if value is None:
            raise LabkitError(f"None is no value for {key!r} in store {self.topic.short}: delete the key instead")
        if whole(self.topic.value) is not None:
            raise LabkitError(f"store {self.topic.short} holds whole records: send {key!r} with its headers instead")
        try:
            raw = encode(value)
            self._parse(raw)
        except Exception as error:  # of a value type, whose own checks may raise anything
            kind = getattr(self.topic.value, "__name__", self.topic.value)
            raise LabkitError(
                f"a {type(value).__name__} is no value for {key!r} in store {self.topic.short}: write a value of "
                f"its topic's type, {kind} ({error_text(error)})"
            ) from error
        return raw

    def _write(self, records: list[tuple[str, bytes | None]], timeout: float) -> None:
        """Write records and wait for them. A record goes to the partition where its key lies, even if another client's
        partitioner has put it there; a new key goes where ours says (-1). A tombstone goes wherever the key lies."""
        self._check_open()
        with self._lock:
            found = self._contents.partitions_of
            sends = [
                (key, value, partition)
                for key, value in records
                for partition in (found(key) or (-1,))[: None if value is None else 1]
            ]
            write = Write(len(sends))
            self._producer = producer = self._producer or Producer(self.topic.cluster, reports=True)
            self._writes.append(write)
        try:
            for key, value, partition in sends:
                producer.send(self.topic.name, value, key, partition=partition, on_delivery=write.on_delivery)
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
            why = "is the broker up? The write may still take effect: read before you write again"
        else:
            why = "the broker has it, but an open transaction on the topic keeps it from being read"
        raise DeliveryFailed(f"the write to {what} was not confirmed within {timeout:g} s: {why}")
