"""The mediator topology, also called saga orchestration: one process knows the steps of a business event.

    order = Process("order", 1, (Step("charge", charges), Step("reserve", reservations), Step("invoice", invoices)))
    mediator = Mediator(orders, replies, store, [order])      # topics: initial events, StepReply, ProcessState
    lab.deploy("mediator", mediator.consumer(), replicas=2)
    lab.deploy("charge", mediator.processor("charge", do=charge, cancel=cancel_charge, undo=refund))
    mediator.states().get("17")                               # where is order 17? A local read

An initial event begins an instance, whose id is its key. The mediator sends a command to the first step's processor,
and goes on with its reply: the next step, or, when a step fails for good, compensations in reverse.

Walk one event through it. It lies in partition 2 of `orders`. The consumer with state takes it, finds nothing under its
key in state 2, and sends two records: a command, which says "reply to partition 2", and a timeout, into partition 2 of
a topic whose records wait. Both, the new state and the event's offset are one transaction: killed before its commit,
nothing has happened, and the event is handled again; killed after it, all has. The processor does its step and replies
in a transaction with the command's offset; if it is killed in between it does the step again, so what it calls must
know the id. The reply lies in partition 2, and so finds the state. The timeout comes last, and is too late to matter.
If it comes first, the step is asked to cancel: only its answer tells whether it was done.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal, Self, TypeVar

from labkit.kafka.consumer.state import check_store
from labkit.kafka.errors import LabkitError, TopicMissing, error_text
from labkit.kafka.producer import producer
from labkit.kafka.records import UNDECODABLE, Record, encode, parser
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import DeadLetter, DeadLetters, dead_letters_topic
from labkit.patterns.key_value_store import KeyValueStore
from labkit.patterns.mediator_states import (
    ANSWERS,
    Process,
    ProcessState,
    Result,
    Step,
    StepCommand,
    StepReply,
    answered,
    begin,
    came_again,
)
from labkit.patterns.own_topics import check, create, waiting
from labkit.patterns.retries import MILLISECOND, Policy, RetryingConsumer, dead_letter, seconds_of, written

E = TypeVar("E")

TIMEOUTS = re.compile(r"-timeouts-(\d+m?s)$")  # how the name of a topic of timeouts ends


class Refused(LabkitError):
    """A step fails for good, raised by its processor's function: no further attempt, the mediator is told."""


