"""Members that come, go, freeze and return, while partitions move between them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from consuming import Journal, Member, Process, committed, fresh_group, fresh_topic, members_of, put
from processes import wait_until

import labkit.kafka.consumer.loop as module
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import FailedRecord, Retry
from labkit.kafka.consumer.steps import Step
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic


def share(member: Member, count: int) -> None:
    """Wait until a member holds so many partitions."""
    member.journal.wait(lambda: len(member.journal.assigned()) == count, what=f"{count} partitions")


def test_400_records_while_a_second_member_joins(cluster: Cluster) -> None:
    """correctness 1, 3: nobody crashes, so exactly 400 are handled, each once, each partition in order."""
    topic, group = fresh_topic(cluster, 4), fresh_group()
    handled: list[tuple[int, int]] = []

    def handle(record: Record[int]) -> None:
        time.sleep(0.01)  # the work
        handled.append((record.partition, record.value))

    for partition in range(4):
        put(topic, *range(90), partition=partition)
    consumer = Consumer(topic, handle, group)
    with Member(consumer) as first:
        first.journal.wait_for(Step.HANDLED, 40)
        with Member(consumer) as second:
            share(second, 2)
            for partition in range(4):
                put(topic, *range(90, 100), partition=partition)  # however late the second came, there is work for it
            first.wait_committed(dict.fromkeys(range(4), 100))
            assert second.journal.of(Step.HANDLED)
    assert len(handled) == 400
    for partition in range(4):
        assert [value for where, value in handled if where == partition] == list(range(100))


@pytest.mark.long
def test_30_partitions_keep_their_order_while_two_members_join(cluster: Cluster) -> None:
    """correctness 1, 3: 30 × 250 records, each handled once, by three members in the end, each partition in order."""
    topic, group = fresh_topic(cluster, 30), fresh_group()
    handled: list[tuple[int, int]] = []

    def handle(record: Record[int]) -> None:
        time.sleep(0.015)  # the work
        handled.append((record.partition, record.value))

    for partition in range(30):
        put(topic, *range(250), partition=partition)
    consumer = Consumer(topic, handle, group)
    with Member(consumer) as first:
        first.journal.wait_for(Step.HANDLED, 30)
        with Member(consumer) as second:
            second.journal.wait_for(Step.HANDLED)
            with Member(consumer) as third:
                third.journal.wait_for(Step.HANDLED)
                first.wait_committed(dict.fromkeys(range(30), 250), timeout=60)
                assert {len(one.journal.assigned()) for one in (first, second, third)} == {10}
    assert len(handled) == 30 * 250
    for partition in range(30):
        assert [value for where, value in handled if where == partition] == list(range(250))


def test_a_member_without_a_partition_leaves_its_group_too(cluster: Cluster) -> None:
    """Else the next rebalance would wait for it until its session is over, and whoever stops meanwhile with it."""
    topic, group = fresh_topic(cluster), fresh_group()
    consumer = Consumer(topic, lambda record: None, group)
    with Member(consumer) as busy, Member(consumer) as idle:
        both = (busy, idle)
        wait_until(lambda: members_of(cluster, group) == 2, 10, "both in the group")
        wait_until(lambda: sum(len(one.journal.assigned()) for one in both) == 1, 10, "one with the partition")
        (none,) = [one for one in both if not one.journal.assigned()]
        none.stop()
        wait_until(lambda: members_of(cluster, group) == 1, 5, "one to leave: a session lasts 6 s")


def test_a_rebalance_in_the_middle_of_a_long_back_off(cluster: Cluster) -> None:
    """correctness 2, 5: the partition moves at once, its record uncommitted; the one that stays keeps its back-off."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in (0, 1):
        put(topic, 0, 1, partition=partition)
    failing: Counter[int] = Counter()

    def handle(record: Record[int]) -> None:
        if record.value == 1:
            failing[record.partition] += 1
            raise ValueError("blocked")

    consumer = Consumer(topic, handle, group, on_failure=lambda failure: Retry(600))  # longer than a test may take
    with Member(consumer) as first:
        first.journal.wait_for(Step.FAILED, 2)
        first.wait_committed({0: 1, 1: 1})
        with Member(consumer) as second:
            second.journal.wait_for(Step.FAILED)
            (moved,) = second.journal.assigned()
            share(first, 1)
            assert failing == {moved[1]: 2, 1 - moved[1]: 1}
            assert first.journal.of(Step.RECOVERED)[0].partition == moved[1]
    assert committed(topic, group) == {0: 1, 1: 1}


