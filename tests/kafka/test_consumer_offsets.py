"""Offsets that do not fit the topic any more: no record is passed over without a word."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any, Literal

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka.admin import NewPartitions  # type: ignore[attr-defined]
from consuming import Member, commit, committed, fresh_group, fresh_topic, make_anew, members_of, put, trim
from processes import wait_until
from stores import transaction

import labkit.kafka.consumer.loop as module
from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError, TopicMissing
from labkit.kafka.lag import end_offsets, lag
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic

BOTH = pytest.mark.parametrize("start", [pytest.param("earliest", marks=pytest.mark.long), "latest"])
Start = Literal["earliest", "latest"]


def handled(member: Member) -> list[Any]:
    return [record.value for record in member.journal.of(Step.HANDLED)]


def ignore(record: Record[Any]) -> None:
    """A handler for tests that look at steps."""


# -- out of range ------------------------------------------------------------------------------------------------------


@BOTH
def test_an_offset_beyond_the_end_means_the_first_record_there_is(
    cluster: Cluster, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """correctness 32: the consumer used to wait at offset 100 for record 100, and to pass over all before it."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(60))
    commit(topic, group, 100)
    with Member(Consumer(topic, ignore, group, start=start)) as member:
        member.wait_committed({0: 60})
        put(topic, *range(60, 105))
        member.wait_committed({0: 105})
        assert handled(member) == list(range(105))
    assert f"{topic.name}/0 from offset 100 on" in capsys.readouterr().err


def test_an_offset_beyond_the_end_of_an_empty_topic_is_corrected_at_once(cluster: Cluster) -> None:
    """correctness 32: the records that come while the group is away are not passed over either."""
    topic, group = fresh_topic(cluster), fresh_group()
    commit(topic, group, 5)
    with Member(Consumer(topic, ignore, group)) as member:
        member.wait_committed({0: 0})
    put(topic, *range(10))
    with Member(Consumer(topic, ignore, group)) as member:
        member.wait_committed({0: 10})
        assert handled(member) == list(range(10))


@BOTH
def test_what_retention_left_is_handled(cluster: Cluster, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """correctness 32: ten committed, the records up to 50 deleted while the group is away, 50 handled."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(100))
    commit(topic, group, 10)
    trim(topic, 50)
    with Member(Consumer(topic, ignore, group, start=start)) as member:
        member.wait_committed({0: 100})
        assert handled(member) == list(range(50, 100))
    assert f"{topic.name}/0 from offset 10 on, but its records before offset 50" in capsys.readouterr().err


class Pausing(Client):
    """A client that tells when a partition is paused, which throws away what it had fetched."""

    paused = threading.Event()

    def pause(self, partitions: Any) -> None:
        super().pause(partitions)
        Pausing.paused.set()


@BOTH
def test_what_retention_deletes_under_a_slow_consumer_is_told(
    cluster: Cluster, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """correctness 32: it goes on with the first record there is."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(100))
    commit(topic, group, 0)
    going = threading.Event()
    monkeypatch.setattr(module, "Client", Pausing)
    Pausing.paused.clear()
    with Member(Consumer(topic, lambda record: going.wait(20), group, max_ahead=10, start=start)) as member:
        assert Pausing.paused.wait(20)
        trim(topic, 50)
        going.set()
        member.wait_committed({0: 100})
        values = handled(member)
    before = values.index(50)
    assert 0 < before <= 10
    assert values == [*range(before), *range(50, 100)]
    assert f"{topic.name}/0 from offset {before} on, but its records before offset 50" in capsys.readouterr().err


def test_an_offset_that_no_record_has_is_not_out_of_range(cluster: Cluster) -> None:
    """That of a transaction's marker, or of a record that was compacted away: it would end this consumer."""
    topic, group = fresh_topic(cluster), fresh_group()
    for value in range(4):
        transaction(topic, ("key", value))
        wait_until(lambda: end_offsets(cluster, [topic.name])[topic.name, 0] == 2 * value + 2)  # noqa: B023
    trim(topic, 2)
    positions = lambda partitions: {(topic.name, 0): 2}  # noqa: E731
    with Member(Consumer(topic, ignore, group, positions=positions)) as member:
        member.wait_committed({0: 8})
        assert handled(member) == [1, 2, 3]


@pytest.mark.parametrize("records", [0, 10])
def test_a_position_beyond_the_end_ends_the_consumer(cluster: Cluster, records: int) -> None:
    """correctness 32: what was made of the topic has records that are not there, and would lack those that come."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(records))
    positions = lambda partitions: {(topic.name, 0): 100}  # noqa: E731
    with Member(Consumer(topic, ignore, group, positions=positions)) as member:
        error = member.ends()
    assert isinstance(error, LabkitError)
    assert f"{topic.name}/0 from offset 100 on, but it ends before that, at {records}" in str(error)
    assert handled(member) == []


# -- topics made anew --------------------------------------------------------------------------------------------------


@BOTH
def test_a_consumer_ends_when_its_topic_is_made_anew(
    cluster: Cluster, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 32: its next offset is within the new topic, so that the client finds nothing wrong; unless it looks
    in the moment in which there is none."""
    monkeypatch.setattr(module, "GONE", ())
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(5))
    commit(topic, group, 0)
    consumer = Consumer(topic, ignore, group, start=start)
    with Member(consumer) as member:
        member.wait_committed({0: 5})
        make_anew(topic)
        put(topic, *range(100, 105))
        error = member.ends()
    assert isinstance(error, TopicMissing)
    assert "made anew" in str(error)
    assert sum(lag(cluster, group, [topic.name]).values()) == 5
    with Member(consumer) as member:
        member.wait_committed({0: 5})
        assert handled(member) == list(range(100, 105))


