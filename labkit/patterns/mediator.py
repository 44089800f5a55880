"""The mediator topology, also called saga orchestration: one program knows all steps of a business event.

    order = Process("order", 1, (Step("charge", charges), Step("reserve", reservations), Step("invoice", invoices)))
    mediator = Mediator(orders, replies, store, [order])      # topics: initial events, StepReply, ProcessState
    lab.deploy("mediator", mediator.consumer(), replicas=2)
    lab.deploy("charge", mediator.processor("charge", do=charge, cancel=cancel_charge, undo=refund))
    mediator.states().get("17")                               # where is order 17? A local read

An initial event begins an instance, whose id is the event's key. The mediator sends a command to the first step's
processor, and the reply decides how it goes on: with the next step, or, after a step has failed for good, with
compensations in reverse.

Walk one event through it. The event lies in partition 2 of `orders`. The consumer with state takes it, finds nothing
under its key in state 2, and sends two records: a command, which says "reply to partition 2", and a timeout, into
partition 2 of a topic whose records wait. These two, the new state and the event's offset are one transaction. If the
mediator is killed before the commit, nothing has happened, and the event is handled again; if after it, all has
happened. The processor does its step, and replies in a transaction with the command's offset. If it is killed in
between, it does the step again, so whatever it calls must know the id. The reply lies in partition 2, and so finds the
state. The timeout comes later, and nothing depends on it any more. If the timeout comes first, the step is asked to
cancel: only its answer tells whether it was done.
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
    """A step fails for good: its processor's function raises this, and there is no further attempt."""


@dataclass(frozen=True)
class Mediator(Generic[E]):
    """Orchestrates the instances of a process. It is plain data, so it can travel to a pod.

    `initial` has the initial events. `replies`, and `store`, which is compacted, have as many partitions. `processes`
    are the versions of the process: a new instance begins with the newest one, and goes on by that one.

    An instance that cannot go on by itself has the status "needs a person": a compensation has failed for good, or a
    question was asked `asks` times without an answer that decides. It is among the `dead_letters`; replay it, and its
    last question is asked again. A reply that fits no question is there too.

    A state is kept for good, some 500 bytes a step, in the memory of the mediators and of all who read `states`. A
    timeout is kept for a week after it is due: if all mediators are away for longer, it is lost.
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
            raise LabkitError("a mediator takes the versions of one process that are under way, each of them once")
        if self.asks < 1:
            raise LabkitError(f"asks must be at least 1, not {self.asks!r}")
        pairs = {(step.name, step.commands.name) for step in self.steps}
        if any(len(set(each)) < len(pairs) for each in zip(*pairs, strict=True)):
            raise LabkitError(
                f"in all versions, a step has one topic of commands, and a topic one step, not {sorted(pairs)}: give a"
                " changed step a new name and a new topic"
            )
        values: list[tuple[Topic[Any], type]] = [(self.replies, StepReply), (self.store, ProcessState)]
        values += [(step.commands, StepCommand) for step in self.steps]
        for topic, value in values:
            if topic.value is not value:
                raise LabkitError(f"topic {topic.short} must have values of {value.__name__}: {topic!r}")
            if topic.cluster != self.initial.cluster:
                raise LabkitError(f"topic {topic.short} must be on the cluster of {self.initial.short}")

    @property
    def newest(self) -> Process:
        """The version by which new instances go."""
        return max(self.processes, key=lambda one: one.version)

    @property
    def steps(self) -> list[Step]:
        """The steps of all versions, the newest version first."""
        versions = sorted(self.processes, key=lambda one: one.version, reverse=True)
        return [step for process in versions for step in process.steps]

    @property
    def group(self) -> str:
        """The consumer group of the mediators."""
        return self.store.name

    def timeouts(self, seconds: float) -> Topic[StepReply]:
        """The topic in which timeouts of this duration wait, in whole milliseconds. Each duration has its own topic, so
        that the first timeout in it is due first."""
        return replace(self.replies, name=f"{self.store.name}-timeouts-{written(seconds)}")

    def consumer(self, slot: str = "", commit_interval: float = 0.05) -> RetryingConsumer:
        """The consumer that orchestrates, in one process or many, all in the store's group. `slot` as of `Consumer`."""
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
        """The consumer that serves a step, in one process or many: reads commands, calls a function, and replies.

        Each function takes the instance's id, and may be called again for the same id. So it must store what has become
        of the id, together with its effect. `do(id, value)` and `undo(id, value)` return details for the reply. To fail
        for good they raise Refused, or an error that the step's `retry` names as `non_retriable`; after any other error
        `retry` decides. `cancel(id)` returns "done" if the step was done; "cancelled", and then every later `do` must
        raise Refused; or "unknown", to be asked again.

        Records of one partition are handled in order; with `replace(…, order="key")`, those of one instance.
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
        """A local store of where each instance stands."""
        return KeyValueStore(self.store)

    def dead_letters(self) -> DeadLetters:
        """The instances that need a person, and replies that fit no question. Initial events that began nothing are in
        `DeadLetters(mediator.initial, mediator.group)`. Raises TopicMissing if no mediator ever ran."""
        return DeadLetters(self.replies, self.group)


@dataclass(frozen=True)
class _Orchestrating(RetryingConsumer):
    """The mediator's consumer, which has its own topics of timeouts."""

    mediator: Mediator[Any] | None = None

    def prepare(self) -> Self:
        """Make the topics of timeouts, too, and read those that an earlier definition has left.

        The group does not assign them, they go with the replies: a static member that comes back with other topics gets
        the assignment that it had before."""
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
            else:  # `create` refuses a topic that has another number of partitions
                create(topic, waiting(delay), {})
            topics.append(topic)
            not_before[name] = partial(_due, delay)
        timeouts = {mediator.replies.name: topics}
        return super(_Orchestrating, replace(self, co_partitioned=timeouts, not_before=not_before)).prepare()


