"""What a mediator knows of one instance of a process, and how it goes on: pure functions, from a state to the next one.

A state keeps every question that was put to a step, with its answer, and numbers them in order. An answer to the last
question is awaited; so are answers to those before it that went to the same step, as long as nothing is decided,
because a late answer is one, too. So the state alone tells which reply is late, repeated, or was never asked for.

    running ── done ─→ … ─→ completed
       │ failed ──────────→ compensating ── undone ─→ … ─→ compensated
       │ no answer in time → cancelling: was it done? done → running · cancelled → compensating
    cancelling, compensating: asked again and again; in the end → needs a person, who has the last question asked again
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.patterns.retries import FOREVER, Policy, blocking, exponential

Action: TypeAlias = Literal["do", "cancel", "undo"]
Result: TypeAlias = Literal["done", "failed", "cancelled", "unknown", "undone", "no answer", "ask again"]
Status: TypeAlias = Literal["running", "cancelling", "compensating", "completed", "compensated", "needs a person"]

ANSWERS: Mapping[Action, tuple[Result, ...]] = {
    "do": ("done", "failed"),
    "cancel": ("done", "cancelled", "unknown"),
    "undo": ("undone", "failed"),
}
WAITS: Mapping[Action, Status] = {"do": "running", "cancel": "cancelling", "undo": "compensating"}


# -- The definition ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step of a process: its topic of commands, and what happens when it fails or does not answer."""

    name: str
    commands: Topic[StepCommand]
    timeout: float = 10.0
    """Seconds to wait for an answer, before the step is asked to cancel: more than the delays of `retry` together. If
    they take longer, a `do` that blocks is read first, and `cancel` after it: that costs only questions, and at last a
    person. But `cancel` overtakes a `do` in a retry topic: then a step is cancelled that the next attempt would do."""
    retry: Policy = field(default_factory=lambda: blocking(exponential(0.2, cap=5.0, times=5)))
    """What its processor does when a call fails: see `retries`."""
    compensated: bool = True
    """Whether to undo the step when a later one fails for good."""

    def __post_init__(self) -> None:
        if not self.name:
            raise LabkitError("a step needs a name, such as Step('charge', …)")
        if not 0.001 <= self.timeout <= FOREVER:
            raise LabkitError(f"step {self.name}: timeout is a number of seconds, at least 0.001, not {self.timeout!r}")


@dataclass(frozen=True)
class Process:
    """The steps of one kind of business event, in order. Changed steps get a new version; an instance goes on by the
    version it began with."""

    name: str
    version: int
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for what in ([one.name for one in self.steps], [one.commands.name for one in self.steps]):
            if not what or len(set(what)) < len(what):
                raise LabkitError(f"process {self.name} needs steps, each with its own name and topic, not {what}")

    def step(self, name: str) -> Step:
        """The step of this name. Raises LabkitError."""
        for one in self.steps:
            if one.name == name:
                return one
        raise LabkitError(
            f"version {self.version} of process {self.name} has no step {name!r}, at which an instance stands. If the "
            "steps were changed, give them a new version, and keep the old one among the mediator's processes"
        )


# -- On the wire -------------------------------------------------------------------------------------------------------


class StepCommand(msgspec.Struct, frozen=True):
    """The mediator's question to a step's processor: the processing event."""

    id: str
    """The instance: the key of its initial event."""
    step: str
    action: Action
    number: int
    """The number of this question; the reply repeats it."""
    value: Any
    """The initial event."""
    partition: int
    """Where the mediator has the state: the reply goes to this partition number."""


class StepReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """A processor's answer. A timeout is one, too, with the result "no answer"; so is the replay of a dead letter, by
    which a person says "ask again"."""

    id: str
    step: str
    action: Action
    number: int
    result: Result
    detail: Any = None


# -- The state ---------------------------------------------------------------------------------------------------------


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """A question to a step, and the answer once it is here. Times are seconds since 1970."""

    step: str
    action: Action
    asked: float
    answer: Result | None = None
    answered: float | None = None
    detail: Any = None


