"""kill -9 at each named step between setting a record aside, or replaying it, and the commit: nothing is lost, nothing
early."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
from consuming import Member, Process, committed, fresh_group, fresh_topic, put
from processes import wait_until

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.lag import lag
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import RetryingConsumer, dead_letter, retry_topics
from labkit.patterns.retry_history import HEADER, parse

STEPS = [Step.FAILED, Step.RECOVERED, Step.COMMITTING, Step.FLUSHED, Step.COMMITTED]
DELAY = 0.5
RECORDS = 5


@dataclass(frozen=True)
class Remains:
    topic: Topic[Any]
    group: str
    committed: int
    set_aside: set[int]
    """What was in the retry topic when the process was dead."""


@pytest.fixture(scope="module")
def remains(cluster: Cluster) -> dict[Step, Remains]:
    """All crashes one after the other, so that the dead members' sessions, of 6 s each, run out together."""
    found = {}
    for step in STEPS:
        topic, group = fresh_topic(cluster), fresh_group()
        put(topic, *range(RECORDS))
        with Process(topic, group, retry_topics=[DELAY], crash_at=step.value) as process:
            assert process.ends() == -9
        retries = RetryingConsumer(topic, print, group, retry=retry_topics(DELAY)).sources[2]
        with Reader(retries) as reader:
            set_aside = {record.value for record in reader.read_to_end()}
        found[step] = Remains(topic, group, committed(topic, group).get(0, 0), set_aside)
    return found


@pytest.mark.long  # several kills; test_consumer_crash.py has them without retries
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.value)
def test_a_crash_after_publishing_loses_nothing(remains: dict[Step, Remains], step: Step) -> None:
    """correctness 10, 11: what is committed was in the retry topic before; the rest is delivered again."""
    left = remains[step]
    assert set(range(left.committed)) <= left.set_aside
    assert left.set_aside or step is Step.FAILED, "it crashed before it published"
    done: list[int] = []
    early: list[float] = []

    def handle(record: Record[int]) -> None:
        history = parse(record.headers.get(HEADER))
        if history is None:
            raise ConnectionError("no answer")
        if time.time() < history.failed[-1] + DELAY:
            early.append(record.value)
        done.append(record.value)

    consumer = RetryingConsumer(left.topic, handle, left.group, retry=retry_topics(DELAY))
    names = [topic.name for topic in consumer.sources]
    with Member(consumer) as member:
        member.journal.wait(lambda: not sum(lag(consumer.cluster, left.group, names).values()), 25, "no lag")
    with DeadLetters(left.topic, left.group) as queue:  # on a slow machine one was due, and refused, before the crash
        dead = {letter.offset for letter in queue.values()}
    assert set(done) | dead == set(range(RECORDS))
    assert early == []
    assert len(done) <= RECORDS + len(left.set_aside)  # those published and not committed come twice


@pytest.fixture(scope="module")
def dead(cluster: Cluster) -> dict[Step, tuple[Topic[Any], str]]:
    """Topics and groups of processes that were killed on the way to the dead letters."""
    found = {}
    for step in STEPS:
        topic, group = fresh_topic(cluster), fresh_group()
        put(topic, *range(RECORDS))
        with Process(topic, group, dead_letter=True, crash_at=step.value) as process:
            assert process.ends() == -9
        found[step] = (topic, group)
    return found


def refuse(record: Record[int]) -> None:
    raise ConnectionError("no answer")


def run_to_rest(consumer: RetryingConsumer) -> None:
    names = [topic.name for topic in consumer.sources]
    with Member(consumer) as member:
        member.journal.wait(lambda: not sum(lag(consumer.cluster, consumer.group, names).values()), 25, "no lag")


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.value)
def test_a_crash_on_the_way_to_the_dead_letters_loses_nothing(
    dead: dict[Step, tuple[Topic[Any], str]], step: Step
) -> None:
    """correctness 10: what is committed is among them; in the end each is there, once."""
    topic, group = dead[step]
    with DeadLetters(topic, group) as queue:
        assert {one.offset for one in queue.values()} >= set(range(committed(topic, group).get(0, 0)))
        run_to_rest(RetryingConsumer(topic, refuse, group, retry=dead_letter()))
        wait_until(lambda: len(queue) == RECORDS, 10, "all letters")
        assert sorted(queue) == sorted(f"{topic.name}/0/{number}" for number in range(RECORDS))


REPLAYING = [Step.COMMITTING, Step.FLUSHED, Step.COMMITTED]


@pytest.fixture(scope="module")
def replayed(cluster: Cluster) -> dict[Step, tuple[Topic[Any], str, int]]:
    """Topics and groups of processes that were killed when they had handled replayed records, and how many of these."""
    found = {}
    for step in REPLAYING:
        topic, group = fresh_topic(cluster), fresh_group()
        put(topic, *range(RECORDS))
        run_to_rest(RetryingConsumer(topic, refuse, group, retry=dead_letter()))
        with DeadLetters(topic, group) as queue:
            assert queue.replay() == RECORDS
        with Process(topic, group, dead_letter=True, mended=True, crash_at=step.value) as process:
            assert process.ends() == -9
            found[step] = (topic, group, len(process.of(Step.HANDLED)))
    return found


@pytest.mark.long
@pytest.mark.parametrize("step", REPLAYING, ids=lambda step: step.value)
def test_a_crash_after_a_replay_leaves_no_finished_letter(
    replayed: dict[Step, tuple[Topic[Any], str, int]], step: Step
) -> None:
    """correctness 18: what had left the queue was handled; in the end all was, and nothing is in it."""
    topic, group, handled = replayed[step]
    with DeadLetters(topic, group) as queue:
        assert RECORDS - len(queue) <= handled
        again: list[int] = []
        run_to_rest(RetryingConsumer(topic, lambda record: again.append(record.value), group, retry=dead_letter()))
        wait_until(lambda: len(queue) == 0, 10, "an empty queue")
    assert handled + len(again) >= RECORDS