def test_a_stop_interrupts_a_back_off_at_once(cluster: Cluster) -> None:
    """correctness 5: and the record in hand is not committed."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0, 1)

    def handle(record: Record[int]) -> None:
        if record.value == 1:
            raise ValueError("blocked")

    with Member(Consumer(topic, handle, group, on_failure=lambda failure: Retry(600))) as member:
        member.journal.wait_for(Step.FAILED)
        member.stop()  # 600 s are longer than a test may take
    assert committed(topic, group) == {0: 1}
    assert len(member.journal.of(Step.RECOVERED)) == 1
    assert member.journal.assigned() == set()


def stopped_at_its_second(
    topic: Topic[int], group: str, handle: Callable[[Record[int]], object] = lambda record: None
) -> tuple[Member, threading.Event, threading.Event]:
    """A member that was stopped while its handler has record 1. It goes on at one event, and then sets the other."""
    going_on, late = threading.Event(), threading.Event()

    def slow(record: Record[int]) -> None:
        handle(record)
        if record.value == 1:
            going_on.wait(20)
            late.set()

    with Member(Consumer(topic, slow, group, drain=0.2)) as member:
        member.journal.wait_for(Step.HANDLING, 2)
        member.stop()
    return member, going_on, late


def test_a_late_result_is_never_committed(cluster: Cluster) -> None:
    """correctness 3, 5: the drain's bound has passed, the next owner has the record; then the handler returns."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0, 1, 2)
    first, going_on, late = stopped_at_its_second(topic, group)
    assert committed(topic, group) == {0: 1}
    blocked = threading.Event()
    with Member(Consumer(topic, lambda record: blocked.wait(10), group)) as second:
        assert second.journal.wait_for(Step.HANDLING)[0].value == 1
        going_on.set()
        assert late.wait(5)
        wait_until(lambda: len(first.journal.of(Step.HANDLED)) == 2)  # it has ended: its journal waits no more
        assert committed(topic, group) == {0: 1}
        assert len(first.journal.of(Step.HANDLING)) == 2  # nothing new was begun
        blocked.set()
        second.wait_committed({0: 3})


def test_what_a_late_result_sent_is_not_sent(cluster: Cluster) -> None:
    """correctness 3, 34: it goes out with the next owner's handling of the record."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, 0, 1)
    _, going_on, late = stopped_at_its_second(topic, group, lambda record: output.send(record.value))
    going_on.set()
    assert late.wait(5)
    with Member(Consumer(topic, lambda record: output.send(10 + record.value), group)) as second:
        second.wait_committed({0: 2})
    with Reader(output) as reader:
        assert [record.value for record in reader.read_to_end()] == [0, 11]


TELL = (Step.BLOCKED, Step.RECOVERED)  # what says that a lane waits, or that it does no more


def test_a_decision_that_comes_when_its_partition_is_gone_leaves_no_back_off(cluster: Cluster) -> None:
    """correctness 5: whoever counts what waits was told of a failure, and is told of its end."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in (0, 1):
        put(topic, 0, partition=partition)
    decide = threading.Event()

    def fail(record: Record[int]) -> None:
        raise ValueError("blocked")

    def late(failed: FailedRecord) -> Retry:
        decide.wait(20)
        return Retry(30)

    with Member(Consumer(topic, fail, group, drain=0.2, on_failure=late)) as first:
        first.journal.wait_for(Step.HANDLING, 2)
        with Member(Consumer(topic, lambda record: None, group)) as second:
            share(second, 1)
            ((_, moved),) = second.journal.assigned()
            decide.set()
            first.journal.wait_for(Step.FAILED, 2)
            first.journal.wait_for(Step.RECOVERED)
            assert {failed.partition for failed in first.journal.of(Step.RECOVERED)} == {moved}
            words = [step for step, one in first.journal.steps if step in TELL and one.partition == moved]
            assert words[-1] is Step.RECOVERED


