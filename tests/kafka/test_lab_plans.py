"""What `lab.when` plans: done once its condition holds while there is work, dropped when all came to rest before."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab_helpers import Order, orders
from processes import wait_until

from labkit import Lab
from labkit.lab.faults.planned import Planned
from labkit.lab.verdict.settling import QUIET
from labkit.runtime.which_kafka import Connection

pytestmark = pytest.mark.usefixtures("connection")


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("plans")
    yield lab
    lab._end(0)


def plan(lab: Lab, condition: Callable[[], bool], action: Callable[[], object]) -> tuple[Planned, threading.Thread]:
    """Plan something; its thread as well."""
    before = set(threading.enumerate())
    planned = lab.when(condition, action)
    (thread,) = (one for one in threading.enumerate() if one not in before and one.name == "planned")
    return planned, thread


def test_a_plan_whose_condition_does_not_come_is_dropped_at_rest(lab: Lab) -> None:
    load = lab.load(lab.topic("orders", 1, Order), orders(30), rate=100)
    true, done = threading.Event(), []
    planned, thread = plan(lab, true.is_set, lambda: done.append("it"))
    load.wait()
    begun = time.monotonic()
    assert lab.settle(20)
    assert time.monotonic() - begun > QUIET
    assert repr(planned).endswith("did not happen: all came to rest before its condition held")
    thread.join(5)
    assert not thread.is_alive()
    true.set()
    assert lab.settle(5)  # it waits for nothing any more
    assert done == []


@pytest.mark.long
def test_a_plan_waits_as_long_as_there_is_work(lab: Lab) -> None:
    load = lab.load(lab.topic("orders", 1, Order), orders(300), rate=100)  # twice as long as it would take to drop it
    done = []
    planned, _ = plan(lab, lambda: load.count >= 250, lambda: done.append(load.count))
    assert lab.settle(20)
    assert done[0] >= 250
    assert repr(planned) == "planned (action) done"


@pytest.mark.long
@pytest.mark.parametrize("too_late", [lambda: True, lambda: 1 / 0], ids=["true", "error"])
def test_a_condition_that_is_looked_at_while_its_plan_is_dropped_comes_too_late(
    lab: Lab, too_late: Callable[[], bool]
) -> None:
    looking, dropped, done = threading.Event(), threading.Event(), []

    def condition() -> bool:
        looking.set()
        return dropped.wait(20) and too_late()

    planned, thread = plan(lab, condition, lambda: done.append("it"))
    assert looking.wait(5)
    assert lab.settle(10)
    dropped.set()
    thread.join(5)
    assert not thread.is_alive()
    assert done == []
    assert "did not happen" in repr(planned)
    assert lab.settle(5)


CELL = """
def action():
    done["function"] += 1

def function(who="by default", *, times=1000):
    done[who] += times // 1000

planned = [lab.when(begun.is_set, action), lab.when(lambda: begun.is_set(), function)]
planned += [lab.when(begun.is_set, pod.kill) for pod in pods]
planned += [lab.when(begun.is_set, lambda each=each: done.update([each])) for each in ("one", "two")]
planned += [lab.when(begun.is_set, lambda *, each=each: done.update([each])) for each in ("three", "four")]
planned += [lab.when(lambda count=count: begun.is_set(), pods[0].kill) for count in (100, 200)]
"""


def test_what_is_planned_again_is_done_once(lab: Lab) -> None:
    """By a cell that runs twice: a method, or a function that was compiled anew. What differs is done too."""
    begun, done = threading.Event(), Counter[str]()

    class Pod:
        def kill(self) -> None:
            done["method"] += 1

    names: dict[str, Any] = {"lab": lab, "begun": begun, "done": done, "pods": [Pod(), Pod()]}
    runs: list[list[Planned]] = []
    for _ in range(2):
        exec(compile(CELL, "cell", "exec"), names)
        runs.append(names["planned"])
    assert {repr(one).partition(") ")[2] for one in runs[0]} == {"did not happen: planned again"}
    begun.set()
    assert lab.settle(10)
    assert {repr(one).partition(") ")[2] for one in runs[1]} == {"done"}
    assert done == {"function": 1, "by default": 1, "method": 4, "one": 1, "two": 1, "three": 1, "four": 1}


def test_a_plan_whose_action_knows_what_is_not_set_yet(lab: Lab) -> None:
    done = threading.Event()

    def made() -> Planned:
        planned = lab.when(done.is_set, lambda: planned.waits)
        return planned

    assert made() is not made()
    done.set()
    assert lab.settle(10)


def test_a_plan_that_was_given_what_cannot_be_compared(lab: Lab) -> None:
    class Table:
        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

        __hash__ = None  # type: ignore[assignment]

    plans = [lab.when(lambda: True, lambda table=table: table) for table in (Table(), Table())]  # type: ignore[misc]
    assert lab.settle(10)
    assert {repr(one) for one in plans} == {"planned (action) done"}


@pytest.mark.long
def test_a_plan_that_is_being_done_is_not_dropped(lab: Lab) -> None:
    begun, over = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert over.wait(20)

    planned, thread = plan(lab, lambda: True, slow)
    assert begun.wait(5)
    assert lab.settle(QUIET + 0.5).reason == "after 2 s: planned (slow) is being done"
    assert lab.when(planned._condition, slow) is planned  # a cell that runs twice: one at a time
    over.set()
    assert lab.settle(5)
    assert repr(planned) == "planned (slow) done"
    thread.join(5)
    assert not thread.is_alive()


def test_a_service_that_does_not_answer_yet_is_asked_again(lab: Lab) -> None:
    answers: list[Exception | bool] = [ConnectionRefusedError("no"), TimeoutError("no"), False, True]

    def condition() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    planned = lab.when(condition, lambda: None)
    assert lab.settle(10)
    assert repr(planned) == "planned (action) done"


def wrong(*_: object) -> bool:
    raise KeyError("x")


@pytest.mark.parametrize("part", ["condition", "action"])
def test_a_plan_that_fails_is_told_at_once(lab: Lab, part: str) -> None:
    load = lab.load(lab.topic("orders", 1, Order), orders(10_000), rate=100)
    lab.when(wrong if part == "condition" else lambda: load.count > 5, wrong)
    settled = lab.settle(60)
    assert repr(settled) == "unknown: planned (wrong) failed: KeyError: 'x'"
    assert not load.done  # it did not wait for the load


def test_what_is_planned_ends_with_the_lab(lab: Lab) -> None:
    true, done = threading.Event(), []
    _, thread = plan(lab, true.is_set, lambda: done.append("it"))
    lab.close()
    wait_until(lambda: not thread.is_alive(), 5, "the end of its thread")
    true.set()
    assert done == []


def test_a_plan_that_failed_is_made_good_for_by_the_next(lab: Lab) -> None:
    """As when the cell that plans a fault is run again."""
    tries: list[int] = []

    def act() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("not just now")

    lab.when(lambda: True, act)
    wait_until(lambda: "failed: ValueError: not just now" in (lab.unsettled() or ""), 5, "its failure")
    lab.when(lambda: True, act)
    assert lab.settle(10)
    assert len(tries) == 2
