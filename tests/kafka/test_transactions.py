"""Exactly once: outputs and offsets in one transaction, read as every reader of labkit reads."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from consuming import Member, alter, committed, fresh_group, fresh_topic, put
from processes import wait_until
from transacting import SETTINGS, Sending, exactly_once, retrying, values, visible

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import FailedRecord, Retry, SetAside
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import DeliveryFailed, LabkitError, PoisonRecord
from labkit.kafka.lag import lag
from labkit.kafka.producer import Producer, deliver
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.key_value_store import KeyValueStore
from labkit.patterns.retries import blocking, dead_letter, retry_topics


def test_outputs_and_offsets_become_visible_together(cluster: Cluster) -> None:
    """correctness 19, 23: before the commit the outputs are there, and only who reads uncommitted records sees them."""
    topic, output, group = fresh_topic(cluster, 3), fresh_topic(cluster), fresh_group()
    for partition in range(3):
        put(topic, *range(100 * partition, 100 * partition + 100), partition=partition)
    seen: list[tuple[list[int], int]] = []
    behind: list[int] = []

    def told(step: Step, subject: Any) -> None:
        if step is Step.FLUSHED and not seen:
            seen.append((values(output, committed=False), visible(output)))
            behind.append(sum(lag(cluster, group, [topic.name]).values()))  # told though the offsets are in it

    def handle(record: Record[int]) -> None:
        output.send(record.value)
        output.send(-record.value - 1)

    with Member(exactly_once(topic, handle, group, on_step=told)) as member:
        member.wait_committed({0: 100, 1: 100, 2: 100})
    assert sorted(values(output)) == list(range(-300, 300))
    assert seen[0][0]
    assert seen[0][1] == 0
    assert behind == [300]
    assert set(lag(cluster, group, [topic.name]).values()) == {0}


def test_a_handler_that_raises_has_sent_nothing_and_aborts_nothing(cluster: Cluster) -> None:
    """correctness 20: the attempt that succeeds counts, and its neighbours go out meanwhile."""
    topic, output, group = fresh_topic(cluster, 2), fresh_topic(cluster), fresh_group()
    put(topic, 0, 1, 2, partition=0)
    put(topic, 3, 4, 5, partition=1)
    attempts: list[int] = []

    def handle(record: Record[int]) -> None:
        output.send(record.value)
        if record.value == 1:
            attempts.append(1)
            if len(attempts) < 3:
                wait_until(lambda: {3, 4, 5} <= set(values(output)), what="the other partition's outputs")
                raise ConnectionError("no answer")

    with Member(retrying(topic, handle, group, blocking(0.01, 0.01, 0.01))) as member:
        member.wait_committed({0: 3, 1: 3})
    assert len(attempts) == 3
    assert sorted(values(output)) == list(range(6))


def test_retries_and_dead_letters_are_in_the_transaction(cluster: Cluster) -> None:
    """correctness 19: what was sent before the failure is not; each letter once; a replayed one leaves the queue."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, 0, 1, 2, 3, b"no number")
    broken = True

    def handle(record: Record[int]) -> None:
        output.send(record.value)
        if record.value == 1 and record.topic == topic.name:
            raise ConnectionError("no answer")
        if record.value == 2 and broken:
            raise ConnectionError("no answer")

    consumer = retrying(topic, handle, group, retry_topics(0.01))
    names = [one.name for one in consumer.sources]
    consumer.prepare()
    with Member(consumer) as member, DeadLetters(topic, group) as queue:
        member.wait_committed({0: 5})
        wait_until(lambda: len(queue) == 2, what="two letters")
        assert {letter.value for letter in queue.values()} == {"2", "no number"}
        broken = False
        queue.replay(f"{topic.name}/0/2")
        wait_until(lambda: len(queue) == 1, what="the replayed letter to go")
        member.journal.wait(lambda: not sum(lag(cluster, group, names).values()), what="no lag")
    assert sorted(values(output)) == [0, 1, 2, 3]


