"""The mediator's transitions alone: whatever comes in whatever order, each instance ends, and its effects add up."""

from __future__ import annotations

import random

import pytest

from labkit.kafka.cluster import Cluster
from labkit.kafka.topics import Topic
from labkit.patterns.mediator_states import (
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
