"""Handlers with state: single records and undecoded batches, in the thread that polls."""

from __future__ import annotations

import gc
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from aggregating import stored
from consuming import Member, alter, committed, fresh_group, fresh_topic, make_anew, put
from processes import wait_until
from stores import COMPACTED, raw, store_topic, transaction
from transacting import exactly_once, values

import labkit.kafka.consumer.loop as loop_module
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import EXIT_DEADLINE, Consumer
from labkit.kafka.consumer.failures import FailedRecord, SetAside
from labkit.kafka.consumer.loop import Loop
from labkit.kafka.consumer.state import PartitionState, garbage_kept
from labkit.kafka.consumer.steps import Step
from labkit.kafka.consumer.transactions import ExactlyOnce
from labkit.kafka.errors import DeliveryFailed, LabkitError, TopicMismatch, TopicMissing
from labkit.kafka.lag import lag
from labkit.kafka.reader import Reader
from labkit.kafka.records import Message, Record
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import RetryingConsumer, retry_topics


def test_a_handler_reads_its_state_and_returns_its_changes(cluster: Cluster) -> None:
    """Values are decoded anew at each look; what is sent names its cause; None deletes; a restart goes on."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    store = store_topic(cluster, 1, list[int])

    def handle(state: Mapping[str, list[int]], record: Record[int]) -> Mapping[str, list[int] | None] | None:
        assert record.key is not None
        before = state.get(record.key, [])
        before.append(record.value)
        output.send(len(before), key=record.key)
        if record.value == 0:
            assert sorted(state) == sorted(dict(state))
            return {record.key: None}
        if record.value < 0:
            assert before[:-1] == state.get(record.key, [])
            return None  # what was done to `before` is forgotten
        return {record.key: before}

    consumer = exactly_once(topic, handle, group, store=store)
    put(topic, 1, 2, -3, 4, key="a")
    put(topic, 1, 0, 5, key="b")
    put(topic, 1, 0, key="c")
    with Member(consumer) as member:
        member.wait_committed({0: 9})
    assert stored(store) == {"a": [1, 2, 4], "b": [5]}
    put(topic, 6, key="a")
    put(topic, 6, key="c")
    with Member(consumer) as member:
        member.wait_committed({0: 11})
    assert stored(store) == {"a": [1, 2, 4, 6], "b": [5], "c": [6]}
    assert values(output) == [1, 2, 3, 3, 1, 2, 1, 1, 2, 4, 1]


def test_records_that_fail_are_set_aside_and_change_nothing(cluster: Cluster) -> None:
    """A batch comes in halves, down to the record that does it; a state that is handed out cannot be written."""
    topic, aside, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    store = store_topic(cluster, 1, int)
    sizes: list[int] = []

    def handle(state: Any, messages: Sequence[Message]) -> dict[Any, Any]:
        sizes.append(len(messages))
        changes: dict[Any, Any] = {}
        for message in messages:
            value = message.value()
            assert value is not None
            if value == b"3":
                state[b"a"] = b"1"
            changes[message.key()] = value
            changes |= {b"5": {b"b": "5"}, b"7": {"b": b"7"}}.get(value, {})
        return changes

    def policy(failed: FailedRecord) -> SetAside:
        return SetAside(aside.name, failed.place, failed.message.value())

    put(topic, *range(40), key="a")
    with Member(exactly_once(topic, handle, group, store=store, batch=40, on_failure=policy)) as member:
        member.wait_committed({0: 40})
    assert stored(store) == {"a": 39}
    assert values(aside) == [3, 5, 7]
    assert max(sizes) > 1


def test_without_a_place_for_what_fails_the_consumer_ends(cluster: Cluster) -> None:
    """It names the record; what was before it counts."""
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)

    def handle(state: Mapping[str, int], record: Record[int]) -> dict[str, int]:
        return {"sum": state.get("sum", 0) + 10 // record.value}

    put(topic, 1, 2, 0, 5)
    member = Member(exactly_once(topic, handle, group, store=store))
    member.__enter__()
    error = member.ends()
    assert isinstance(error, LabkitError)
    assert f"{topic.name}/0/2" in str(error)
    wait_until(lambda: committed(topic, group) == {0: 2}, what="what was before it")
    assert stored(store) == {"sum": 15}


def test_what_comes_behind_an_error_is_not_committed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 19: not even when the end of its partition was told in the same turn."""
    topic, group, store = fresh_topic(cluster, 2), fresh_group(), store_topic(cluster, 2, int)
    handled: list[int] = []

    def handle(state: Mapping[str, int], record: Record[int]) -> dict[str, int]:
        changes = {"last": 1 // record.value}
        handled.append(record.partition)
        return changes

    def up_to_both_ends(loop: Loop) -> Iterator[list[Any]]:
        found = loop.client.consume(1, 0.05)
        loop.assignment.newly_assigned.clear()
        while found and sum(message.error() is not None for message in found) < 2:
            found += loop.client.consume(100, 0.05)
        yield found

    monkeypatch.setattr(Loop, "fetch", up_to_both_ends)
    for number in range(2):
        put(topic, 1, 0, 2, partition=number)
    member = Member(exactly_once(topic, handle, group, store=store))
    member.__enter__()
    assert isinstance(member.ends(), LabkitError)
    assert len(handled) == 1
    wait_until(lambda: committed(topic, group) == Counter(handled), what="no more than what was handled")


def test_a_stop_while_a_state_is_read_makes_nothing_of_half_of_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    put(topic, 1)
    member = Member(exactly_once(topic, lambda state, record: {"sum": 1}, group, store=store))
    whole = Reader.messages_to_end

    def stopped(reader: Reader[Any], timeout: float) -> Iterator[list[Message]]:
        for messages in whole(reader, timeout):
            member.stopping.set()
            yield messages

    monkeypatch.setattr(Reader, "messages_to_end", stopped)
    raw(store, (b"sum", b"5"))
    with member:
        member.ends()
    assert member.journal.of(Step.ASSIGNED) == []


def test_a_batch_may_change_nothing_and_what_is_no_mapping_is_set_aside(cluster: Cluster) -> None:
    topic, aside, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    store = store_topic(cluster, 1, int)

    def handle(state: Any, messages: Sequence[Message]) -> Any:
        return [] if any(message.value() == b"3" for message in messages) else None

    def policy(failed: FailedRecord) -> SetAside:
        return SetAside(aside.name, failed.place, failed.message.value())

    put(topic, *range(5))
    with Member(exactly_once(topic, handle, group, store=store, batch=5, on_failure=policy)) as member:
        member.wait_committed({0: 5})
    assert values(aside) == [3]


def test_the_garbage_collector_is_back_when_the_last_of_two_consumers_is_done() -> None:
    first, second = garbage_kept(), garbage_kept()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    try:
        assert not gc.isenabled()
    finally:
        second.__exit__(None, None, None)
    assert gc.isenabled()


def test_topics_that_are_read_together_share_the_state_of_a_number(cluster: Cluster) -> None:
    """Of their changes of one key the newest is what the store has."""
    first, second, group = fresh_topic(cluster, 2), fresh_topic(cluster, 2), fresh_group()
    store = store_topic(cluster, 2, int)

    def handle(state: Mapping[str, int], record: Record[int]) -> dict[str, int]:
        return {"sum": state.get("sum", 0) + record.value}

    consumer = exactly_once([first, second], handle, group, store=store)
    with Member(consumer) as member:
        for number in range(10):
            for topic in (first, second):
                put(topic, number, partition=number % 2)
        names = [first.name, second.name]
        member.journal.wait(lambda: not sum(lag(cluster, group, names).values()), what="no lag")
    with Reader(store) as reader:
        assert {record.partition: record.value for record in reader.read_to_end()} == {0: 40, 1: 50}
    with pytest.raises(TopicMismatch):
        exactly_once([first, fresh_topic(cluster, 3)], handle, group, store=store).prepare()


@pytest.mark.long  # test_aggregation.py replays one
def test_a_replayed_record_leaves_the_queue_in_its_transaction(cluster: Cluster) -> None:
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    broken = True

    def handle(state: Mapping[str, int], record: Record[int]) -> dict[str, int]:
        if broken and record.value == 2:
            raise ConnectionError("no answer")
        return {"sum": state.get("sum", 0) + record.value}

    put(topic, 1, 2, 3)
    consumer = RetryingConsumer(topic, handle, group, guarantee="exactly once", slot="one", store=store)
    with Member(consumer) as member:
        member.wait_committed({0: 3})
        with DeadLetters(topic, group) as letters:
            broken = False
            assert letters.replay() == 1
            wait_until(lambda: not letters, what="the letter to go")
    assert stored(store) == {"sum": 6}


def test_what_makes_no_sense_with_a_state_is_refused_when_it_is_made(cluster: Cluster) -> None:
    topic, store = fresh_topic(cluster), store_topic(cluster, 1, int)
    for options in ({"guarantee": "at least once"}, {"order": "key"}):
        with pytest.raises(LabkitError):
            exactly_once(topic, print, "group", store=store, **options)
    with pytest.raises(LabkitError):
        exactly_once(topic, print, "group", store=topic)


def test_a_state_is_there_before_the_first_record_however_long_another_transaction_holds_it_back(
    cluster: Cluster,
) -> None:
    """correctness 25: beside an open transaction on the store nobody knows yet what the state is."""
    from confluent_kafka import Producer as Client

    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    raw(store, (b"sum", b"1"))
    client = Client(cluster.config({"transactional.id": fresh_group()}))
    client.init_transactions(10)
    client.begin_transaction()
    client.produce(store.name, b"10", b"sum", 0)
    assert client.flush(10) == 0
    put(topic, 5)

    def handle(state: Mapping[str, int], record: Record[int]) -> dict[str, int]:
        return {"sum": state.get("sum", 0) + record.value}

    with Member(exactly_once(topic, handle, group, store=store)) as member:
        timer = threading.Timer(1.0, client.commit_transaction)
        timer.start()
        member.journal.wait_for(Step.HANDLED)
        timer.join()
        member.wait_committed({0: 1})
    assert stored(store) == {"sum": 15}


def test_a_handler_with_state_past_its_deadline_ends_its_process(cluster: Cluster) -> None:
    """The thread that polls is in it: another one sees that."""
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    put(topic, 1)
    script = (
        "import sys, threading\n"
        "from labkit.kafka.cluster import Cluster\n"
        "from labkit.kafka.consumer import Consumer\n"
        "from labkit.kafka.topics import Topic\n"
        "topic, store = (Topic(Cluster(sys.argv[1]), name, 1, int) for name in sys.argv[2:4])\n"
        "hang = lambda state, record: threading.Event().wait()\n"
        "Consumer(topic, hang, sys.argv[4], guarantee='exactly once', slot='one', store=store, deadline=0.5)"
        ".run(threading.Event())\n"
    )
    command = [sys.executable, "-c", script, cluster.bootstrap, topic.name, store.name, group]
    ended = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True)
    assert ended.returncode == EXIT_DEADLINE
    assert f"{topic.name}/0/0" in ended.stderr


