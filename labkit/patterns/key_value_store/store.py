"""Pattern 3: a key-value store in memory, kept in a compacted topic.

The topic is the store: Kafka keeps the latest value of each key however old it is, whoever wants one reads all of them
into memory, and from then on follows what is written. A read asks nobody. Several processes may have a store on one
topic; each of them may write. Where another client's partitioner has put a key into a second partition, the newer
record counts.

An entry costs some 300 to 500 bytes, its key and value as Python objects included: a million of them, with a Struct of
three fields, took 0.4 GB, and some seconds to load. A data set that is larger than that belongs in a table.
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
    """A mapping from keys to values of the topic's type. It begins to load when it is made.

    Reading is local: it takes no lock, asks no broker, and never goes back to an older value. Reading before the store
    is loaded raises StoreNotReady. A key whose newest record does not decode raises PoisonRecord when it is read, until
    the key is written again; records without a key are passed over. Values are handed out as they are, not
    copied: do not change them.

    It travels to a pod as the coordinates of its topic, and is loaded there anew.
    """

    def __init__(self, topic: Topic[V]) -> None:
        self._parse = parser(topic.value)
        super().__init__(topic)

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
    def unreadable(self) -> dict[str, PoisonRecord]:
        """The keys that cannot be read, and their newest records, which do not decode."""
        return {key: one.error for key, one in self._contents.unreadable.copy().items()}

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
            subscription: Subscription[V] = Subscription(self.topic.short, callback)
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
            write = Write(len(sends))
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