@dataclass(frozen=True)
class Mediator(Generic[E]):
    """Orchestrates the instances of a process: plain data, so it can travel to a pod.

    `initial` has the initial events. `replies` and `store`, which is compacted, have as many partitions. `processes`
    are the versions of the process: new instances begin with the newest one, each goes on by its own.

    What cannot go on by itself has the status "needs a person": a compensation that fails for good, and a question that
    was asked `asks` times without an answer that decides. It is among the `dead_letters`; one that is replayed has its
    last question asked again. A reply that fits no question is there too.

    A state is kept for good, some 500 bytes a step, in the memory of the mediators and of who reads `states`. Timeouts
    are kept for a week after they are due: mediators that are all away for longer do not hear those.
    """

    initial: Topic[E]
    replies: Topic[StepReply]
    store: Topic[ProcessState]
    processes: Sequence[Process]
    asks: int = 5
    """How often a step is asked to cancel, or to undo, before a person is needed."""

    def __post_init__(self) -> None:
        versions = [one.version for one in self.processes]
        if not versions or len({one.name for one in self.processes}) > 1 or len(set(versions)) < len(versions):
            raise LabkitError("a mediator takes one process: all of its versions that are under way, each once")
        if self.asks < 1:
            raise LabkitError(f"a step is asked at least once, not {self.asks!r} times")
        pairs = {(step.name, step.commands.name) for step in self.steps}
        if any(len(set(each)) < len(pairs) for each in zip(*pairs, strict=True)):
            raise LabkitError(
                f"over all versions a step has one topic of commands, and a topic one step, not {sorted(pairs)}: give"
                " a step that has changed a new name and a new topic"
            )
        values: list[tuple[Topic[Any], type]] = [(self.replies, StepReply), (self.store, ProcessState)]
        values += [(step.commands, StepCommand) for step in self.steps]
        for topic, value in values:
            if topic.value is not value:
                raise LabkitError(f"topic {topic.short} is to have values of {value.__name__}: {topic!r}")
            if topic.cluster != self.initial.cluster:
                raise LabkitError(f"topic {topic.short} must be on the cluster of {self.initial.short}")

    @property
    def newest(self) -> Process:
        """What new instances go by."""
        return max(self.processes, key=lambda one: one.version)

    @property
    def steps(self) -> list[Step]:
        """Those of all versions, the newest first."""
        versions = sorted(self.processes, key=lambda one: one.version, reverse=True)
        return [step for process in versions for step in process.steps]

    @property
    def group(self) -> str:
        """The consumer group of the mediators."""
        return self.store.name

    def timeouts(self, seconds: float) -> Topic[StepReply]:
        """Where timeouts of so many seconds wait, in whole milliseconds: one topic for each duration, so that the first
        one is due first."""
        return replace(self.replies, name=f"{self.store.name}-timeouts-{written(seconds)}")

    def consumer(self, slot: str = "", commit_interval: float = 0.05) -> RetryingConsumer:
        """What orchestrates, in one process or many: each a member of the store's group. `slot` as of `Consumer`."""
        return _Orchestrating(
            *((replace(self.initial, value=Any), self.replies), _Handler(self), self.group),  # type: ignore[arg-type]
            guarantee="exactly once",
            slot=slot,
            workers=1,  # the thread that polls does all of it
            commit_interval=commit_interval,
            store=self.store,
            retry=dead_letter(),
            mediator=self,
        )

    def processor(
        self,
        step: str,
        do: Callable[[str, E], Any],
        cancel: Callable[[str], Literal["done", "cancelled", "unknown"]],
        undo: Callable[[str, E], Any] | None = None,
        slot: str = "",
    ) -> RetryingConsumer:
        """What serves a step, in one process or many: it reads commands, calls one of these functions, and replies.

        Each takes the instance's id, and may be called again for it: it remembers, together with its effect, what has
        become of that id. `do(id, value)` and `undo(id, value)` return details for the reply, or raise Refused to fail
        for good, or an error that the step's `retry` names as `non_retriable`; any other one is the business of that.
        `cancel(id)` says "done" if it was done, or "cancelled", and then no later `do` may have an effect: it raises
        Refused. Or "unknown", to be asked again.

        Records of one partition are handled in order. `replace(…, order="key")` does it for those of one instance.
        """
        found = [one for one in self.steps if one.name == step]
        if not found:
            raise LabkitError(f"process {self.newest.name} has no step {step!r}")
        if undo is None and any(one.compensated for one in found):
            raise LabkitError(f"step {step} may have to be undone: give its processor undo=…, or it compensated=False")
        newest = found[0]
        return RetryingConsumer(
            *(newest.commands, _Processor(step, self.replies, self.initial.value, do, cancel, undo, newest.retry)),
            newest.commands.name,
            guarantee="exactly once",
            slot=slot,
            commit_interval=0.05,
            retry=replace(newest.retry, non_retriable=(*newest.retry.non_retriable, _Unusable)),
        )

    def states(self) -> KeyValueStore[ProcessState]:
        """Where each instance stands, to be read locally."""
        return KeyValueStore(self.store)

    def dead_letters(self) -> DeadLetters:
        """What needs a person, and replies that fit no question. Before a mediator ran: TopicMissing. Initial events
        that began nothing are in `DeadLetters(mediator.initial, mediator.group)`."""
        return DeadLetters(self.replies, self.group)


@dataclass(frozen=True)
class _Orchestrating(RetryingConsumer):
    """The mediator's consumer, which has topics of timeouts of its own."""

    mediator: Mediator[Any] | None = None

    def prepare(self) -> Self:
        """Make the topics of timeouts, too, and read those that an earlier definition has left.

        The group does not share them out: they go with the replies. (A static member that comes back with other topics
        is given what it had before.)"""
        mediator = self.mediator
        assert mediator is not None  # noqa: S101
        there = self.cluster.topics()
        for topic in (mediator.initial, mediator.replies, mediator.store, *(step.commands for step in mediator.steps)):
            if topic.name not in there:
                compacted = ", compacted" if topic is mediator.store else ""
                raise TopicMissing(f"topic {topic.short} ({topic.name}) does not exist: create it first{compacted}")
        check_store(self)
        names = {mediator.timeouts(step.timeout).name for step in mediator.steps}
        names |= {name for name in there if name == mediator.timeouts(_delay(name)).name}
        topics, not_before = [], {}
        for name in sorted(names):
            delay = _delay(name)
            topic = replace(mediator.timeouts(delay), partitions=there[mediator.replies.name])
            if there.get(name) == topic.partitions:
                check(topic, waiting(delay))
            else:  # it is refused if it is there with another number
                create(topic, waiting(delay), {})
            topics.append(topic)
            not_before[name] = partial(_due, delay)
        beside = {mediator.replies.name: topics}
        return super(_Orchestrating, replace(self, co_partitioned=beside, not_before=not_before)).prepare()


def _delay(name: str) -> float:
    """The seconds for which timeouts wait in a topic of this name; 0 in any other one."""
    found = TIMEOUTS.search(name)
    return 0.0 if found is None else seconds_of(found[1])


def _due(delay: float, record: Record[Any]) -> float:
    return record.timestamp + MILLISECOND + delay


