"""Topics that are there in another way than they are needed, and partitions added: told by name, or read."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import Producer as Client
from consuming import Member, alter, fresh_group, fresh_topic, put
from lab_helpers import Order, Shipped, orders
from processes import wait_until
from stores import store_topic

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import PoisonRecord, TopicMismatch
from labkit.kafka.producer import Producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import lanes_topic, skips_topic
from labkit.patterns.dead_letters import dead_letters_topic
from labkit.patterns.key_value_store import KeyValueStore
from labkit.patterns.retries import RetryingConsumer, dead_letter, retry_topics
from labkit.runtime.which_kafka import Connection


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
    cluster.add_partitions(topic.name, 5)
    with Member(consumer) as member:
        member.journal.wait(lambda: sorted(done) == [0, 1, 2, 3, 4], what="all that waited")


@pytest.mark.long  # the next one has more than that
def test_partitions_added_to_a_retry_topic_end_its_consumer(cluster: Cluster) -> None:
    """The next one reads them, or says why it does not: here there are more than the source has."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    consumer = RetryingConsumer(topic, print, group, retry=retry_topics(0.1))
    with Member(consumer) as member:
        member.journal.wait_for(Step.ASSIGNED)
        cluster.add_partitions(own_topics(consumer)["retry"].name, 3)
        assert isinstance(member.ends(), TopicMismatch)
    with pytest.raises(TopicMismatch, match=f"Give {topic.name} as many"):
        consumer.prepare()


def test_partitions_added_to_a_source_and_then_to_its_retry_topic_are_read_by_the_next_consumer(
    cluster: Cluster,
) -> None:
    """The one that runs does not have them, and its records would wait there: it ends, and a pod starts again."""
    topic, group = fresh_topic(cluster), fresh_group()
    failed: set[int] = set()
    done: list[int] = []

    def fails_once(record: Record[int]) -> None:
        if record.value not in failed:
            failed.add(record.value)
            raise ConnectionError("no answer")
        done.append(record.value)

    consumer = RetryingConsumer(topic, fails_once, group, retry=retry_topics(0.1))
    with Member(consumer) as member:
        member.journal.wait_for(Step.ASSIGNED)
        cluster.add_partitions(topic.name, 2)
        member.journal.wait(lambda: (topic.name, 1) in member.journal.assigned(), what="the new partition")
        cluster.add_partitions(own_topics(consumer)["retry"].name, 2)
        assert isinstance(member.ends(), TopicMismatch)
    sender = Producer(cluster)
    for value in range(8):
        sender.send(topic.name, str(value).encode(), f"k{value}")
    sender.flush()
    with Member(consumer) as member:
        member.journal.wait(lambda: sorted(done) == list(range(8)), what="all, through the retry topic")
        assert {number for name, number in member.journal.assigned() if "retry" in name} == {0, 1}


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


@pytest.mark.long  # test_partitions_added.py has it under load
def test_partitions_added_to_a_topic_that_a_lab_reads_are_read(lab: Lab) -> None:
    """What the board counts, and what verdict, records and trace find."""
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
    lab.add_partitions(shipped, 4)
    ship(range(20, 40), 2)
    ship(range(40, 60), 3)
    assert len(lab.records(shipped, last=100)) == 60
    verdict = lab.verdict(load, shipped, timeout=0)
    assert (verdict.result, len(verdict.of("lost"))) == ("valid", 0), verdict.explain()
    assert set(lab.trace(59)["place"]) >= {"shipped/3/19"}
    wait_until(lambda: lab.figure("completed", "shipped") == 60, what="what came in the new partitions")


def test_a_reader_goes_on_in_the_others_when_partitions_are_added(cluster: Cluster) -> None:
    topic = fresh_topic(cluster)
    put(topic, 0, 1)
    with Reader(topic) as reader:
        assert [record.value for record in reader.read_to_end()] == [0, 1]
        cluster.add_partitions(topic.name, 3)
        send(topic, {0: 2, 2: 3})
        assert sorted(record.value for record in reader.read_to_end()) == [2, 3]  # the others not once more
        assert reader.positions() == {(topic.name, 0): 3, (topic.name, 1): 0, (topic.name, 2): 1}


# -- A key in two partitions of a store

NOW = int(time.time() * 1000) - 60_000


def write(topic: Topic[Any], key: str, value: Any, partition: int, at: int, **client: Any) -> None:
    """Write a record so many milliseconds after `NOW`. Partition -1: where a plain client puts the key."""
    sender = Client(topic.cluster.config(client))
    raw = value if isinstance(value, bytes | None) else json.dumps(value).encode()
    sender.produce(topic.name, raw, key.encode(), partition, timestamp=NOW + at)
    assert sender.flush(20) == 0


def shown(store: KeyValueStore[Any]) -> dict[str, Any]:
    """What a store shows once it has taken in all that there is, and one that is made now."""
    wait_until(lambda: not store.lag(), what="all that is there")
    with KeyValueStore(store.topic) as again:
        assert again.snapshot() == store.snapshot()
        assert again.scattered == store.scattered
    return store.snapshot()