def test_a_stop_waits_for_what_runs(cluster: Cluster) -> None:
    """correctness 5"""
    topic, group = fresh_topic(cluster, 3), fresh_group()
    for partition in range(3):
        put(topic, *range(5), partition=partition)

    def handle(record: Record[int]) -> None:
        time.sleep(0.3)  # the work

    with Member(Consumer(topic, handle, group)) as member:
        member.journal.wait_for(Step.HANDLING, 3)
    handled = Counter(record.partition for record in member.journal.of(Step.HANDLED))
    assert len(member.journal.of(Step.HANDLING)) == handled.total()
    assert committed(topic, group) == dict(handled)


def test_a_pause_does_not_outlive_a_rebalance(cluster: Cluster) -> None:
    """correctness 4: paused because it was full, taken away, given back: it is read again."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in (0, 1):
        put(topic, *range(30), partition=partition)
    well = threading.Event()

    def handle(record: Record[int]) -> None:
        if record.value == 5 and not well.is_set():
            raise ValueError("blocked")

    consumer = Consumer(topic, handle, group, max_ahead=4, on_failure=lambda failure: Retry(0.1))
    with Member(consumer) as first:
        first.wait_committed({0: 5, 1: 5})
        first.journal.wait_for(Step.FAILED, 8)  # long enough to be paused
        with Member(consumer) as second:
            share(second, 1)
            share(first, 1)
            second.journal.wait_for(Step.FAILED, 4)
        share(first, 2)
        well.set()
        first.wait_committed({0: 30, 1: 30})


@pytest.mark.long
def test_a_lost_partition_is_never_committed(cluster: Cluster) -> None:
    """correctness 5: frozen for longer than its session, thawed, it learns of its loss and commits nothing of it."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0)
    with Process(topic, group, hang=0.3) as frozen:
        frozen.wait_for(Step.COMMITTED)
        put(topic, 1, 2)
        frozen.wait_for(Step.HANDLING, 2)
        frozen.freeze()
        with Member(Consumer(topic, lambda record: None, group)) as member:
            member.wait_committed({0: 3})
            put(topic, *range(3, 20))
            member.wait_committed({0: 20})
            frozen.thaw()
            frozen.wait_for(Step.LOST)
            put(topic, 20)
            member.journal.wait(lambda: committed(topic, group) == {0: 21} or not member.journal.assigned())
        stored = [offset for subject in frozen.of(Step.COMMITTED) for _, _, offset in subject]
        lost = frozen.lines.index(next(line for line in frozen.lines if line["step"] == "lost"))
        assert not [line for line in frozen.lines[:lost] if line["step"] == "committed" and line["subject"][0][2] > 1]
        assert stored[0] == 1
        # It is a member again, and goes on where the other one was.
        frozen_handled = [offset for _, _, offset in frozen.of(Step.HANDLING)]
        put(topic, 21)
        frozen.wait_for(Step.HANDLED, len(frozen_handled))
        assert committed(topic, group)[0] >= 20


def test_latest_keeps_what_comes_while_the_member_restarts(cluster: Cluster) -> None:
    """correctness 6: nothing was ever handled, yet the group's position is stored."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put(topic, "old", partition=0)
    consumer = Consumer(topic, lambda record: None, group, start="latest")
    with Member(consumer) as member:
        member.journal.wait_for(Step.ASSIGNED)
    assert committed(topic, group) == {0: 1, 1: 0}
    for partition in (0, 1):
        put(topic, 7, partition=partition)
    with Member(consumer) as member:
        member.wait_committed({0: 2, 1: 1})
        assert [record.value for record in member.journal.of(Step.HANDLED)] == [7, 7]


class Refusing(Client):
    """A client whose first answers about offsets are errors, as in the middle of a rebalance."""

    refuse = 0

    def commit(self, *args: Any, **options: Any) -> Any:
        if not options.get("asynchronous", True) and Refusing.refuse > 0:
            Refusing.refuse -= 1
            raise KafkaException(KafkaError(KafkaError.REBALANCE_IN_PROGRESS))
        return super().commit(*args, **options)

    def committed(self, *args: Any, **options: Any) -> Any:
        if Refusing.refuse > 0:
            Refusing.refuse -= 1
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        return super().committed(*args, **options)


@pytest.mark.parametrize("refused", [1, 2, 3, 4])
def test_offsets_that_cannot_be_had_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """correctness 6: a coordinator that does not answer yet does not end the member, nor lose its first position."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, "old")
    monkeypatch.setattr(module, "Client", Refusing)
    Refusing.refuse = refused
    with Member(Consumer(topic, lambda record: None, group, start="latest")) as member:
        member.wait_committed({0: 1})
    assert Refusing.refuse == 0


