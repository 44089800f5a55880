"""A topic with the type of its values: what producers send to and consumers read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import DeliveryFailed, LabkitError, TopicMismatch
from labkit.kafka.producer import Headers, deliver, producer
from labkit.kafka.records import T, encode


def short_name(name: str) -> str:
    """The name of a topic, a partition or a record without the lab's namespace: what pictures and messages show."""
    return name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Topic(Generic[T]):
    """The coordinates of a topic: plain data, so it can travel to a pod. `value` is the type its values decode to."""

    cluster: Cluster
    name: str
    partitions: int
    value: type[T]

    @property
    def short(self) -> str:
        """Its name without the lab's namespace."""
        return short_name(self.name)

    def create(self, config: Mapping[str, str] | None = None) -> None:
        """Make the topic unless it is there. Raises TopicMismatch when it is there in another way."""
        self.cluster.create_topic(self.name, self.partitions, config)

    def send(
        self, value: T | None, key: str | None = None, headers: Headers | None = None, partition: int = -1
    ) -> None:
        """Queue one record through the process's producer; `flush` confirms it. A `None` value is a tombstone. The key
        says which partition it goes to, unless `partition` does.

        In a handler the record is held until the handler has returned, and is confirmed before the commit: no flush is
        needed. Exactly once, it goes out in one transaction with the offset. A record that cannot be sent raises here,
        so the handler fails. If the broker refuses it later, the consumer ends with DeliveryFailed and does not commit,
        because nobody knows any more which record caused it. (Exactly once, that record is set aside.)
        """
        producer(self.cluster).send(self.name, None if value is None else encode(value), key, headers, partition)

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until everything this process sent is confirmed. Raises DeliveryFailed."""
        with self._explaining():
            producer(self.cluster).flush(timeout)

    def deliver(self, records: Iterable[tuple[T | None, str | None, Headers | None]], timeout: float = 30.0) -> None:
        """Send these (value, key, headers), and wait until each of them is confirmed, whatever else the process sends.

        Raises DeliveryFailed when some were refused, or not confirmed within `timeout` seconds: those may still arrive.
        """
        raw = ((None if value is None else encode(value), key, headers) for value, key, headers in records)
        with self._explaining():
            deliver(self.cluster, self.name, raw, timeout)

    def check_compacted(self, purpose: str) -> dict[str, str]:
        """Its settings. Raises TopicMismatch unless it is compacted, and has as many partitions as this says;
        TopicMissing, ClusterUnreachable."""
        config = self.cluster.topic_config(self.name)
        if (policy := config["cleanup.policy"]) != "compact":
            raise TopicMismatch(
                f"topic {self.short} cannot {purpose}: with cleanup.policy={policy} Kafka deletes what is old, the "
                "latest value of a key too. Make it with cleanup.policy=compact; in a lab: lab.topic(…, compacted=True)"
            )
        there = self.cluster.topics().get(self.name)
        if there and there != self.partitions:
            raise TopicMismatch(f"topic {self.short} has {there} partitions, not {self.partitions}: use that number")
        return config

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Add to a failed delivery what the client does not say: that too few replicas are in sync."""
        try:
            yield
        except DeliveryFailed as error:
            if why := self._lacks_replicas():
                raise DeliveryFailed(f"{error}. {why}") from error
            raise

    def _lacks_replicas(self) -> str:
        """Which partition has too few, and what to do. Empty if none has, or if Kafka does not answer at once."""
        with suppress(LabkitError):
            found = self.cluster.partitions(self.name, at_once=True)
            least = int(self.cluster.topic_config(self.name)["min.insync.replicas"])
            for number, one in found.items():
                if len(one.in_sync) < least:
                    has = f"{self.short}/{number} has {len(one.in_sync)} of {len(one.replicas)} replicas in sync"
                    fix = "recover the brokers that are away, or lower that setting"
                    return f"{has}, and its min.insync.replicas is {least}: {fix}"
        return ""

    def __repr__(self) -> str:
        many = "1 partition" if self.partitions == 1 else f"{self.partitions} partitions"
        return f"Topic({self.short}, {many} of {getattr(self.value, '__name__', self.value)})"