@pytest.mark.parametrize("newer", ["Java's", "the plain client's"])
def test_what_clients_with_different_partitioners_wrote_is_right_and_told(
    cluster: Cluster, newer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a reload 12 of 25 deleted keys were back, and 11 of 25 values were old."""
    topic = store_topic(cluster, 4)
    java, plain = Client(cluster.config({"partitioner": "murmur2_random"})), Client(cluster.config({}))
    first, second = (plain, java) if newer == "Java's" else (java, plain)
    keys = [f"key {number}" for number in range(50)]
    for key in keys:
        first.produce(topic.name, b'"old"', key, timestamp=NOW)
    assert first.flush(20) == 0
    for number, key in enumerate(keys):
        second.produce(topic.name, None if number % 2 else b'"new"', key, timestamp=NOW + 1)
    assert second.flush(20) == 0
    lies: defaultdict[str, set[int]] = defaultdict(set)
    with Reader(topic) as reader:
        for record in reader.read_to_end():
            lies[record.key or ""].add(record.partition)
    with KeyValueStore(topic) as store:
        assert store.snapshot() == dict.fromkeys(keys[::2], "new")
        assert store.scattered == {key: tuple(sorted(found)) for key, found in lies.items() if len(found) == 2}
        assert len(store.scattered) > 20
        key, (one, other) = next(iter(store.scattered.items()))
    (told,) = [record.getMessage() for record in caplog.records if "partitions" in record.getMessage()]
    assert f"key {key!r}, as {len(store.scattered) - 1} more, lies in partitions {one} and {other}" in told


def test_of_a_key_in_two_partitions_the_newest_record_counts_while_it_is_followed(cluster: Cluster) -> None:
    topic, changes = store_topic(cluster, 2), []
    with KeyValueStore(topic) as store:
        store.subscribe(lambda *change: changes.append(change))
        steps: list[tuple[Any, int, int, dict[str, Any]]] = [
            (1, 0, 100, {"a": 1}),
            (None, 1, 50, {"a": 1}),  # an older tombstone deletes nothing
            (None, 1, 200, {}),
            (2, 0, 150, {}),  # an older value brings nothing back
            (3, 0, 300, {"a": 3}),
            (4, 1, 250, {"a": 3}),
            (5, 0, 240, {"a": 4}),  # the newest in its partition, whatever its time; in the other one there is a newer
            (None, 1, 400, {}),
        ]
        for value, partition, at, then in steps:
            write(topic, "a", value, partition, at)
            assert shown(store) == then, (value, partition, at)
        assert store.scattered == {"a": (0, 1)}
        assert store.loads == 2  # once more, to see the timestamps
        wait_until(lambda: len(changes) == 5, what="the changes")
        assert changes == [("a", None, 1), ("a", 1, None), ("a", None, 3), ("a", 3, 4), ("a", 4, None)]


def test_an_older_record_elsewhere_does_not_bring_back_what_was_deleted(cluster: Cluster) -> None:
    topic = store_topic(cluster, 2)
    with KeyValueStore(topic) as store:
        write(topic, "a", 1, 0, 100)
        write(topic, "a", None, 0, 200)
        assert shown(store) == {}
        write(topic, "a", 2, 1, 150)
        assert shown(store) == {}
        write(topic, "a", 3, 1, 250)
        assert shown(store) == {"a": 3}


def test_a_store_writes_a_key_where_it_lies(cluster: Cluster) -> None:
    """And so makes no second partition of it, where its own partitioner would."""
    topic = store_topic(cluster, 2)
    for number in range(6):
        write(topic, f"key {number}", 0, 0, 0)
    with KeyValueStore(topic) as store:
        store.update({f"key {number}": 1 for number in range(6)})
        store.put("key 0", 2)
        store.delete("key 1")
        assert shown(store) == {"key 0": 2, **{f"key {number}": 1 for number in range(2, 6)}}
        assert store.scattered == {}
        assert store.loads == 1
    with Reader(topic) as reader:
        assert {record.partition for record in reader.read_to_end()} == {0}


def test_a_key_in_two_partitions_is_deleted_in_both(cluster: Cluster) -> None:
    """Kafka forgets a tombstone after a while, and what is older in the other partition would be back."""
    topic = store_topic(cluster, 2)
    write(topic, "a", 1, 0, 200)
    write(topic, "a", 2, 1, 100)
    with KeyValueStore(topic) as store:
        assert store["a"] == 1
        store.put("a", 3)
        assert store["a"] == 3
        store.delete("a")
        assert shown(store) == {}
    with Reader(topic) as reader:
        assert {record.partition for record in reader.read_to_end() if record.value is None} == {0, 1}


def test_of_a_key_in_two_partitions_only_the_newest_record_must_be_readable(cluster: Cluster) -> None:
    topic = store_topic(cluster, 2, value=int)
    write(topic, "a", b"oops", 0, 100)
    write(topic, "a", 1, 1, 200)
    write(topic, "b", 2, 0, 100)
    write(topic, "b", b"oops", 1, 200)
    with KeyValueStore(topic) as store:
        assert store.snapshot() == {"a": 1}
        with pytest.raises(PoisonRecord, match=rf"{topic.name}/1/1 does not decode"):
            store["b"]
        write(topic, "b", 3, 0, 150)
        assert shown(store) == {"a": 1}
        write(topic, "b", 4, 0, 300)
        assert shown(store) == {"a": 1, "b": 4}
        assert not store.unreadable


def test_what_is_remembered_of_deleted_keys_is_bounded(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.patterns.key_value_store.contents.SPARE", 10)
    with KeyValueStore(store_topic(cluster, 2)) as store:
        store.update({"a": 1, "b": 2})
        for number in range(8):
            store.update({f"{number} {one}": one for one in range(10)})
            for one in range(10):
                store.delete(f"{number} {one}")
        assert len(store._contents._by_key()) <= 2 * 12 + 10
        assert shown(store) == {"a": 1, "b": 2}
