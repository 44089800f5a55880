"""Lag: how many records a consumer group has still to finish, read from the broker itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any

from confluent_kafka import Consumer as Client
from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from labkit.kafka.clients import forget, kept
from labkit.kafka.cluster import ANSWER, Cluster

ASKERS = 64  # groups whose offsets are asked for in turn, each by a client that is kept: more than a lab has
_BEGINNING: OffsetSpec = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
_END: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]
_NEWEST: OffsetSpec = OffsetSpec.max_timestamp()  # type: ignore[no-untyped-call]


def lag(cluster: Cluster, group: str, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """Records that the group has still to read, for each (topic, partition) of `topics`.

    These are the records from its committed offset to the end. Without a committed offset, or with one outside the
    topic's range, the group reads from the beginning, so all records count. Raises ClusterUnreachable.
    """
    partitions = _partitions(cluster, topics)
    committed = _committed(cluster, group, partitions)
    ends = offsets(cluster, partitions, _END)
    behind = [place for place in partitions if committed.get(place) != ends[place]]
    starts = offsets(cluster, behind, _BEGINNING) if behind else {}
    found = dict.fromkeys(partitions, 0)
    for place, start in starts.items():
        at = committed.get(place, start)
        found[place] = max(0, ends[place] - (at if start <= at <= ends[place] else start))
    return found


def newest_records(cluster: Cluster, topics: Collection[str]) -> dict[str, float]:
    """When the newest record of each of these topics was sent, in Unix seconds, by its sender's clock. A topic without
    records has none. Raises ClusterUnreachable."""
    wanted = {TopicPartition(*place): _NEWEST for place in _partitions(cluster, topics)}
    if not wanted:
        return {}

    def asked(client: AdminClient) -> dict[str, float]:
        found: dict[str, float] = {}
        for one, future in client.list_offsets(wanted, request_timeout=ANSWER).items():
            if (answer := _answer(future)) is not None and answer.timestamp > 0:
                found[one.topic] = max(found.get(one.topic, 0.0), answer.timestamp / 1000)
        return found

    return cluster.ask(asked)


def committed_offsets(
    cluster: Cluster, group: str, topics: Collection[str] | None = None
) -> dict[tuple[str, int], int]:
    """What the group has committed, in these topics or in all: the next offset it would read, for each (topic,
    partition)."""
    return _committed(cluster, group, _partitions(cluster, topics))


def _partitions(cluster: Cluster, topics: Collection[str] | None) -> list[tuple[str, int]]:
    """The partitions of these topics, or of all; none of a topic that does not exist."""
    found = cluster.topics().items()
    return [(name, number) for name, count in found if topics is None or name in topics for number in range(count)]


def _committed(cluster: Cluster, group: str, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
    if not partitions:
        return {}
    places = [TopicPartition(topic, number) for topic, number in partitions]

    def committed(_admin: AdminClient) -> list[TopicPartition]:
        try:
            answer = kept(_asker, cluster, group, most=ASKERS).committed(places, timeout=2 * ANSWER)
            if errors := [one.error for one in answer if one.error is not None]:
                raise KafkaException(errors[0])  # an error is not "nothing committed"
        except KafkaException:
            forget(cluster, _asker)  # after a restart an old client may go on asking the former coordinator
            raise
        return answer

    answer = cluster.ask(committed, patience=4 * ANSWER)
    return {(one.topic, one.partition): one.offset for one in answer if one.offset >= 0}


def _asker(cluster: Cluster, group: str) -> Client:
    """A client that joins no group and only asks for offsets. The admin client's own question must not be used: it
    ends the process with a segmentation fault if the coordinator is moving or starting (librdkafka issue 5040).

    It is read_uncommitted: a read_committed client would wait for the end of an open transaction, and a board would
    stand still as long as a pod is frozen in one.
    """
    own = {"group.id": group, "enable.auto.commit": False, "isolation.level": "read_uncommitted"}
    return Client(cluster.config(own))


def end_offsets(cluster: Cluster, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """The offset after the last record, for each (topic, partition)."""
    return offsets(cluster, _partitions(cluster, topics), _END)


def stable_offsets(cluster: Cluster, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """How far committed records can be read, for each (topic, partition): to the first record of an open transaction,
    or to the end."""
    return offsets(cluster, _partitions(cluster, topics), _END, IsolationLevel.READ_COMMITTED)


def offsets(
    cluster: Cluster,
    partitions: Sequence[tuple[str, int]],
    spec: OffsetSpec,
    isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
) -> dict[tuple[str, int], int]:
    """One offset of each partition. A partition whose topic is gone counts as 0."""
    if not partitions:
        return {}
    wanted = {TopicPartition(topic, number): spec for topic, number in partitions}

    def found(client: AdminClient) -> dict[tuple[str, int], int]:
        futures = client.list_offsets(wanted, isolation_level=isolation, request_timeout=ANSWER)
        return {(one.topic, one.partition): _offset(future) for one, future in futures.items()}

    return cluster.ask(found)


def _offset(future: Future[Any]) -> int:
    answer = _answer(future)
    return 0 if answer is None else int(answer.offset)


def _answer(future: Future[Any]) -> Any:
    """What Kafka says of a partition; None if its topic is gone."""
    try:
        return future.result(ANSWER + 1)
    except KafkaException as error:
        if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise
        return None


def start_offsets(cluster: Cluster, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """The offset of the first record still there, for each (topic, partition)."""
    return offsets(cluster, _partitions(cluster, topics), _BEGINNING)
