"""kill -9 at each named step between publishing to a retry topic and the commit: nothing is lost, nothing early."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
from consuming import Member, Process, committed, fresh_group, fresh_topic, put

from labkit.kafka.cluster import Cluster
from labkit.kafka.lag import lag
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.steps import Step
from labkit.kafka.topics import Topic
from labkit.patterns.retries import RetryingConsumer, retry_topics
from labkit.patterns.trails import HEADER, parse

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
            set_aside = {record.value for record in reader.rest()}
        found[step] = Remains(topic, group, committed(topic, group).get(0, 0), set_aside)
    return found


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.value)
def test_a_crash_after_publishing_loses_nothing(remains: dict[Step, Remains], step: Step) -> None:
    """correctness 10, 11: what is committed was in the retry topic before; the rest is delivered again."""
    left = remains[step]
    assert set(range(left.committed)) <= left.set_aside
    assert left.set_aside, "it crashed before it published"
    done: list[int] = []
    early: list[float] = []

    def handle(record: Record[int]) -> None:
        trail = parse(record.headers.get(HEADER))
        if trail is None:
            raise ConnectionError("no answer")
        if time.time() < trail.failed[-1] + DELAY:
            early.append(record.value)
        done.append(record.value)

    consumer = RetryingConsumer(left.topic, handle, left.group, retry=retry_topics(DELAY))
    names = [topic.name for topic in consumer.sources]
    with Member(consumer) as member:
        member.journal.wait(lambda: not sum(lag(consumer.cluster, left.group, names).values()), 25, "no lag")
    assert set(done) == set(range(RECORDS))
    assert early == []
    assert len(done) <= RECORDS + len(left.set_aside)  # those published and not committed come twice