def test_records_that_come_one_by_one_say_nothing_of_how_many_may_come(cluster: Cluster) -> None:
    """However quick they were: a burst behind them is cut by time, and committed while the rest is still to come."""
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    commits: list[int] = []

    def handle(state: Any, messages: Sequence[Message]) -> None:
        time.sleep(sum(0.01 for message in messages if message.value() == b"1"))  # the work itself

    def told(step: Step, subject: Any) -> None:
        if step is Step.COMMITTED:
            commits.append(subject[topic.name, 0])

    with Member(exactly_once(topic, handle, group, store=store, batch=1000, on_change=told)) as member:
        for number in range(8):
            put(topic, 0)
            member.journal.wait_for(Step.HANDLED, number + 1)
        transaction(topic, *[("a", 1)] * 200)
        member.wait_committed({0: 209})
    assert next(at for at in commits if at > 8) < 100


def test_values_that_fit_go_out_however_many_there_are(cluster: Cluster) -> None:
    """Those that the client sends together must fit, too."""
    topic, group = fresh_topic(cluster), fresh_group()
    store = store_topic(cluster, 1, str, {**COMPACTED, "max.message.bytes": "20000"})

    def handle(state: Mapping[str, str], record: Record[int]) -> dict[str, str]:
        return {str(record.value): secrets.token_hex(4000)}

    put(topic, *range(40))
    with Member(exactly_once(topic, handle, group, store=store, commit_interval=600)) as member:
        member.journal.wait_for(Step.HANDLED, 40)
    assert len(stored(store)) == 40