def _delay(name: str) -> float:
    """The seconds for which timeouts wait in a topic of this name; 0 for any other topic."""
    found = TIMEOUTS.search(name)
    return 0.0 if found is None else seconds_of(found[1])


def _due(delay: float, record: Record[Any]) -> float:
    return record.timestamp + MILLISECOND + delay


@dataclass(frozen=True)
class _Handler:
    """The consumer's handler. `mediator_states` decides to which state a record leads; the handler sends what belongs
    to the change."""

    mediator: Mediator[Any]

    def __call__(self, states: Mapping[str, ProcessState], record: Record[Any]) -> Mapping[str, ProcessState]:
        value = record.value
        if value is None:
            raise LabkitError("the record has no value: an initial event and a reply need one")
        instance = value.id if isinstance(value, StepReply) else record.key
        if not instance:
            raise LabkitError("the initial event has no key: it needs the id of its instance")
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
        """The state to which this record leads. Raises LabkitError for a record that leads to none."""
        value = record.value
        if not isinstance(value, StepReply):
            parser(self.mediator.initial.value)(encode(value))  # an event that no processor could read begins nothing
            if state is not None:
                return came_again(state, instance, value)
            return begin(self.mediator.newest, value, record.timestamp)
        if state is None:
            raise LabkitError(
                f"no instance {instance!r} is known in partition {record.partition}: it never began, or this reply "
                "lies in the wrong partition. A reply goes to the partition number in its command"
            )
        if value.result == "no answer" and (value.number < state.number or not state.awaits(value.number)):
            return state  # the answer came in time, or an earlier timeout counted
        now = record.timestamp + _delay(record.topic)  # a timeout counts when it is due, not when it was sent
        return answered(self.process(state, instance), state, value, self.mediator.asks, now)

    def process(self, state: ProcessState, instance: str) -> Process:
        """The version by which an instance goes. Raises LabkitError."""
        for one in self.mediator.processes:
            if one.version == state.version:
                return one
        raise LabkitError(
            f"{instance} goes by version {state.version} of process {self.mediator.newest.name}, which the mediator "
            "does not have: give it this version too, until no instance goes by it"
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
    """A processor cannot serve this command, however often it tries."""


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
        """The result of a command, and details. Raises what the step's function raises, for the retry policy."""
        if command.action == "cancel":
            answer = self.cancel(command.id)
            if answer not in ANSWERS["cancel"]:
                raise LabkitError(f"cancel of step {self.step} must return one of {ANSWERS['cancel']}, not {answer!r}")
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
