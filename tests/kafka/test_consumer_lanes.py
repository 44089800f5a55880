"""Lanes at work: order, parallelism, back-pressure, what a blocked lane does to others."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest
from consuming import Member, Process, committed, fresh_group, fresh_topic, put

import labkit.kafka.consumer.loop as module
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import EXIT_DEADLINE, Consumer
from labkit.kafka.consumer.failures import keep_trying
from labkit.kafka.consumer.steps import Step
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic


def put_keys(topic: Topic[Any], keys: int, each: int) -> None:
    """Numbers 0, 1, 2 … of each key, the keys mixed."""
    sender = Producer(topic.cluster)
    for number in range(each):
        for key in range(keys):
            sender.send(topic.name, str(number).encode(), f"k{key}")
    sender.flush()


def test_key_order_keeps_each_keys_order_and_handles_keys_at_once(cluster: Cluster) -> None:
    """correctness 7"""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put_keys(topic, keys=8, each=25)
    seen: dict[str, list[int]] = defaultdict(list)
    lock, running, most = threading.Lock(), 0, 0

    def handle(record: Record[int]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)  # the work
        assert record.key is not None
        seen[record.key].append(record.value)
        with lock:
            running -= 1

    with Member(Consumer(topic, handle, group, order="key", workers=8)) as member:
        member.journal.wait(lambda: sum(committed(topic, group).values()) == 200)
    assert dict(seen) == {f"k{key}": list(range(25)) for key in range(8)}
    assert 2 < most <= 8  # more than there are partitions, no more than there are workers


def test_a_failing_key_leaves_the_other_keys_alone_and_holds_the_commit(cluster: Cluster) -> None:
    """correctness 1, 7"""
    topic, group = fresh_topic(cluster), fresh_group()
    put_keys(topic, keys=4, each=10)
    well = threading.Event()

    def handle(record: Record[int]) -> None:
        if record.key == "k2" and record.value == 1 and not well.is_set():
            raise ValueError("not yet")

    with Member(Consumer(topic, handle, group, order="key", on_failure=keep_trying(0.02, 0.05))) as member:
        member.journal.wait(lambda: len(member.journal.of(Step.HANDLED)) == 31)
        member.wait_committed({0: 6})
        well.set()
        member.wait_committed({0: 40})
    assert [record.value for record in member.journal.of(Step.HANDLED) if record.key == "k2"] == list(range(10))


@pytest.mark.parametrize("order", ["partition", pytest.param("key", marks=pytest.mark.long)])
def test_a_blocked_record_bounds_what_is_read_ahead(cluster: Cluster, order: Any) -> None:
    """correctness 7: never more than max_ahead, and all of it goes on once the block is gone."""
    topic, group = fresh_topic(cluster), fresh_group()
    put_keys(topic, keys=10, each=100)
    going_on = threading.Event()
    handled: list[int] = []

    def handle(record: Record[int]) -> None:
        if record.offset == 100:
            going_on.wait(20)
        handled.append(record.offset)

    with Member(Consumer(topic, handle, group, order=order, max_ahead=64, commit_interval=0.05)) as member:
        member.wait_committed({0: 100})
        if order == "key":  # the other keys of what is read ahead go on: 90 % of it
            member.journal.wait(lambda: len(handled) > 100 + 40)
        put(topic, 0, partition=0)
        assert max(handled) < 100 + 64
        going_on.set()
        member.wait_committed({0: 1001})
    assert sorted(handled) == list(range(1001))
    if order == "partition":
        assert handled == list(range(1001))


def test_a_slow_handler_holds_back_its_partition_only(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 7: what is fetched and unfinished stays bounded, whatever the topic holds."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in (0, 1):
        put(topic, *range(3000), partition=partition)
    most: dict[int, int] = defaultdict(int)
    add = module.Partition.add

    def watched(self: Any, messages: Any, by_key: bool) -> Any:
        woken = add(self, messages, by_key)
        most[self.number] = max(most[self.number], self.ahead())
        return woken

    monkeypatch.setattr(module.Partition, "add", watched)
    going_on = threading.Event()

    def handle(record: Record[int]) -> None:
        if record.partition == 0:
            going_on.wait(20)

    with Member(Consumer(topic, handle, group, max_ahead=300)) as member:
        member.journal.wait(lambda: committed(topic, group).get(1) == 3000)
        assert committed(topic, group).get(0, 0) == 0
        going_on.set()
        member.wait_committed({0: 3000, 1: 3000})
    assert 100 <= most[0] <= 300
    assert most[1] <= 300


@pytest.mark.long
def test_back_pressure_does_not_fetch_a_backlog_again_and_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause throws away what was fetched ahead: with slow handlers a backlog was fetched up to 100 times."""
    topic, group, fetched = fresh_topic(cluster), fresh_group(), [0]
    sender = Producer(cluster)
    for _ in range(1500):
        sender.send(topic.name, b'"%s"' % (b"x" * 20_000))
    sender.flush()

    def told(statistics: str) -> None:
        fetched[0] = json.loads(statistics)["rxmsgs"]

    client = module.Client
    listens = {"statistics.interval.ms": 50, "stats_cb": told}
    monkeypatch.setattr(module, "Client", lambda config: client({**config, **listens}))

    def slow(record: Record[str]) -> None:
        time.sleep(0.002)

    consumer = Consumer(replace(topic, value=str), slow, group, max_ahead=200, commit_interval=0.05)
    with Member(consumer) as member:
        member.wait_committed({0: 1500})
    assert 1500 <= fetched[0] < 3 * 1500