def test_a_store_that_refuses_a_value_is_named(cluster: Cluster) -> None:
    """Not the record that was the first to change the state."""
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, str)

    def handle(state: Mapping[str, str], record: Record[int]) -> dict[str, str]:
        return {"a": secrets.token_hex(record.value)}

    member = Member(exactly_once(topic, handle, group, store=store))
    member.__enter__()
    put(topic, 1)
    member.wait_committed({0: 1})
    alter(store, {"max.message.bytes": "1000"})
    put(topic, 5000)
    error = member.ends()
    assert isinstance(error, DeliveryFailed)
    assert store.name in str(error)
    assert topic.name not in str(error)


def test_of_a_transaction_that_is_committed_nothing_is_kept(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a state lived on when its partition has gone to others."""
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    made: list[ExactlyOnce] = []

    class Seen(ExactlyOnce):
        def start(self, client: Any) -> None:
            made.append(self)
            super().start(client)

    monkeypatch.setattr(loop_module, "ExactlyOnce", Seen)
    put(topic, 1)
    with Member(exactly_once(topic, lambda state, record: {"sum": 1}, group, store=store)) as member:
        member.wait_committed({0: 1})
    (commits,) = made
    assert (commits.positions, commits.outputs, commits.changes) == ({}, [], {})


def summing(topic: Topic[int], group: str, store: Topic[int], slot: str) -> Consumer:
    """It commits nothing by time; when two records are handled, at once."""

    def handle(state: Mapping[str, int], record: Record[int]) -> dict[str, int]:
        return {"sum": state.get("sum", 0) + record.value}

    return exactly_once(topic, handle, group, store=store, slot=slot, commit_interval=600, max_ahead=4)


def test_what_was_not_committed_of_a_topic_that_is_made_anew_is_not_written(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 32: its records are gone, and what they sent is not sent."""
    monkeypatch.setattr(loop_module, "GONE", ())  # else the client tells it, if it looks while there is none
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    member = Member(summing(topic, group, store, "one"))
    member.__enter__()
    put(topic, 1, 2)  # half of `max_ahead`: that is committed at once
    member.wait_committed({0: 2})
    put(topic, 4)
    member.journal.wait_for(Step.HANDLED, 3)
    make_anew(topic)
    assert isinstance(member.ends(), TopicMissing)
    assert stored(store) == {"sum": 3}


def test_nor_is_it_when_the_group_takes_the_partition_first(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 32: as it does when the client saw that there was no topic for a moment."""
    monkeypatch.setattr(loop_module, "GONE", ())
    monkeypatch.setattr(loop_module, "IDENTITY", 600)
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    member = Member(summing(topic, group, store, "one"))
    member.__enter__()
    put(topic, 1, 2)
    member.wait_committed({0: 2})
    put(topic, 4)
    member.journal.wait_for(Step.HANDLED, 3)
    make_anew(topic)
    with Member(summing(topic, group, store, "two")):
        assert isinstance(member.ends(), TopicMissing)
    assert stored(store) == {"sum": 3}


def test_a_store_that_is_made_anew_ends_the_consumer(cluster: Cluster) -> None:
    """correctness 32: what was counted is gone, and its records are committed. It says so, also who is started then."""
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)
    consumer = exactly_once(topic, lambda state, record: {"sum": state.get("sum", 0) + 1}, group, store=store)
    running, started = Member(consumer), Member(consumer)
    put(topic, 1)
    running.__enter__()
    running.wait_committed({0: 1})
    cluster.delete_topics([store.name])
    store.create(COMPACTED)
    put(topic, 2)
    assert isinstance(running.ends(), TopicMissing)
    started.__enter__()
    assert isinstance(started.ends(), TopicMissing)


def test_members_that_read_different_topics_do_not_write_one_state(cluster: Cluster) -> None:
    """One of them would have partition 0 of a topic, another one that of the other, and both its state."""
    first, second, group = fresh_topic(cluster, 2), fresh_topic(cluster, 2), fresh_group()
    store = store_topic(cluster, 2, int)
    with Member(exactly_once(first, lambda state, record: None, group, store=store)) as member:
        member.journal.wait(lambda: len(member.journal.assigned()) == 2, what="both partitions")
        other = Member(exactly_once([first, second], lambda state, record: None, group, store=store, slot="two"))
        other.__enter__()
        assert isinstance(other.ends(), TopicMismatch)


def test_who_interrupts_a_handler_with_state_is_heard(cluster: Cluster) -> None:
    """It may run in the main thread, where Ctrl-C comes."""
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)

    def handle(state: Any, record: Record[int]) -> None:
        raise KeyboardInterrupt

    put(topic, 1)
    member = Member(exactly_once(topic, handle, group, store=store))
    member.__enter__()
    assert isinstance(member.ends(), KeyboardInterrupt)
    assert committed(topic, group) == {}


def test_changes_that_were_given_up_meanwhile_are_not_missed_by_their_commit() -> None:
    state = PartitionState(0)
    changes: dict[bytes, bytes | None] = {b"a": b"", b"b": None, b"c": b"1"}
    state.apply(changes)
    state.changes.clear()
    state.committed(changes)
    assert state.changes == {}


def test_a_state_does_not_begin_while_records_wait_in_retry_topics(cluster: Cluster) -> None:
    """Those of the policy before lie where their key belongs: in the number of another state, maybe."""
    topic, group, store = fresh_topic(cluster), fresh_group(), store_topic(cluster, 1, int)

    def refuse(record: Record[int]) -> None:
        raise ConnectionError("no answer")

    put(topic, 1)
    with Member(RetryingConsumer(topic, refuse, group, retry=retry_topics(3600))) as member:
        member.wait_committed({0: 1})
    counting = RetryingConsumer(topic, print, group, guarantee="exactly once", slot="one", store=store)
    with pytest.raises(LabkitError, match="retry1-3600s"):
        counting.prepare()