class ProcessState(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one instance stands."""

    version: int
    """The process's version."""
    status: Status
    value: Any
    """The initial event."""
    questions: tuple[Question, ...]
    """All questions so far; the last one is awaited, unless the end is reached."""
    plan: tuple[str, ...] = ()
    """The steps to undo, in this order. It is fixed when compensation begins."""
    reason: str = ""
    """Why the instance is compensated."""
    trouble: str = ""
    """Why the instance needs a person."""
    ignored: int = 0
    """Replies that came late or again, and initial events that came again."""

    @property
    def step(self) -> str:
        """The step that was asked last."""
        return self.questions[-1].step

    @property
    def number(self) -> int:
        """The number of the last question."""
        return len(self.questions)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ("completed", "compensated")

    def awaits(self, number: int) -> bool:
        """Whether an answer to this question would decide something: the question is the last one, or an earlier one to
        the same step, and nothing was decided since."""
        since = self.questions[number - 1 :]
        undecided = all(one.step == self.step and one.answer in (None, "unknown") for one in since)
        return 1 <= number <= self.number and undecided and not self.over

    @property
    def done(self) -> dict[str, float]:
        """The steps that were done, each with the time of its answer."""
        return {one.step: one.answered or 0.0 for one in self.questions if one.answer == "done"}

    @property
    def undone(self) -> dict[str, float]:
        """The steps that were undone, each with the time of its answer."""
        return {one.step: one.answered or 0.0 for one in self.questions if one.answer == "undone"}

    @property
    def times_asked(self) -> int:
        """How often the last question was asked in a row."""
        last = self.questions[-1]
        same = takewhile(lambda one: (one.step, one.action) == (last.step, last.action), reversed(self.questions))
        return sum(1 for _ in same)

    def __str__(self) -> str:
        last = self.questions[-1]
        undone = f"; undone {', '.join(self.undone)}" if self.undone else ""
        waits = "" if self.over else f"; {last.step} was asked to {last.action}"
        why = f" ({self.trouble or self.reason})" if self.trouble or self.reason else ""
        return f"{self.status}{why}: done {', '.join(self.done) or 'nothing'}{undone}{waits}"


# -- How it goes on ----------------------------------------------------------------------------------------------------


def begin(process: Process, value: Any, now: float) -> ProcessState:
    """The state after an initial event."""
    first = Question(process.steps[0].name, "do", now)
    return ProcessState(process.version, "running", value, (first,))


def answered(process: Process, state: ProcessState, reply: StepReply, asks: int, now: float) -> ProcessState:
    """The state after a reply. Raises LabkitError for a reply to a question that was not asked."""
    asked = state.questions[reply.number - 1] if 1 <= reply.number <= state.number else None
    if asked is None or (asked.step, asked.action) != (reply.step, reply.action):
        raise LabkitError(
            f"question {reply.number} of {reply.id} did not ask step {reply.step} to {reply.action}: the reply comes "
            "from another processor, or is for another mediator. A processor repeats what its command says"
        )
    if reply.result == "ask again":
        waits = reply.number == state.number and state.status == "needs a person"
        return _ask(state, asked.step, asked.action, now) if waits else _ignored(state)
    if reply.result == "no answer":
        waits = reply.number == state.number and state.awaits(reply.number) and state.status != "needs a person"
        return _timed_out(state, asks, now) if waits else state
    if reply.result not in ANSWERS[reply.action]:
        raise LabkitError(
            f"{reply.id}: {reply.action} is answered by one of {ANSWERS[reply.action]}, not {reply.result!r}"
        )
    if not state.awaits(reply.number):
        return _ignored(state)
    answer = replace(asked, answer=reply.result, answered=now, detail=reply.detail)
    earlier, later = state.questions[: reply.number - 1], state.questions[reply.number :]
    state = replace(state, questions=(*earlier, answer, *later))
    match reply.result:
        case "done":
            return _after_done(process, state, now)
        case "failed" if reply.action == "do":
            return _compensate(process, state, f"{reply.step} failed: {reply.detail}", now)
        case "cancelled":
            return _compensate(process, state, f"{reply.step} did not answer in time, and was cancelled", now)
        case "undone":
            return _undo(state, now)
        case "failed":
            return replace(state, status="needs a person", trouble=f"{reply.step} cannot be undone: {reply.detail}")
    return state  # unknown: the step is asked again when the time for an answer is over


def came_again(state: ProcessState, instance: str, value: Any) -> ProcessState:
    """The state after an initial event with an id that is known. Raises LabkitError when it is another event."""
    if value != state.value:
        raise LabkitError(f"{instance} exists already, with another value: give each initial event a key of its own")
    return _ignored(state)


def _ask(state: ProcessState, step: str, action: Action, now: float) -> ProcessState:
    questions = (*state.questions, Question(step, action, now))
    return replace(state, status=WAITS[action], questions=questions, trouble="")


def _timed_out(state: ProcessState, asks: int, now: float) -> ProcessState:
    """Ask the step to cancel; its answer decides. A timeout proves nothing: the step may be done all the same."""
    last = state.questions[-1]
    if last.action == "do":
        return _ask(state, last.step, "cancel", now)
    if state.times_asked < asks:
        return _ask(state, last.step, last.action, now)
    why = f"{last.step} was asked {state.times_asked} times to {last.action}, without an answer that decides"
    return replace(state, status="needs a person", trouble=why)


def _ignored(state: ProcessState) -> ProcessState:
    return replace(state, ignored=state.ignored + 1)


def _after_done(process: Process, state: ProcessState, now: float) -> ProcessState:
    following = process.steps[process.steps.index(process.step(state.step)) + 1 :]
    if not following:
        return replace(state, status="completed", trouble="")
    return _ask(state, following[0].name, "do", now)


def _compensate(process: Process, state: ProcessState, reason: str, now: float) -> ProcessState:
    """Fix the plan: undo what was done, in reverse."""
    plan = tuple(name for name in reversed(state.done) if process.step(name).compensated)
    return _undo(replace(state, plan=plan, reason=reason), now)


def _undo(state: ProcessState, now: float) -> ProcessState:
    undone = state.undone
    left = [name for name in state.plan if name not in undone]
    return _ask(state, left[0], "undo", now) if left else replace(state, status="compensated", trouble="")