def test_sixteen_blocked_partitions_of_32(cluster: Cluster) -> None:
    """correctness 4, 7: half are full and paused; the others go on; then all go on."""
    topic, group = fresh_topic(cluster, 32), fresh_group()
    for partition in range(32):
        put(topic, *range(40), partition=partition)
    blocked = set(range(0, 32, 2))
    well = threading.Event()
    handled: dict[int, list[int]] = defaultdict(list)

    def handle(record: Record[int]) -> None:
        if record.partition in blocked and record.value == 10 and not well.is_set():
            raise ValueError("blocked")
        handled[record.partition].append(record.value)

    consumer = Consumer(topic, handle, group, workers=4, max_ahead=10, on_failure=keep_trying(0.05, 0.1))
    with Member(consumer) as member:
        member.wait_committed({partition: 10 if partition in blocked else 40 for partition in range(32)})
        for partition in range(1, 32, 2):
            put(topic, 40, partition=partition)
        member.wait_committed({partition: 10 if partition in blocked else 41 for partition in range(32)})
        well.set()
        member.wait_committed({partition: 40 if partition in blocked else 41 for partition in range(32)})
    assert all(handled[partition] == list(range(40)) for partition in blocked)


def test_a_paused_partition_goes_on_although_a_key_of_it_is_blocked(cluster: Cluster) -> None:
    """correctness 7: it was full because of one key; another key that fails must not keep it paused for ever."""
    topic, group = fresh_topic(cluster), fresh_group()
    sender = Producer(cluster)
    for offset in range(400):
        key = {0: "first", 60: "second"}.get(offset, "others")
        sender.send(topic.name, str(offset).encode(), key)
    sender.flush()
    first, second = threading.Event(), threading.Event()

    def handle(record: Record[int]) -> None:
        if record.key == "first":
            first.wait(20)
        if record.key == "second":
            second.wait(20)

    consumer = Consumer(topic, handle, group, order="key", max_ahead=64, commit_interval=0.05)
    with Member(consumer) as member:
        member.journal.wait(lambda: len(member.journal.of(Step.HANDLED)) >= 61)
        paused = len(member.journal.of(Step.HANDLED))
        assert paused < 64
        first.set()
        member.wait_committed({0: 60})
        member.journal.wait(lambda: len(member.journal.of(Step.HANDLED)) > paused + 20)
        second.set()
        member.wait_committed({0: 400})


@pytest.mark.long
def test_one_record_is_handled_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 8: a batch that waits to fill would take its whole time limit."""
    monkeypatch.setattr(module, "TURN", 1.0)  # that limit, far above what a busy machine takes
    topic, group = fresh_topic(cluster), fresh_group()
    arrived = threading.Event()
    with Member(Consumer(topic, lambda record: arrived.set(), group)) as member:
        member.journal.wait_for(Step.ASSIGNED)
        waits = []
        for number in range(20):
            arrived.clear()
            put(topic, number)
            began = time.monotonic()
            assert arrived.wait(5)
            waits.append(time.monotonic() - began)
    assert min(waits) < 0.04  # waiting to fill would have held up each of them


def test_a_handler_past_its_deadline_ends_the_process(cluster: Cluster) -> None:
    """correctness 7: exit code 70, the record's place and the stacks on stderr, nothing committed."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)
    with Process(topic, group, hang=60, deadline=0.5) as process:
        assert process.ends() == EXIT_DEADLINE
    assert f"handler of {topic.name}/0/0 has run for more than its deadline of 0.5 s" in process.stderr
    assert "in handle" in process.stderr
    assert committed(topic, group) == {}


@pytest.mark.long
def test_a_frozen_process_does_not_age(cluster: Cluster) -> None:
    """correctness 7: while it is on ice, another one comes to its deadline, which is as long and began later."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)
    with Process(topic, group, hang=2, deadline=6.0) as process:
        process.wait_for(Step.HANDLING)
        process.freeze()
        with Process(topic, fresh_group(), hang=60, deadline=6.0) as other:
            assert other.ends() == EXIT_DEADLINE
        process.thaw()
        process.wait_for(Step.COMMITTED)


@pytest.mark.long
def test_a_handler_that_hangs_is_missed_though_its_partition_is_gone(cluster: Cluster) -> None:
    """correctness 7: else a worker less, and in the end none, works on what the member has."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0)
    with Process(topic, group, hang=60, deadline=5.0) as process:
        process.wait_for(Step.HANDLING)
        process.freeze()
        with Member(Consumer(topic, lambda record: None, group)) as member:
            member.wait_committed({0: 1})
            process.thaw()
            process.wait_for(Step.LOST)
            assert process.ends() == EXIT_DEADLINE


@pytest.mark.long
def test_no_partition_waits_for_another_ones_backlog(cluster: Cluster) -> None:
    """correctness 7: the client delivers partition after partition; a slow, full one must not keep the next away."""
    topic = fresh_topic(cluster, 16)
    for partition in range(16):
        put(topic, *range(700), partition=partition)
    handled: Counter[int] = Counter()
    ahead: list[int] = []

    def handle(record: Record[int]) -> None:
        if record.value == 0:
            ahead.append(max(handled.values(), default=0))
        handled[record.partition] += 1
        time.sleep(0.003)  # the work

    with Member(Consumer(topic, handle, fresh_group(), max_ahead=1000)) as member:
        member.journal.wait(lambda: len(ahead) == 16, what="a record of each partition")
    assert max(ahead) < 300  # how far the first was when the last began; they would work side by side
