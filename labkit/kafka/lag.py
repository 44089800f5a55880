"""Lag: how many records a consumer group has still to finish, read from the broker itself."""

from __future__ import annotations

from collections.abc import Sequence

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.errors import ClusterUnreachable

_BEGINNING: OffsetSpec = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
_END: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]


def lag(cluster: Cluster, group: str, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """Records between the group's committed offset and the end, for each (topic, partition) of `topics`.

    A partition the group never committed counts from its beginning. Raises ClusterUnreachable.
    """
    committed = committed_offsets(cluster, group)
    partitions = [
        (name, number) for name, count in cluster.topics().items() if name in topics for number in range(count)
    ]
    ends = offsets(cluster, partitions, _END)
    unknown = [place for place in partitions if place not in committed]
    starts = offsets(cluster, unknown, _BEGINNING) if unknown else {}
    return {place: max(0, ends[place] - committed.get(place, starts.get(place, 0))) for place in partitions}


def committed_offsets(cluster: Cluster, group: str) -> dict[tuple[str, int], int]:
    """What the group has committed: the next offset it would read, for each (topic, partition)."""
    try:
        request = [ConsumerGroupTopicPartitions(group)]
        answer = admin(cluster).list_consumer_group_offsets(request, request_timeout=10)[group].result(11)
    except (KafkaException, TimeoutError) as error:
        raise ClusterUnreachable(f"no answer from {cluster.bootstrap} about group {group}: {error}") from error
    return {(one.topic, one.partition): one.offset for one in answer.topic_partitions if one.offset >= 0}


def end_offsets(cluster: Cluster, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """The offset after the last record, for each (topic, partition)."""
    partitions = [
        (name, number) for name, count in cluster.topics().items() if name in topics for number in range(count)
    ]
    return offsets(cluster, partitions, _END)


def offsets(cluster: Cluster, partitions: Sequence[tuple[str, int]], spec: OffsetSpec) -> dict[tuple[str, int], int]:
    """One offset of each partition. A partition whose topic is gone counts as 0."""
    if not partitions:
        return {}
    try:
        futures = admin(cluster).list_offsets(
            {TopicPartition(topic, number): spec for topic, number in partitions}, request_timeout=10
        )
        return {(one.topic, one.partition): int(future.result(11).offset) for one, future in futures.items()}
    except (KafkaException, TimeoutError) as error:
        raise ClusterUnreachable(f"no answer from {cluster.bootstrap}: {error}") from error


def start_offsets(cluster: Cluster, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """The offset of the first record still there, for each (topic, partition)."""
    partitions = [
        (name, number) for name, count in cluster.topics().items() if name in topics for number in range(count)
    ]
    return offsets(cluster, partitions, _BEGINNING)