@BOTH
def test_what_a_busy_consumer_commits_into_a_new_topic_says_nothing_of_it(
    cluster: Cluster, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 32: it has not noticed yet; the restarted group used to handle 0 of 40."""
    monkeypatch.setattr(module, "IDENTITY", 1000)
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(40))
    commit(topic, group, 0)
    going = threading.Event()

    def slow(record: Record[int]) -> None:
        if record.value == 39:
            going.wait(20)

    with Member(Consumer(topic, slow, group, drain=20)) as member:
        member.wait_committed({0: 39})
        make_anew(topic)
        put(topic, *range(100, 140))
        member.stopping.set()
        going.set()
        member.ends()  # as it was told, or because its client has seen that the topic was deleted
    assert committed(topic, group) == {0: 40}
    with Member(Consumer(topic, ignore, group, start=start)) as member:
        member.wait_committed({0: 40})
        member.journal.wait(lambda: len(handled(member)) == 40, what="the records of the new topic")
        assert handled(member) == list(range(100, 140))


# -- `start` -----------------------------------------------------------------------------------------------------------


def add_a_partition(topic: Topic[Any]) -> None:
    """Give a topic of one partition another one, with five records."""
    for future in admin(topic.cluster).create_partitions([NewPartitions(topic.name, 2)]).values():
        future.result(10)
    sender = Producer(topic.cluster)
    for value in range(5):
        sender.send(topic.name, str(value).encode(), partition=1)
    sender.flush()


@pytest.mark.parametrize("many", [pytest.param(1, marks=pytest.mark.long), 2])
def test_latest_reads_partitions_that_are_added_from_their_beginning(cluster: Cluster, many: int) -> None:
    """correctness 32: what is sent to them before the group notices is handled too, by a member that had none."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, "old")
    consumer = Consumer(topic, ignore, group, start="latest")
    with ExitStack() as stack:
        pair = [stack.enter_context(Member(consumer)) for _ in range(many)]
        wait_until(lambda: members_of(cluster, group) == many, 20, "all in the group")
        pair[0].wait_committed({0: 1})
        add_a_partition(topic)
        pair[0].wait_committed({0: 1, 1: 5})
        assert [value for member in pair for value in handled(member)] == list(range(5))


def test_latest_reads_partitions_that_were_added_while_nobody_was_there(cluster: Cluster) -> None:
    """correctness 32: the group has a history, though not in that partition."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, "old")
    consumer = Consumer(topic, ignore, group, start="latest")
    with Member(consumer) as member:
        member.wait_committed({0: 1})
    add_a_partition(topic)
    with Member(consumer) as member:
        member.wait_committed({0: 1, 1: 5})
        assert handled(member) == list(range(5))


def test_latest_begins_at_the_end_for_all_who_begin_at_once(cluster: Cluster) -> None:
    """The first of them to commit does not make a history for the others."""
    topic, group = fresh_topic(cluster, 4), fresh_group()
    for partition in range(4):
        put(topic, "old", partition=partition)
    consumer = Consumer(topic, ignore, group, start="latest")
    with Member(consumer) as first, Member(consumer) as second:
        both = (first, second)
        first.journal.wait(lambda: all(len(member.journal.assigned()) == 2 for member in both), what="2 each")
        for partition in range(4):
            put(topic, 7, partition=partition)
        first.wait_committed(dict.fromkeys(range(4), 2))
        assert handled(first) + handled(second) == [7, 7, 7, 7]
