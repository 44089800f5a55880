"""Topics that are there in another way than they are needed, and partitions added: told by name, or read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka.admin import NewPartitions
from consuming import Member, alter, fresh_group, fresh_topic
from processes import wait_until

from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import TopicMismatch
from labkit.kafka.producer import Producer
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import lanes_topic, skips_topic
from labkit.patterns.dead_letters import dead_letters_topic
from labkit.patterns.retries import RetryingConsumer, dead_letter, retry_topics


def add_partitions(topic: Topic[Any], to: int) -> None:
    """Give a topic more partitions, and see that they are there."""
    admin(topic.cluster).create_partitions([NewPartitions(topic.name, to)])[topic.name].result(10)
    wait_until(lambda: topic.cluster.topics()[topic.name] == to, what=f"{to} partitions")


def send(topic: Topic[Any], values: dict[int, Any]) -> None:
    """Send values by partition, through a producer that knows the topic as it is now."""
    sender = Producer(topic.cluster)
    for partition, value in values.items():
        sender.send(topic.name, str(value).encode(), partition=partition)
    sender.flush()


# -- A consumer's own topics


def own_topics(consumer: RetryingConsumer) -> dict[str, Topic[Any]]:
    """They, by what they are for."""
    (main,) = consumer.mains
    replay, retry = consumer.own_topics(main)
    (earlier,) = replace(consumer, retry=retry_topics(0.2)).own_topics(main)[1:]
    kept = {"dead letters": dead_letters_topic(main, consumer.group), "lanes": lanes_topic(main, consumer.group)}
    traces = {"skips": skips_topic(main, consumer.group)}
    return {"replay": replay, "retry": retry, "earlier": earlier, **kept, **traces}


@pytest.mark.parametrize("which", ["retry", "replay", "earlier"])
def test_own_topics_with_more_partitions_than_their_source_are_refused_with_the_fix(
    cluster: Cluster, which: str
) -> None:
    """What lies in the others would wait for ever."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    done: list[int] = []
    consumer = RetryingConsumer(topic, lambda record: done.append(record.value), group, retry=retry_topics(0.1))
    own = own_topics(consumer)[which]
    replace(own, partitions=5).create({"message.timestamp.type": "LogAppendTime"})
    send(own, {number: number for number in range(5)})
    with pytest.raises(TopicMismatch, match=rf"{own.name} has 5 partitions.* may have 2.*Give {topic.name} as many"):
        consumer.prepare()
    with Member(consumer) as member:
        assert isinstance(member.ends(), TopicMismatch)
    assert {name for name in cluster.topics() if topic.name in name} == {topic.name, own.name}  # it has made nothing
    add_partitions(topic, 5)
    with Member(consumer) as member:
        member.journal.wait(lambda: sorted(done) == [0, 1, 2, 3, 4], what="all that waited")


def test_partitions_added_to_a_retry_topic_end_its_consumer_at_the_next_rebalance(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster, 2), fresh_group()
    consumer = RetryingConsumer(topic, print, group, retry=retry_topics(0.1))
    with Member(consumer) as first:
        first.journal.wait_for(Step.ASSIGNED)
        with Member(consumer) as second:
            second.journal.wait_for(Step.ASSIGNED)
            add_partitions(own_topics(consumer)["retry"], 3)
        error = first.ends()
    assert isinstance(error, TopicMismatch)


@pytest.mark.parametrize(
    ("which", "settings", "fix"),
    [
        ("dead letters", {"cleanup.policy": "delete"}, {"cleanup.policy": "compact"}),
        ("lanes", {"cleanup.policy": "compact,delete"}, {"cleanup.policy": "compact"}),
        ("skips", {"retention.ms": "604800000"}, {"retention.ms": "-1"}),
        ("skips", {"retention.ms": "-1", "retention.bytes": "1000000"}, {"retention.bytes": "-1"}),
        ("skips", {"retention.ms": "-1", "cleanup.policy": "compact"}, {"cleanup.policy": "delete"}),
        ("retry", {"message.timestamp.type": "CreateTime"}, {"message.timestamp.type": "LogAppendTime"}),
        ("earlier", {}, {"message.timestamp.type": "LogAppendTime"}),
        ("replay", {}, {"message.timestamp.type": "LogAppendTime"}),
        (
            "retry",
            {"message.timestamp.type": "LogAppendTime", "cleanup.policy": "compact"},
            {"cleanup.policy": "delete"},
        ),
        ("retry", {"message.timestamp.type": "LogAppendTime", "retention.ms": "5000"}, {"retention.ms": "-1"}),
    ],
)
def test_own_topics_with_other_settings_are_refused_with_the_fix(
    cluster: Cluster, which: str, settings: dict[str, str], fix: dict[str, str]
) -> None:
    consumer = RetryingConsumer(fresh_topic(cluster), print, fresh_group(), retry=retry_topics(10))
    own = own_topics(consumer)[which]
    own.create(settings)
    told = ",".join(f"{name}={value}" for name, value in fix.items())
    with pytest.raises(TopicMismatch, match=rf"{own.name} has .*--topic {own.name} --add-config {told}`"):
        consumer.prepare()
    alter(own, fix)
    consumer.prepare()


@pytest.mark.parametrize("which", ["dead letters", "lanes"])
def test_a_topic_that_keeps_a_store_has_one_partition(cluster: Cluster, which: str) -> None:
    consumer = RetryingConsumer(fresh_topic(cluster, 3), print, fresh_group(), retry=dead_letter())
    own = own_topics(replace(consumer, retry=retry_topics(1)))[which]
    replace(own, partitions=3).create({"cleanup.policy": "compact"})
    with pytest.raises(TopicMismatch, match=rf"{own.name} has 3 partitions, and may have 1.*delete it"):
        consumer.prepare()
    cluster.delete_topics([own.name])
    consumer.prepare()