@dataclass(frozen=True)
class _Handler:
    """The consumer's handler: what a record makes of a state is decided in `mediator_states`; what the step from one
    state to the next one sends, here."""

    mediator: Mediator[Any]

    def __call__(self, states: Mapping[str, ProcessState], record: Record[Any]) -> Mapping[str, ProcessState]:
        value = record.value
        if value is None:
            raise LabkitError("an initial event, and a reply, have a value")
        instance = value.id if isinstance(value, StepReply) else record.key
        if not instance:
            raise LabkitError("an initial event has a key: the id of its instance")
        before = states.get(instance)
        after = self.next(before, instance, record)
        if after is before:
            return {}
        if before is None or after.number > before.number:
            self.ask(instance, after, record.partition)
        if after.status == "needs a person" and (before is None or before.status != after.status):
            self.call_a_person(instance, after, record)
        return {instance: after}

    def next(self, state: ProcessState | None, instance: str, record: Record[Any]) -> ProcessState:
        """What this record makes of a state. Raises LabkitError: then it makes nothing of it."""
        value = record.value
        if not isinstance(value, StepReply):
            parser(self.mediator.initial.value)(encode(value))  # what no processor could read begins nothing
            if state is not None:
                return came_again(state, instance, value)
            return begin(self.mediator.newest, value, record.timestamp)
        if state is None:
            raise LabkitError(
                f"no instance {instance!r} is known in partition {record.partition}: either it never began, or this "
                "lies in the wrong partition. A reply goes to the partition number that its command says"
            )
        if value.result == "no answer" and (value.number < state.number or not state.awaits(value.number)):
            return state  # it was answered in time, or that time was over before
        now = record.timestamp + _delay(record.topic)  # of a timeout: when its time was over, not when it was sent
        return answered(self.process(state, instance), state, value, self.mediator.asks, now)

    def process(self, state: ProcessState, instance: str) -> Process:
        """The version by which an instance goes. Raises LabkitError."""
        for one in self.mediator.processes:
            if one.version == state.version:
                return one
        raise LabkitError(
            f"{instance} goes by version {state.version} of process {self.mediator.newest.name}, which the mediator "
            "does not have: give it that one too, beside the newest, until no instance goes by it any more"
        )

    def ask(self, instance: str, state: ProcessState, partition: int) -> None:
        """Put the last question to its step, with a timeout for the answer."""
        asked, step = state.questions[-1], self.process(state, instance).step(state.step)
        step.commands.send(
            StepCommand(instance, step.name, asked.action, state.number, state.value, partition), key=instance
        )
        timeout = StepReply(instance, step.name, asked.action, state.number, "no answer")
        self.mediator.timeouts(step.timeout).send(timeout, key=instance, partition=partition)

    def call_a_person(self, instance: str, state: ProcessState, record: Record[Any]) -> None:
        """Leave a dead letter whose replay has the last question asked again, in the transaction of the state."""
        mediator, asked, now = self.mediator, state.questions[-1], record.timestamp + _delay(record.topic)
        again = StepReply(instance, asked.step, asked.action, state.number, "ask again")
        letter = DeadLetter(
            *(record.topic, record.partition, record.offset, record.timestamp, mediator.group, instance),
            *(encode(again).decode(), {}, state.times_asked, (now,), state.trouble, now),
        )
        value, place, headers = letter.kept()
        producer(mediator.initial.cluster).send(
            dead_letters_topic(mediator.replies, mediator.group).name, value, place, headers
        )


class _Unusable(LabkitError):
    """A command that its processor cannot serve, however often it tries."""


@dataclass(frozen=True)
class _Processor(Generic[E]):
    """The handler of a step's commands."""

    step: str
    replies: Topic[StepReply]
    value: type[E]
    do: Callable[[str, E], Any]
    cancel: Callable[[str], Any]
    undo: Callable[[str, E], Any] | None
    retry: Policy

    def __call__(self, record: Record[StepCommand]) -> None:
        command: StepCommand | None = record.value
        if command is None or command.step != self.step:
            raise _Unusable(f"the processor of {self.step} takes commands of that step, not {command!r}")
        result, detail = self.result(command)
        reply = StepReply(command.id, command.step, command.action, command.number, result, detail)
        self.replies.send(reply, key=command.id, partition=command.partition)

    def result(self, command: StepCommand) -> tuple[Result, Any]:
        """What became of it, and details. Raises what the step's own function does, for its policy to decide."""
        if command.action == "cancel":
            answer = self.cancel(command.id)
            if answer not in ANSWERS["cancel"]:
                raise LabkitError(f"cancel of {self.step} returns one of {ANSWERS['cancel']}, not {answer!r}")
            return answer, None
        function = self.do if command.action == "do" else self.undo
        if function is None:
            raise _Unusable(f"the processor of {self.step} has no undo=…: give it one")
        try:
            value = parser(self.value)(encode(command.value))
        except UNDECODABLE as error:
            raise _Unusable(f"the processor of {self.step} cannot read the event of {command.id}: {error}") from error
        try:
            detail = function(command.id, value)
        except Refused as error:
            return "failed", str(error)
        except Exception as error:
            if not self.retry.is_final(error):
                raise
            return "failed", error_text(error)
        return ("done" if command.action == "do" else "undone"), detail
