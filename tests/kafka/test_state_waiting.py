"""Handlers with state and records that wait for their time: none is early, none is lost, nobody else is held up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from aggregating import stored
from consuming import Member, committed, fresh_group, fresh_topic, put
from stores import store_topic
from transacting import exactly_once, values

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import FailedRecord, SetAside
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import lag
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic

FAR = 3600.0  # seconds that no test waits for


class Waiting:
    """A consumer of a main topic, and of one whose records wait; it adds them up and notes when it was called."""

    def __init__(self, cluster: Cluster, delay: float, partitions: int = 1, **options: Any) -> None:
        self.delay = delay
        self.main, self.later = fresh_topic(cluster, partitions), fresh_topic(cluster, partitions)
        self.store, self.group = store_topic(cluster, partitions, int), fresh_group()
        self.early: list[str] = []
        self.calls: list[tuple[str, int, int]] = []
        not_before = {self.later.name: self.due}
        self.consumer = exactly_once(
            [self.main, self.later], self.handle, self.group, store=self.store, not_before=not_before, **options
        )

    def due(self, record: Record[int]) -> float:
        return record.timestamp + self.delay

    def handle(self, state: Mapping[str, int], record: Record[int]) -> Mapping[str, int]:
        waits = record.topic == self.later.name
        if waits and time.time() < self.due(record):
            self.early.append(record.place)
        self.calls.append(("later" if waits else "main", record.partition, record.value))
        key = f"sum-{record.partition}"
        return {key: state.get(key, 0) + record.value}

    def committed(self, topic: Topic[Any]) -> dict[int, int]:
        return committed(topic, self.group)

    def all_done(self) -> bool:
        return not sum(lag(self.main.cluster, self.group, [self.main.name, self.later.name]).values())


def test_a_record_that_waits_holds_up_nobody_else_and_comes_again_after_a_restart(cluster: Cluster) -> None:
    """correctness 11: the other topic of its number, and other partitions of its own topic, go on; none is early."""
    waiting = Waiting(cluster, 0.5, partitions=2)
    far = {waiting.later.name: lambda record: waiting.due(record) if record.partition else time.time() + FAR}
    put(waiting.later, 1, 2, partition=0)
    with Member(replace(waiting.consumer, not_before=far)) as member:
        put(waiting.main, 10, 20, partition=0)
        put(waiting.later, 3, 4, partition=1)
        member.journal.wait(lambda: len(waiting.calls) == 4, what="all but those that wait")
    assert waiting.committed(waiting.later).get(0, 0) == 0
    assert not waiting.early
    with Member(waiting.consumer) as member:
        member.journal.wait(waiting.all_done, what="no lag")
    assert waiting.calls[4:] == [("later", 0, 1), ("later", 0, 2)]
    assert stored(waiting.store) == {"sum-0": 33, "sum-1": 7}


def test_what_waits_goes_with_its_partition(cluster: Cluster) -> None:
    """A second member takes half of it: each record is handled once, none early."""
    waiting = Waiting(cluster, 1.5, partitions=4)
    for number in range(4):
        put(waiting.later, 1, 2, 3, partition=number)
    with Member(waiting.consumer) as first:
        first.journal.wait(lambda: len(first.journal.assigned()) == 8, what="all partitions")
        with Member(replace(waiting.consumer, slot="two")) as second:
            second.journal.wait(lambda: len(second.journal.assigned()) == 4, what="its share")
            first.journal.wait(waiting.all_done, what="no lag")
    assert not waiting.early
    assert stored(waiting.store) == {f"sum-{number}": 6 for number in range(4)}


def test_many_records_that_wait_are_bounded_by_max_ahead(cluster: Cluster) -> None:
    """Beyond that the partition is paused; the other topic goes on, and all are handled when it is time."""
    waiting = Waiting(cluster, FAR, max_ahead=100)
    put(waiting.later, *[1] * 1000)
    with Member(waiting.consumer) as member:
        for number in range(20):
            put(waiting.main, number)
            member.wait_committed({0: number + 1})
        waiting.delay = 0.0
    with Member(waiting.consumer) as member:
        member.journal.wait(waiting.all_done, what="no lag")
    assert stored(waiting.store) == {"sum-0": 1000 + sum(range(20))}


def test_a_record_whose_time_cannot_be_told_is_set_aside(cluster: Cluster) -> None:
    """One that does not decode, and one of which `not_before` fails: what is behind them is handled."""
    aside = fresh_topic(cluster)

    def policy(failed: FailedRecord) -> SetAside:
        return SetAside(aside.name, failed.place, failed.message.value())

    waiting = Waiting(cluster, 0.0, on_failure=policy)

    def due(record: Record[int]) -> float:
        return record.timestamp + 0 // record.value

    consumer: Consumer = replace(waiting.consumer, not_before={waiting.later.name: due})
    put(waiting.later, 1, b'"no number"', 0, 4)
    with Member(consumer) as member:
        member.journal.wait(waiting.all_done, what="no lag")
    assert stored(waiting.store) == {"sum-0": 5}
    assert len(values(replace(aside, value=Any))) == 2


def test_of_a_record_that_fails_for_good_nothing_behind_it_counts(cluster: Cluster) -> None:
    """Without a place for it the consumer ends; what was handled before it is committed."""
    waiting = Waiting(cluster, 0.0)

    def handle(state: Mapping[str, int], record: Record[int]) -> Mapping[str, int]:
        return {"sum": state.get("sum", 0) + 10 // record.value}

    put(waiting.later, 1, 2, 0, 5)
    member = Member(replace(waiting.consumer, handler=handle))
    member.__enter__()
    assert isinstance(member.ends(), LabkitError)
    assert waiting.committed(waiting.later) == {0: 2}
    assert stored(waiting.store) == {"sum": 15}


def test_records_that_wait_do_not_come_in_batches(cluster: Cluster) -> None:
    with pytest.raises(LabkitError):
        Waiting(cluster, 0.0, batch=10)


def test_hooks_are_told_of_a_record_when_it_is_handled(cluster: Cluster) -> None:
    """Not when it begins to wait."""
    waiting = Waiting(cluster, 0.5)
    put(waiting.later, 1)
    told: list[bool] = []

    def hook(step: Step, subject: Any) -> None:
        if step is Step.HANDLING:
            told.append(time.time() >= waiting.due(subject))

    with Member(replace(waiting.consumer, on_step=hook)) as member:
        member.journal.wait(waiting.all_done, what="no lag")
    assert told == [True]