def test_in_order_of_keys_what_is_behind_a_slow_record_waits_for_it(cluster: Cluster) -> None:
    """correctness 19: it is handled meanwhile, and becomes visible with the slow one: no output before its offset."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    for number in range(20):
        put(topic, number, key="slow" if number == 5 else f"key {number % 3}")
    go_on = threading.Event()
    send = Sending(output)

    def handle(record: Record[int]) -> None:
        send(record)
        if record.key == "slow":
            assert go_on.wait(20)

    with Member(exactly_once(topic, handle, group, order="key")) as member:
        member.wait_committed({0: 5})
        member.journal.wait(lambda: len(send.calls) == 20, what="all others to be handled")
        assert sorted(values(output)) == list(range(5))
        go_on.set()
        member.wait_committed({0: 20})
    assert sorted(values(output)) == list(range(20))


def test_a_batch_its_dead_letter_and_its_offset_are_one(cluster: Cluster) -> None:
    """correctness 39: the poison in its middle is set aside; every other record has its output once."""
    topic, output, aside = fresh_topic(cluster), fresh_topic(cluster), fresh_topic(cluster, value=str)
    group = fresh_group()
    put(topic, *range(7), b"poison", *range(7, 20))

    def handle(batch: list[Record[int] | PoisonRecord]) -> None:
        for record in batch:
            if isinstance(record, PoisonRecord):
                raise record
            output.send(record.value)

    def policy(failed: FailedRecord) -> SetAside:
        return SetAside(aside.name, failed.place, b'"kept"')

    with Member(exactly_once(topic, handle, group, batch=10, on_failure=policy)) as member:
        member.wait_committed({0: 21})
    assert values(output) == list(range(20))
    assert values(aside) == ["kept"]


def refusing(cluster: Cluster) -> Topic[str]:
    """A topic that takes no large records."""
    topic = fresh_topic(cluster, value=str)
    alter(topic, {"max.message.bytes": "3000"})
    return topic


def send_large(output: Topic[str]) -> Callable[[Record[int]], None]:
    def handle(record: Record[int]) -> None:
        output.send(os.urandom(4000).hex() if record.value in (3, 5) else f"{record.value}")

    return handle


@pytest.mark.parametrize("interval", [0.05, 600], ids=["while it runs", "when it stops"])
def test_a_dead_letter_takes_the_place_of_an_output_that_is_refused(cluster: Cluster, interval: float) -> None:
    """correctness 19: the records around it, which went to the broker with it, have theirs."""
    topic, output, group = fresh_topic(cluster), refusing(cluster), fresh_group()
    put(topic, *range(10))
    consumer = retrying(topic, send_large(output), group, dead_letter(), commit_interval=interval)
    with Member(consumer) as member:
        member.journal.wait_for(Step.HANDLED, 10)
    assert committed(topic, group) == {0: 10}
    assert values(output) == [f"{number}" for number in range(10) if number not in (3, 5)]
    with DeadLetters(topic, group) as queue:
        assert {letter.offset for letter in queue.values()} == {3, 5}
        assert all(output.name in letter.error for letter in queue.values())


def test_without_a_place_for_dead_letters_an_output_that_is_refused_ends_the_consumer(cluster: Cluster) -> None:
    topic, output, group = fresh_topic(cluster), refusing(cluster), fresh_group()
    put(topic, *range(10))
    member = Member(exactly_once(topic, send_large(output), group))
    member.__enter__()
    error = member.ends()
    assert isinstance(error, DeliveryFailed)
    assert f"{topic.name}/0/3" in str(error) or f"{topic.name}/0/5" in str(error)
    assert committed(topic, group).get(0, 0) <= 5


def test_max_ahead_bounds_what_waits_for_a_commit(cluster: Cluster) -> None:
    """The commit comes at once when half of it is finished: the interval slows nobody down."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(200))
    at, most = 0, 0

    def told(step: Step, subject: Any) -> None:
        nonlocal at
        if step is Step.COMMITTED:
            at = subject[topic.name, 0]

    def handle(record: Record[int]) -> None:
        nonlocal most
        most = max(most, record.offset - at)
        output.send(record.value)

    consumer = exactly_once(topic, handle, group, max_ahead=20, commit_interval=600, on_step=told)
    with Member(consumer) as member:
        member.journal.wait(lambda: at >= 180, what="commits before their time")
    assert most <= 20
    assert values(output) == list(range(committed(topic, group)[0]))


def compacted(cluster: Cluster) -> Topic[int]:
    """A topic for a store."""
    topic = Topic(cluster, f"test.{fresh_group()}", 1, int)
    topic.create({"cleanup.policy": "compact"})
    return topic


WAYS: dict[str, Callable[[Topic[Any], Topic[Any]], Any]] = {
    "flush": lambda output, _: output.flush(),
    "deliver": lambda output, _: output.deliver([(1, None, None)]),
    "deliver raw": lambda output, _: deliver(output.cluster, output.name, [(b"1", None, None)]),
    "a producer of its own": lambda output, _: Producer(output.cluster).send(output.name, b"1"),
    "another cluster": lambda output, elsewhere: elsewhere.send(1),
}


