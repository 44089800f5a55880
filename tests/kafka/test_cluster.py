"""Making topics: what is there already, and what is told when no broker answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient  # type: ignore[attr-defined]
from consuming import fresh_topic

import labkit.kafka.cluster as module
from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.errors import ClusterUnreachable, LabkitError, TopicMismatch, TopicMissing
from labkit.kafka.lag import end_offsets
from labkit.kafka.topics import Topic


class Away:
    """An admin client whose questions end in these errors, one after the other; the last one for ever."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def create_topics(self, topics: Sequence[Any], **_: Any) -> dict[str, Future[None]]:
        return self.fail(topics[0].topic)

    def describe_topics(self, topics: Any, **_: Any) -> dict[str, Future[None]]:
        return self.fail("orders")

    def fail(self, name: str) -> dict[str, Future[None]]:
        future: Future[None] = Future()
        future.set_exception(self.errors.pop(0) if len(self.errors) > 1 else self.errors[0])
        return {name: future}


@pytest.mark.parametrize("error", [TimeoutError(), KafkaException(KafkaError(KafkaError._TIMED_OUT))])
@pytest.mark.parametrize(
    "question",
    [lambda cluster: cluster.create_topic("orders", 1), lambda cluster: cluster.topic_id("orders")],
    ids=["create", "id"],
)
def test_a_broker_that_is_away_is_told_with_topic_and_address(
    monkeypatch: pytest.MonkeyPatch, question: Callable[[Cluster], Any], error: Exception
) -> None:
    monkeypatch.setattr(module, "admin", lambda cluster: Away(error))
    with pytest.raises(ClusterUnreachable, match=r"topic orders: no answer from 127\.0\.0\.1:1.*`labkit status`"):
        question(Cluster("127.0.0.1:1"))


def test_a_topic_that_kafka_refuses_is_told_as_such(cluster: Cluster) -> None:
    with pytest.raises(LabkitError, match="topic no/slash could not be created") as told:
        cluster.create_topic("no/slash", 1)
    assert not isinstance(told.value, ClusterUnreachable)


@pytest.mark.long
def test_a_question_outlives_the_client_that_another_thread_lets_go(cluster: Cluster) -> None:
    """Who gets no answer asks a new client. With the old one, what others had asked it would end as well."""
    topic, begun = fresh_topic(cluster), threading.Event()

    def unanswered(_client: AdminClient) -> None:
        begun.set()
        raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    def ask_in_vain() -> None:
        with suppress(ClusterUnreachable):
            cluster.ask(unanswered, patience=2.0)

    others = [threading.Thread(target=ask_in_vain) for _ in range(8)]
    for one in others:
        one.start()
    assert begun.wait(10)
    asked = 0
    while any(one.is_alive() for one in others):
        cluster.topic_id(topic.name)
        cluster.topic_config(topic.name)
        end_offsets(cluster, [topic.name])
        cluster.groups()
        cluster.create_topic(topic.name, topic.partitions)
        asked += 1
    assert asked


def test_a_topic_is_made_once_the_broker_is_back(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{fresh_topic(cluster).name}.again"
    admin, away = module.admin, [Away(KafkaException(KafkaError(KafkaError._TRANSPORT)))]
    monkeypatch.setattr(module, "admin", lambda cluster: away.pop() if away else admin(cluster))
    cluster.create_topic(name, 2)
    assert cluster.topics()[name] == 2


def test_a_topic_is_made_once_the_broker_knows_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller answers first: until the broker has heard of the topic, it says there is none."""
    name = f"{fresh_topic(cluster).name}.soon"
    admin, unaware = module.admin, [Away(KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)))]

    class Late:
        create_topics = admin(cluster).create_topics

        def describe_topics(self, topics: Any, **options: Any) -> dict[str, Future[Any]]:
            if unaware:
                return unaware.pop().fail(name)
            return admin(cluster).describe_topics(topics, **options)

    monkeypatch.setattr(module, "admin", lambda cluster: Late())
    cluster.create_topic(name, 2)
    assert cluster.topic_id(name)


def test_a_topic_that_is_there_as_asked_is_left_as_it_is(cluster: Cluster) -> None:
    plain = fresh_topic(cluster, 2)
    plain.create()
    compacted = Topic(cluster, f"{plain.name}.compacted", 2, int)
    for _ in range(2):
        compacted.create({"cleanup.policy": "compact"})
    compacted.create()  # nothing asked, nothing compared


@pytest.mark.parametrize(
    ("partitions", "config", "message"),
    [
        (3, {}, "exists with 2 partitions, not 3"),
        (2, {"cleanup.policy": "compact"}, "exists with cleanup.policy delete, not compact"),
    ],
)
def test_a_topic_that_is_there_in_another_way_is_told(
    cluster: Cluster, partitions: int, config: dict[str, str], message: str
) -> None:
    name = fresh_topic(cluster, 2).name
    with pytest.raises(TopicMismatch, match=f"topic {name} {message}"):
        cluster.create_topic(name, partitions, config)


def test_partitions_are_added_once_and_none_is_taken_away(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fresh_topic(cluster, 2).name
    assert cluster.add_partitions(name, 3)
    assert cluster.topics()[name] == 3
    assert not cluster.add_partitions(name, 3)
    with pytest.raises(TopicMismatch, match="3 partitions, not 2, and Kafka takes none away"):
        cluster.add_partitions(name, 2)
    with pytest.raises(TopicMissing):
        cluster.add_partitions(f"{name}.nowhere", 2)
    real = admin(cluster).create_partitions

    def unanswered(*given: Any, **options: Any) -> dict[str, Future[Any]]:
        real(*given, **options)[name].result(10)
        monkeypatch.undo()
        return Away(KafkaException(KafkaError(KafkaError._TRANSPORT))).fail(name)

    monkeypatch.setattr(admin(cluster), "create_partitions", unanswered)
    assert cluster.add_partitions(name, 5)  # asked again: they are there
    assert cluster.topics()[name] == 5
    refused = Away(KafkaException(KafkaError(KafkaError.POLICY_VIOLATION)))
    monkeypatch.setattr(admin(cluster), "create_partitions", lambda *_, **__: refused.fail(name))
    with pytest.raises(LabkitError, match=f"{name} was not given 6 partitions"):
        cluster.add_partitions(name, 6)
