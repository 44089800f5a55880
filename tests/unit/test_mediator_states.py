"""The mediator's transitions alone: whatever comes in whatever order, each instance ends, and its effects add up."""

from __future__ import annotations

import random

import pytest

from labkit.kafka.cluster import Cluster
from labkit.kafka.topics import Topic
from labkit.patterns.mediator_states import (
    Action,
    Process,
    ProcessState,
    Question,
    Result,
    Step,
    StepCommand,
    StepReply,
    answered,
    begin,
)
from labkit.patterns.retries import exponential

NAMES = ("charge", "reserve", "ship", "invoice")
ASKS = 3


def process() -> Process:
    topics = {name: Topic(Cluster("nowhere:1"), name, 1, StepCommand) for name in NAMES}
    return Process(
        "order", 1, tuple(Step(name, topic, compensated=name != "invoice") for name, topic in topics.items())
    )


class Processor:
    """A step's processor with a memory; some of its calls fail, or are given up without an answer."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.is_, self.effects = chance, "", 0

    def answer(self, asked: Question) -> Result | None:
        """None: it was given up, before or after the effect."""
        if self.chance.random() < 0.15:
            if asked.action == "do" and self.is_ == "" and self.chance.random() < 0.5:
                self.is_, self.effects = "done", self.effects + 1
            return None
        if asked.action == "do":
            if self.is_ == "" and self.chance.random() < 0.85:
                self.is_, self.effects = "done", self.effects + 1
            return "done" if self.is_ == "done" else "failed"
        if asked.action == "cancel":
            if self.chance.random() < 0.2:
                return "unknown"
            self.is_ = self.is_ or "cancelled"
            return "done" if self.is_ == "done" else "cancelled"
        if self.chance.random() < 0.1:
            return "failed"
        if self.is_ == "done":
            self.is_, self.effects = "undone", self.effects - 1
        return "undone"


@pytest.mark.parametrize("seed", range(300))
def test_whatever_comes_in_whatever_order_an_instance_ends_and_its_effects_add_up(seed: int) -> None:
    """correctness 42: late and repeated replies, timeouts, processors that give up; a person who asks again."""
    chance = random.Random(seed)
    order, processors = process(), {name: Processor(chance) for name in NAMES}
    state: ProcessState = begin(order, {}, 0.0)
    commands: dict[str, list[int]] = {name: [] for name in NAMES}  # numbers of questions, in order
    replies: list[StepReply] = []  # and timeouts: they come in any order
    plans = set[tuple[str, ...]]()

    def asked(number: int) -> Question:
        return state.questions[number - 1]

    def reply(number: int, result: Result) -> StepReply:
        return StepReply("1", asked(number).step, asked(number).action, number, result)

    def put() -> None:
        commands[state.step].append(state.number)
        replies.append(reply(state.number, "no answer"))

    put()
    for _ in range(10_000):
        busy = [name for name in NAMES if commands[name]]
        if busy and (not replies or chance.random() < 0.6):
            number = commands[chance.choice(busy)].pop(0)
            if (result := processors[asked(number).step].answer(asked(number))) is not None:
                replies += [reply(number, result)] * chance.choice((1, 1, 2))
        elif replies:
            before, came = state, replies.pop(chance.randrange(len(replies)))
            state = answered(order, state, came, ASKS, 0.0)
            assert not (before.over and state.status != before.status)
            if state.number > before.number:
                put()
        elif state.status == "needs a person":
            state = answered(order, state, reply(state.number, "ask again"), ASKS, 0.0)
            put()
        else:
            break
        if state.plan:
            plans.add(state.plan)
    assert state.over, str(state)
    assert len(plans) <= 1
    effects = [processors[name].effects for name in NAMES]
    if state.status == "completed":
        assert effects == [1, 1, 1, 1]
    else:
        assert [one for one, name in zip(effects, NAMES, strict=True) if name != "invoice"] == [0, 0, 0]


def test_a_step_that_is_not_compensated_stays_done() -> None:
    topics = {name: Topic(Cluster("nowhere:1"), name, 1, StepCommand) for name in NAMES}
    steps = tuple(Step(name, topic, compensated=name != "reserve") for name, topic in topics.items())
    order = Process("order", 1, steps)
    state = begin(order, {}, 0.0)
    for number, (name, result) in enumerate(zip(NAMES, ("done", "done", "done", "failed"), strict=True), 1):
        state = answered(order, state, StepReply("1", name, "do", number, result), ASKS, float(number))
    assert state.plan == ("ship", "charge")
    assert (state.step, state.status) == ("ship", "compensating")
    assert state.done == {"charge": 1.0, "reserve": 2.0, "ship": 3.0}


def given(*answers: tuple[str, Action, Result]) -> ProcessState:
    """An instance to which this was answered, question by question; "no answer" is a timeout."""
    order, state = process(), begin(process(), {}, 0.0)
    for number, (step, action, result) in enumerate(answers, 1):
        state = answered(order, state, StepReply("1", step, action, number, result), ASKS, float(number))
    return state


def test_an_answer_that_comes_one_question_late_decides() -> None:
    """correctness 42: a busy step. Each answer takes 8 s, and is waited for 5 s: no person is needed."""
    order, state = process(), begin(process(), {}, 0.0)
    due: list[tuple[float, StepReply]] = []
    while state.step == "charge":
        asked, number = state.questions[-1], state.number
        if all(reply.number != number for _, reply in due):
            for after, result in ((5.0, "no answer"), (8.0, "done")):
                due.append((asked.asked + after, StepReply("1", "charge", asked.action, number, result)))
        now, reply = min(due, key=lambda one: one[0])
        due.remove((now, reply))
        state = answered(order, state, reply, ASKS, now)
        assert state.status != "needs a person", str(state)
    assert (state.step, state.status, state.done) == ("reserve", "running", {"charge": 8.0})
    assert [one.answer for one in state.questions] == ["done", None, None]


@pytest.mark.parametrize(
    ("late", "status", "step"),
    [
        (StepReply("1", "charge", "do", 1, "done"), "running", "reserve"),
        (StepReply("1", "charge", "do", 1, "failed"), "compensated", "charge"),
        (StepReply("1", "charge", "cancel", 2, "unknown"), "cancelling", "charge"),
        (StepReply("1", "charge", "cancel", 2, "cancelled"), "compensated", "charge"),
    ],
)
def test_what_is_answered_late_decides_once(late: StepReply, status: str, step: str) -> None:
    """What else is answered of the same step then changes nothing; nor does a timeout of an earlier question."""
    order, state = process(), given(("charge", "do", "no answer"), ("charge", "cancel", "no answer"))
    for number, action in ((1, "do"), (2, "cancel")):
        assert answered(order, state, StepReply("1", "charge", action, number, "no answer"), ASKS, 9.0) is state
    state = answered(order, state, late, ASKS, 9.0)
    assert (state.status, state.step) == (status, step)
    if status != "cancelling":
        for result in ("done", "cancelled"):
            after = answered(order, state, StepReply("1", "charge", "cancel", 3, result), ASKS, 10.0)
            assert (after.questions, after.status, after.ignored) == (state.questions, state.status, 1)


def test_a_compensation_that_was_asked_again_is_undone_by_its_first_answer() -> None:
    state = given(("charge", "do", "done"), ("reserve", "do", "failed"), ("charge", "undo", "no answer"))
    state = answered(process(), state, StepReply("1", "charge", "undo", 3, "undone"), ASKS, 9.0)
    assert state.status == "compensated"
    assert str(state) == "compensated (reserve failed: None): done charge; undone charge"


def test_a_step_is_waited_for_longer_than_it_is_tried_again() -> None:
    """Both by default."""
    step = process().steps[0]
    assert isinstance(step.retry.blocks, exponential)
    delays = [step.retry.blocks.delay(attempt) or 0.0 for attempt in range(1, 100)]
    assert 0 < sum(delays) < step.timeout
