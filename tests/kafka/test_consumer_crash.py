"""A member that crashes at any step between fetch and commit: redelivered, never lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from consuming import Member, Process, committed, fresh_group, fresh_topic, put

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic


@dataclass(frozen=True)
class Crash:
    """Where a process ends itself."""

    step: Step
    count: int
    how: str
    """`kill` (SIGKILL) or `exit` (os._exit)."""

    def __str__(self) -> str:
        return f"{self.step.value}-{self.count}-{self.how}"


@dataclass(frozen=True)
class Remains:
    """What a crash left."""

    topic: Topic[Any]
    output: Topic[Any]
    group: str
    code: int
    handled: list[int]
    committed: int


CRASHES = [
    Crash(Step.ASSIGNED, 1, "kill"),
    Crash(Step.HANDLING, 1, "kill"),
    Crash(Step.HANDLING, 5, "exit"),
    Crash(Step.HANDLED, 1, "exit"),
    Crash(Step.HANDLED, 5, "kill"),
    Crash(Step.COMMITTING, 1, "exit"),
    Crash(Step.FLUSHED, 1, "kill"),
    Crash(Step.COMMITTED, 1, "kill"),
]


@pytest.fixture(scope="module")
def remains(cluster: Cluster) -> dict[Crash, Remains]:
    """All crashes one after the other, so that the dead members' sessions, of 6 s each, run out together."""
    found = {}
    for crash in CRASHES:
        topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
        put(topic, *range(10))
        options = {"crash_at": crash.step.value, "crash_count": crash.count, "crash_how": crash.how}
        with Process(topic, group, output=output.name, **options) as process:
            code = process.ends()
            handled = [offset for _, _, offset in process.of(Step.HANDLED)]
        found[crash] = Remains(topic, output, group, code, handled, committed(topic, group).get(0, 0))
    return found


@pytest.mark.parametrize("crash", CRASHES, ids=str)
def test_a_crash_at_any_step_loses_nothing(remains: dict[Crash, Remains], crash: Crash) -> None:
    """correctness 1, 10: what the dead member did not commit is handled by the next one."""
    left = remains[crash]
    assert left.code == (3 if crash.how == "exit" else -9)
    if crash.step is Step.COMMITTED:
        assert 0 < left.committed <= len(left.handled)
    elif crash.count > 1:  # on a slow machine a commit comes before the fifth record
        assert left.committed <= len(left.handled)
    else:
        assert left.committed == 0

    again: list[int] = []
    with Member(Consumer(left.topic, lambda record: again.append(record.value), left.group)) as member:
        put(left.topic, 10)
        member.wait_committed({0: 11}, timeout=20)
    assert again == list(range(left.committed, 11))
    with Reader(left.output) as reader:  # what was committed had its output confirmed
        assert {record.value for record in reader.read_to_end()} >= set(range(left.committed))
