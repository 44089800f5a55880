"""Reading a topic without a group: from its beginning, every partition, those too that are added, nothing committed.

Audits, counts and stores read this way: what they see does not depend on who else reads.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Generic, cast

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from labkit.closing import Closing
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import ClusterUnreachable, PoisonRecord, RecordsDeleted, TopicMissing
from labkit.kafka.lag import end_offsets, stable_offsets, start_offsets
from labkit.kafka.records import Message, Record, T, decoder
from labkit.kafka.topics import Topic

_GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_ID)
_BATCH = 2000  # records taken at once, if they are there
LOOK = 0.3  # seconds to wait for how many partitions there are


def has_records(topic: Topic[Any], partition: int, start: int, end: int, timeout: float = 5.0) -> bool:
    """Whether anybody is handed a committed record between two offsets. Markers of transactions, and what was aborted
    or compacted away, nobody is. True also if it cannot be told."""
    own = {"group.id": f"labkit-reader-{uuid.uuid4().hex}", "enable.auto.commit": False, "enable.partition.eof": True}
    client = Client(topic.cluster.config({**own, "isolation.level": "read_committed", "fetch.wait.max.ms": 100}))
    try:
        client.assign([TopicPartition(topic.name, partition, start)])
        message = client.poll(timeout)  # a record, or the end: with its offset
        return message is None or (message.offset() or -1) < end
    finally:
        client.close()


def read_all(cluster: Cluster, topics: Collection[str], value: type[T], timeout: float = 3.0) -> list[Record[T]]:
    """The records of many small topics, by one client. Left out is what does not decode, a topic that is gone, and what
    Kafka does not give within `timeout` seconds. Raises ClusterUnreachable."""
    left = {place: end for place, end in end_offsets(cluster, [*topics]).items() if end}
    own = {"group.id": f"labkit-reader-{uuid.uuid4().hex}", "enable.auto.commit": False, "enable.partition.eof": True}
    client = Client(cluster.config({**own, "auto.offset.reset": "earliest", "fetch.wait.max.ms": 10}))
    decode, until, found = decoder(value), time.monotonic() + timeout, []
    try:
        client.assign([TopicPartition(*place, 0) for place in left])
        while left and time.monotonic() < until:
            for message in cast(list[Message], client.consume(_BATCH, 0.02)):
                if message.error() is None:
                    with suppress(PoisonRecord):
                        found.append(decode(message))
                elif message.error().code() != KafkaError._PARTITION_EOF:
                    continue
                place = message.topic(), message.partition()
                if place in left and message.offset() >= left[place] - 1:
                    del left[place]
    finally:
        client.close()
    return found


class Reader(Closing, Generic[T]):
    """Reads one topic from its beginning on. Not for use by several threads at once.

    With `committed=False` it also sees records of transactions that are open, or were aborted. `partitions` are those
    that it begins with: all, if none are named.

    With `starts` it begins at these offsets, by partition, and not at the beginning. Then it raises RecordsDeleted when
    Kafka deletes records before they were read.
    """

    def __init__(
        self,
        topic: Topic[T],
        committed: bool = True,
        partitions: Iterable[int] | None = None,
        starts: Mapping[int, int] | None = None,
    ) -> None:
        self.topic = topic
        self.poison: list[PoisonRecord] = []
        """Records that did not decode, passed over."""
        self._decode = decoder(topic.value)
        self._client = Client(
            topic.cluster.config(
                {
                    "group.id": f"labkit-reader-{uuid.uuid4().hex}",  # the client wants one; it joins no group
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "earliest" if starts is None else "error",
                    "isolation.level": "read_committed" if committed else "read_uncommitted",
                    "fetch.queue.backoff.ms": 1,
                    "queued.min.messages": 300_000,  # with less, the client pauses between fetches
                    "fetch.wait.max.ms": 100,
                    "topic.metadata.refresh.interval.ms": 1000,
                }
            )
        )
        self._partitions: list[int] = []
        self._starts = starts or {}
        self._read(range(topic.partitions) if partitions is None else partitions)

    def poll(self, timeout: float) -> list[Record[T]]:
        """What is there: waits at most `timeout` seconds for a first record.

        Raises TopicMissing when the topic was deleted.
        """
        return list(self._records(self.messages(timeout)))

    def messages(self, timeout: float) -> list[Message]:
        """The same, not decoded."""
        found = self._client.consume(1, timeout)
        if found:
            found += self._client.consume(_BATCH, 0)
        messages = cast(list[Message], found)
        if [message for message in messages if message.error() is not None]:  # faster than `any`, by record
            return [message for message in messages if self._is_record(message)]
        return messages

    def positions(self) -> dict[tuple[str, int], int]:
        """The offset that is read next, for each (topic, partition).

        It also passes commit markers, aborted and compacted records, which no one is handed.
        """
        whole = [TopicPartition(self.topic.name, number) for number in self._partitions]
        return {(one.topic, one.partition): max(one.offset, 0) for one in self._client.position(whole)}

    def look(self) -> None:
        """Go on in partitions too that were added to the topic. While the broker is away, nothing is known of any."""
        with suppress(KafkaException):
            self._read(self._client.list_topics(self.topic.name, LOOK).topics[self.topic.name].partitions)

    def read_to_end(self, timeout: float = 30.0) -> list[Record[T]]:
        """Everything up to the end the topic has now, in partitions too that were added to it.

        Raises ClusterUnreachable when that takes too long.
        """
        self._read(number for _, number in end_offsets(self.topic.cluster, [self.topic.name]))
        return [record for messages in self.messages_to_end(timeout) for record in self._records(messages)]

    def messages_to_end(self, timeout: float) -> Iterator[list[Message]]:
        """Messages, not decoded, up to the end that its partitions have now. No list of them is waited for long: some
        are empty.

        The end is that of what is not committed, too: who got there has seen all that was committed before. Raises
        ClusterUnreachable when that takes too long.
        """
        ends = end_offsets(self.topic.cluster, [self.topic.name])
        starts = start_offsets(self.topic.cluster, [self.topic.name])
        # Where retention has deleted everything no record will ever come, and the position stays where it was.
        here = self.positions()
        ends = {place: end for place, end in ends.items() if place in here and end > starts.get(place, 0)}
        until = time.monotonic() + timeout
        while self._behind(ends):
            if time.monotonic() > until:
                raise ClusterUnreachable(
                    f"topic {self.topic.short} could not be read to its end within {timeout:g} s: {self._why_not(ends)}"
                )
            yield self.messages(0.1)

    @property
    def undecodable(self) -> str | None:
        """What it has skipped so far, in words."""
        if not self.poison:
            return None
        first, short = self.poison[0], self.topic.short
        many = "1 record" if len(self.poison) == 1 else f"{len(self.poison):,} records"
        does = "does" if len(self.poison) == 1 else "do"
        return f"{many} of {short} {does} not decode: {short}/{first.partition}/{first.offset}: {first.reason}"

    def close(self) -> None:
        self._client.close()

    def _read(self, partitions: Iterable[int]) -> None:
        """Read these partitions; new ones from their start position."""
        new = [number for number in partitions if number not in self._partitions]
        if new:
            starts = [TopicPartition(self.topic.name, number, self._starts.get(number, 0)) for number in new]
            self._client.incremental_assign(starts)
            self._partitions += new

    def _behind(self, ends: dict[tuple[str, int], int]) -> bool:
        here = self.positions()
        return any(here[place] < end for place, end in ends.items())

    def _why_not(self, ends: dict[tuple[str, int], int]) -> str:
        here, stable = self.positions(), stable_offsets(self.topic.cluster, [self.topic.name])
        held = [place for place, end in ends.items() if stable.get(place, end) <= here[place] < end]
        if not held:
            return "is the broker up? `labkit status` tells; if it is, allow more time"
        _, number = held[0]
        return f"an open transaction holds back partition {number}: its producer has to end it, or its timeout does"

    def _records(self, messages: list[Message]) -> Iterator[Record[T]]:
        for message in messages:
            try:
                yield self._decode(message)
            except PoisonRecord as poison:
                self.poison.append(poison)

    def _is_record(self, message: Message) -> bool:
        error: Any = message.error()
        if error is None:
            return True
        if error.code() in _GONE:
            raise TopicMissing(f"topic {self.topic.short} ({self.topic.name}) was deleted while it was read")
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise RecordsDeleted(
                f"Kafka deleted records of topic {self.topic.short} before they were read: {error.str()}"
            )
        if error.fatal() or error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise KafkaException(error)
        return False  # a broker that is away comes back by itself
