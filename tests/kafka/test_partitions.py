"""Topics that are there in another way than they are needed, and partitions added: told by name, or read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka.admin import NewPartitions
from consuming import Member, alter, fresh_group, fresh_topic, put
from lab_helpers import Order, Shipped, orders
from processes import wait_until

from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import TopicMismatch
from labkit.kafka.producer import Producer
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.lab import Lab
from labkit.patterns.blocked_lanes import lanes_topic, skips_topic
from labkit.patterns.dead_letters import dead_letters_topic
from labkit.patterns.retries import RetryingConsumer, dead_letter, retry_topics
from labkit.runtime.connect import Connection


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


# -- Topics read without a group


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("partitions")
    yield lab
    lab._end(0)


def test_partitions_added_to_a_topic_that_a_lab_reads_are_read(lab: Lab) -> None:
    """What the board counts, and what audit, records and trace find."""
    ordered = lab.topic("orders", 1, Order)
    shipped = lab.topic("shipped", 2, Shipped)
    lab._sampler.tally(shipped, "id")  # as a board does
    load = lab.load(ordered, orders(60), rate=10_000)
    load.wait()

    def ship(ids: range, partition: int) -> None:
        sender = Producer(lab.cluster)  # one that knows the topic as it is now
        for number in ids:
            sender.send(shipped.name, b'{"id": %d}' % number, str(number), partition=partition)
        sender.flush()

    ship(range(20), 1)
    wait_until(lambda: lab.figure("completed", "shipped") == 20, what="what is there so far")
    add_partitions(shipped, 4)
    ship(range(20, 40), 2)
    ship(range(40, 60), 3)
    assert len(lab.records(shipped, last=100)) == 60
    audit = lab.audit(load, shipped)
    assert (audit.result, len(audit.lost)) == ("valid", 0), audit.explain()
    assert set(lab.trace(59)["place"]) >= {"shipped/3/19"}
    wait_until(lambda: lab.figure("completed", "shipped") == 60, what="what came in the new partitions")


def test_a_reader_goes_on_in_the_others_when_partitions_are_added(cluster: Cluster) -> None:
    topic = fresh_topic(cluster)
    put(topic, 0, 1)
    with Reader(topic) as reader:
        assert [record.value for record in reader.rest()] == [0, 1]
        add_partitions(topic, 3)
        send(topic, {0: 2, 2: 3})
        assert sorted(record.value for record in reader.rest()) == [2, 3]  # the others not once more
        assert reader.positions() == {(topic.name, 0): 3, (topic.name, 1): 0, (topic.name, 2): 1}