def test_a_handler_is_refused_what_no_transaction_holds(cluster: Cluster) -> None:
    """correctness 19: by name, before anything is sent, and with the way out."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    elsewhere = Topic(Cluster(cluster.bootstrap, (("client.id", "another"),)), output.name, 1, int)
    put(topic, 1)
    told: dict[str, str] = {}
    with KeyValueStore(compacted(cluster)) as store:

        def by_a_thread(*_: Any) -> None:
            errors: list[BaseException] = []

            def send() -> None:
                try:
                    output.send(1)
                except LabkitError as error:
                    errors.append(error)

            thread = threading.Thread(target=contextvars.copy_context().run, args=(send,))
            thread.start()
            thread.join()
            raise errors[0]

        def handle(record: Record[int]) -> None:
            ways = {**WAYS, "put": lambda *_: store.put("a", 1), "a thread": by_a_thread}
            for name, way in ways.items():
                try:
                    way(output, elsewhere)
                except LabkitError as error:
                    told[name] = str(error)
            output.send(2)

        with Member(exactly_once(topic, handle, group)) as member:
            member.wait_committed({0: 1})
    assert told.keys() == {*WAYS, "put", "a thread"}
    assert all("topic.send" in text or "Send in the handler" in text for text in told.values())
    assert values(output) == [2]


def test_what_has_no_transaction_is_refused_when_it_is_made(cluster: Cluster) -> None:
    topic = Topic(cluster, "never-made", 1, int)
    for options in ({"positions": lambda places: {}}, {"batch": 10, "order": "key"}, {"guarantee": "twice"}):
        with pytest.raises(LabkitError, match=next(iter(options))):
            Consumer(topic, print, "group", **{**SETTINGS, **options})
    unnamed = Consumer(fresh_topic(cluster), print, fresh_group(), guarantee="exactly once")
    with pytest.raises(LabkitError, match="slot"):
        unnamed.run(threading.Event())


def test_a_group_becomes_exactly_once(cluster: Cluster) -> None:
    """What it has committed counts. A member of the other guarantee does not get in while one is there."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    send = Sending(output)
    put(topic, 0)
    with Member(Consumer(topic, send, group)) as member:
        member.wait_committed({0: 1})
        other = Member(exactly_once(topic, send, group))
        other.__enter__()
        assert "guarantee" in str(other.ends())
    put(topic, 1)
    with Member(exactly_once(topic, send, group)) as member:
        member.wait_committed({0: 2})
    assert values(output) == [0, 1]
    assert send.calls == {0: 1, 1: 1}


@pytest.mark.long
def test_a_group_that_was_exactly_once_becomes_at_least_once(cluster: Cluster) -> None:
    """Its slots stay members for a session, and nobody of the other guarantee gets in; then the group goes on."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    send = Sending(output)
    put(topic, 0)
    with Member(exactly_once(topic, send, group)) as member:
        member.wait_committed({0: 1})
    put(topic, 1)
    until = time.monotonic() + 60
    while True:  # as a deployment does
        member = Member(Consumer(topic, send, group))
        member.__enter__()
        wait_until(lambda: member.error is not None or committed(topic, group) == {0: 2}, what="a word")  # noqa: B023
        if member.error is None:
            member.stop()
            break
        assert time.monotonic() < until
        assert "guarantee" in str(member.ends())
    assert values(output) == [0, 1]


@pytest.mark.long  # test_transactional_readers.py
def test_a_consumer_and_a_store_read_over_markers(cluster: Cluster) -> None:
    """correctness 25: of what was made exactly once readers are done although the last offsets are markers."""
    topic, output, group = fresh_topic(cluster), compacted(cluster), fresh_group()
    with Member(exactly_once(topic, Sending(output), group, commit_interval=0.001)) as member:
        for number in range(10):
            put(topic, number, key=f"{number % 2}")
            member.wait_committed({0: number + 1})
    following: list[int] = []
    reading = fresh_group()
    with (
        KeyValueStore(output) as store,
        Member(exactly_once(output, lambda record: following.append(record.value), reading)) as second,
    ):
        assert store.snapshot() == {"0": 8, "1": 9}
        second.journal.wait(lambda: set(lag(cluster, reading, [output.name]).values()) == {0}, what="no lag")
    assert following == list(range(10))


def test_a_policy_that_retries_for_ever_holds_nobody_else_up(cluster: Cluster) -> None:
    """No transaction is open while a lane backs off."""
    topic, output, group = fresh_topic(cluster, 2), fresh_topic(cluster), fresh_group()
    put(topic, 0, partition=0)
    put(topic, *range(1, 50), partition=1)
    send = Sending(output)

    def handle(record: Record[int]) -> None:
        if record.value == 0:
            raise ConnectionError("no answer")
        send(record)

    with Member(exactly_once(topic, handle, group, on_failure=lambda failed: Retry(60))) as member:
        member.wait_committed({1: 49})
        assert sorted(values(output)) == list(range(1, 50))