class Unknown(Client):
    """A client that is told an error in place of one partition's offset."""

    answers = 0

    def committed(self, partitions: Any, **options: Any) -> Any:
        found = super().committed(partitions, **options)
        if Unknown.answers < 2:
            Unknown.answers += 1
            return [Broken(found[0].topic, found[0].partition)]
        return found


class Broken(TopicPartition):
    """An answer with an error in it, and no offset."""

    @property
    def error(self) -> KafkaError:  # type: ignore[override]
        return KafkaError(KafkaError.NOT_COORDINATOR)


def test_an_error_is_not_taken_for_an_offset_that_was_never_committed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 1: or the group would begin anew, and with start="latest" lose what is not handled yet."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(5))
    with Member(Consumer(topic, lambda record: None, group)) as member:
        member.wait_committed({0: 5})
    put(topic, 5)
    monkeypatch.setattr(module, "Client", Unknown)
    Unknown.answers = 0
    with Member(Consumer(topic, lambda record: None, group, start="latest")) as member:
        member.wait_committed({0: 6})
    assert [record.value for record in member.journal.of(Step.HANDLED)] == [5]


class Shuffling(Client):
    """A client whose partition is taken away and given back while one batch is taken from it."""

    shuffles = 0

    def subscribe(self, topics: Any, on_assign: Any = None, on_revoke: Any = None, **options: Any) -> None:
        self.on_assign, self.on_revoke = on_assign, on_revoke
        super().subscribe(topics, on_assign=on_assign, on_revoke=on_revoke, **options)

    def consume(self, count: int = 1, timeout: float = -1) -> Any:
        messages = super().consume(count, timeout)
        if count > 1 and messages and Shuffling.shuffles > 0:
            Shuffling.shuffles -= 1
            place = [TopicPartition(messages[0].topic(), messages[0].partition())]
            self.on_revoke(self, place)
            self.on_assign(self, place)
        return messages


@pytest.mark.parametrize("order", ["partition", pytest.param("key", marks=pytest.mark.long)])
def test_a_batch_whose_partition_was_given_back_meanwhile_is_read_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, order: Any
) -> None:
    """correctness 3: never dropped, and never ahead of what the committed offset brings."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(300))
    handled: list[int] = []

    def handle(record: Record[int]) -> None:
        time.sleep(0.002)  # the work
        handled.append(record.value)

    monkeypatch.setattr(module, "Client", Shuffling)
    Shuffling.shuffles = 3
    with Member(Consumer(topic, handle, group, max_ahead=40, order=order)) as member:
        member.wait_committed({0: 300})
    assert Shuffling.shuffles == 0
    assert handled == list(range(300))


def test_two_members_in_one_process_share_the_work_by_topic(cluster: Cluster) -> None:
    """Several topics in one consumer: each record reaches its own decoder."""
    numbers, words, group = fresh_topic(cluster, 2, int), fresh_topic(cluster, 2, str), fresh_group()
    put(numbers, *range(20), key="k")
    put(words, *"abcdefghij", key="k")
    handled: list[Any] = []
    journal = Journal()
    consumer = Consumer([numbers, words], lambda record: handled.append(record.value), group, on_step=journal)
    with Member(consumer) as first, Member(consumer) as second:
        journal.wait(lambda: len(handled) == 30)
        first.journal.wait(lambda: first.journal.assigned() | second.journal.assigned() != set())
    assert sorted(map(str, handled)) == sorted([*map(str, range(20)), *"abcdefghij"])
    assert journal.of(Step.FAILED) == []
