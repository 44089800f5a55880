"""Pattern 4: retry policies, as data, around the handler of the one consumer.

    RetryingConsumer(renewals, renew, retry=blocking(1, 5, 30))                     # keeps order; 1 + 3 calls
    RetryingConsumer(renewals, renew, retry=blocking(exponential(0.1, cap=60)))     # keeps order for ever
    RetryingConsumer(renewals, renew, retry=retry_topics(1, 10, 60))                # later records are not held up
    RetryingConsumer(renewals, renew, retry=blocking(0.1).then(retry_topics(1, 10)))

Delays are seconds. The dead-letter queue (see `dead_letters`) takes each record whose attempts are used up, that does
not decode, or that failed with an error named `non_retriable`. A consumer makes the topics it needs; its group is part
of their names. What is set aside is confirmed before the offset of its source is committed.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import msgspec

from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import Decision, FailedRecord, Retry, SetAside
from labkit.kafka.consumer.steps import Report, Step
from labkit.kafka.errors import ClusterUnreachable, LabkitError, error_text, told_in
from labkit.kafka.lag import lag
from labkit.kafka.records import Record, encode, headers_of
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import Commands, Skip, Skipped, lanes_topic, skips_topic
from labkit.patterns.dead_letters import dead_letter_of, dead_letters_topic, replay_topic
from labkit.patterns.own_topics import (
    FOR_EVER,
    STORED,
    check,
    check_partitions,
    check_read,
    create,
    own_topic,
    room,
    waiting,
)
from labkit.patterns.retry_history import HEADER, TIMES, RetryHistory, history_of, parse, shown, with_header

FOREVER = 1e9  # seconds, 31 years: no delay is longer
MILLISECOND = 0.001  # by which a record's timestamp, a whole number of them, may be too early
LISTED = 10.0  # seconds for a new topic to be listed everywhere
RETRY_TOPIC = re.compile(r"retry(\d+)-(\d+m?s)$")  # how its name ends: which one, and its delay


@dataclass(frozen=True)
class exponential:  # noqa: N801 - read as a function
    """Delays that double from `first` up to `cap` seconds: `times` of them, or without end."""

    first: float
    cap: float
    times: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.cap <= FOREVER:
            raise LabkitError(f"exponential() needs 0 < first ≤ cap, in seconds: {self!r}")
        if self.times is not None and self.times < 1:
            raise LabkitError(f"exponential() needs times ≥ 1, or none for ever: {self!r}")

    def delay(self, attempt: int) -> float | None:
        """The delay after this attempt, counted from 1; None when there is no further one."""
        if self.times is not None and attempt > self.times:
            return None
        return min(self.cap, self.first * 2.0 ** min(attempt - 1, 60))


@dataclass(frozen=True)
class fixed:  # noqa: N801
    """These delays, one after the other."""

    delays: tuple[float, ...] = ()

    def delay(self, attempt: int) -> float | None:
        """As `exponential.delay`."""
        return self.delays[attempt - 1] if attempt <= len(self.delays) else None


@dataclass(frozen=True)
class Policy:
    """What becomes of a record that fails: first `blocks`, then `topics`, then the dead-letter queue."""

    blocks: fixed | exponential = field(default_factory=fixed)
    """The delays for which its lane waits, its order kept."""
    topics: tuple[float, ...] = ()
    """The delays of its retry topics, each handled once."""
    non_retriable: tuple[type[BaseException], ...] = ()
    """Errors that another attempt would not mend: one call, then the dead-letter queue. The handler's error may be one
    of these, be raised `from` one, or group one."""

    def is_final(self, error: BaseException) -> bool:
        """Whether another attempt would not mend this error."""
        return any(isinstance(one, self.non_retriable) for one in told_in(error))

    def then(self, following: Policy) -> Policy:
        """This policy, and when it is used up, that one. Raises LabkitError for an order that makes no sense."""
        if isinstance(self.blocks, exponential) and self.blocks.times is None:
            raise LabkitError("nothing follows a policy that blocks for ever: give it an end, exponential(…, times=8)")
        if following.blocks != fixed() and (self.blocks != fixed() or self.topics):
            raise LabkitError("blocking(…) comes first and once: in a retry topic order is lost already")
        blocks = self.blocks if self.blocks != fixed() else following.blocks
        errors = (*self.non_retriable, *following.non_retriable)
        return Policy(blocks, (*self.topics, *following.topics), errors)


def blocking(*delays: float | exponential, non_retriable: Iterable[type[BaseException]] = ()) -> Policy:
    """Call again after these delays, in seconds; meanwhile the lane waits and keeps its order.

    `blocking(1, 5)` makes 1 + 2 calls; `blocking(exponential(0.1, cap=60))` goes on for ever. Raises LabkitError.
    """
    if any(isinstance(delay, exponential) for delay in delays):
        if len(delays) != 1:
            raise LabkitError("blocking() takes delays, or one exponential(…)")
        (only,) = delays
        assert isinstance(only, exponential)  # noqa: S101
        return Policy(only, non_retriable=_errors(non_retriable))
    return Policy(fixed(_checked("blocking", delays)), non_retriable=_errors(non_retriable))


def retry_topics(*delays: float, non_retriable: Iterable[type[BaseException]] = ()) -> Policy:
    """Send a failed record to a topic for each of these delays, in seconds: later records are not held up.

    The delays are part of the topics' names, in whole milliseconds at least. Raises LabkitError.
    """
    whole = tuple(milliseconds(delay) / 1000 for delay in _checked("retry_topics", delays))
    return Policy(topics=whole, non_retriable=_errors(non_retriable))


def dead_letter(*, non_retriable: Iterable[type[BaseException]] = ()) -> Policy:
    """No further attempt: to the dead-letter queue. Every policy that has an end ends there, said or not."""
    return Policy(non_retriable=_errors(non_retriable))


def _checked(name: str, delays: Iterable[Any]) -> tuple[float, ...]:
    found = tuple(delays)
    if not found:
        raise LabkitError(f"{name}() needs at least one delay in seconds: {name}(1, 5, 30)")
    for delay in found:
        if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay <= FOREVER:
            raise LabkitError(f"{name}(): a delay is a number of seconds from 0 to {FOREVER:,.0f}, not {delay!r}")
    return tuple(map(float, found))


def _errors(types: Iterable[type[BaseException]]) -> tuple[type[BaseException], ...]:
    found = tuple(types)
    for one in found:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise LabkitError(f"non_retriable takes types of errors, such as (ValueError,), not {one!r}")
    return found


# -- The consumer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetryingConsumer(Consumer):
    """A Consumer that deals with failed records as `retry` says, and reads its own retry topics and replayed records.

    Lag counts what waits in retry topics too. After a change of the policy, the consumer also handles what waits in the
    topics of the policy before, each record at its time. Of `co_partitioned` it takes the topics that have a
    `not_before`.
    """

    retry: Policy = field(default_factory=dead_letter)

    def __post_init__(self) -> None:
        if not isinstance(self.retry, Policy):
            raise LabkitError(f"retry is a policy, such as blocking(1, 5, 30), not {self.retry!r}")
        super().__post_init__()
        if self.batch is not None and self.store is None:
            raise LabkitError(
                "a RetryingConsumer takes records one by one, as each may have to wait for its time: leave out batch, "
                "or take a Consumer, which tries the records of a batch that fails one by one"
            )
        if self.store is not None and (self.retry.topics or self.retry.blocks != fixed()):
            raise LabkitError(
                "a handler with state depends on nothing but its arguments, so another attempt would fail as the "
                "first one did: retry=dead_letter()"
            )
        for topic in self.mains if self.group else ():
            self.own_topics(topic)  # names that are too long are refused now

    @property
    def mains(self) -> tuple[Topic[Any], ...]:
        """The topics it was given."""
        return super().sources

    @property
    def sources(self) -> tuple[Topic[Any], ...]:
        """The topics it reads: those it was given, its own ones, and, once prepared, those of an earlier policy."""
        return (*self.mains, *(own for topic in self.mains if self.group for own in self._read_with(topic)))

    def _read_with(self, main: Topic[Any]) -> list[Topic[Any]]:
        own = self.own_topics(main)
        names = {topic.name for topic in own}
        others = self.co_partitioned.get(main.name, ())
        return [*own, *(one for one in others if one.name in self.not_before or self.is_earlier(main, one.name, names))]

    def own_topics(self, topic: Topic[Any]) -> list[Topic[Any]]:
        """Where replayed records of this topic come back, then its retry topics in order: as many partitions."""
        names = [f"retry{n}-{written(seconds)}" for n, seconds in enumerate(self.retry.topics, 1)]
        retries = [replace(topic, name=own_topic(topic.name, self.group, name)) for name in names]
        return [replay_topic(topic, self.group), *retries]

    def prepare(self) -> Self:
        """Make those of its own topics that are missing, and return the consumer as it will run. `run` and `Lab.deploy`
        call this.

        An own topic may have fewer partitions than its source, to which some were added meanwhile. Raises TopicMismatch
        for one with other settings than it needs, ClusterUnreachable.
        """
        super().prepare()
        there = self.cluster.topics()
        read_with = {}
        for main in self.mains:
            own = self.own_topics(main)
            kept: list[Topic[Any]] = [dead_letters_topic(main, self.group), lanes_topic(main, self.group)]
            needs = list(zip(own, map(waiting, (0.0, *self.retry.topics)), strict=True))
            needs += [(topic, STORED) for topic in kept]
            needs += [(skips_topic(main, self.group), FOR_EVER)]
            made = {topic.name for topic, _ in needs}
            # A policy may be changed while records wait in the topics of the one before.
            earlier = [replace(main, name=name) for name in sorted(there) if self.is_earlier(main, name, made)]
            if self.store is not None and any(lag(self.cluster, self.group, [one.name for one in earlier]).values()):
                names = ", ".join(one.name for one in earlier)
                raise LabkitError(f"records wait in {names}, maybe of another state: handle them without a store first")
            given = [one for one in self.co_partitioned.get(main.name, ()) if one.name in self.not_before]
            read_with[main.name] = [*own, *earlier, *given]
            check_read(main, read_with[main.name], there)
            check_partitions(kept, 1, "nobody could read it as a whole;", there)
            for topic, needed in (*needs, *((topic, waiting(0.0)) for topic in earlier)):
                if there.get(topic.name):
                    check(topic, needed)
            missing = [(topic, needed) for topic, needed in needs if not there.get(topic.name)]
            copies = [*own, kept[0]]  # these hold records as they were
            larger = room(main) if any(topic in copies for topic, _ in missing) else {}
            for topic, needed in missing:
                partitions = there.get(main.name, topic.partitions) if topic in own else topic.partitions
                create(replace(topic, partitions=partitions), needed, larger if topic in copies else {})
            until = time.monotonic() + LISTED
            # A topic that somebody else makes at this moment may be known already, and be listed without partitions.
            while not all(map(self.cluster.topics().get, made)) and time.monotonic() < until:
                time.sleep(0.02)  # between two questions
        return replace(self, co_partitioned=read_with)

    def is_earlier(self, main: Topic[Any], name: str, now: Container[str]) -> bool:
        """Whether a topic is a retry topic of an earlier policy; `now` are the topics of the present one."""
        end = RETRY_TOPIC.search(name)
        if end is None or name in now or not name.startswith(main.name):
            return False
        return own_topic(main.name, self.group, end[0]) == name

    def run(self, stop: threading.Event, report: Report | None = None) -> None:
        """Consume until `stop` is set: see Consumer."""
        if not self.group:
            super().run(stop, report)  # which says how to name a group
        ready = self.prepare()
        with _Retries(ready) as retries:
            has_state = self.store is not None
            not_before = ready.not_before if has_state else {**ready.not_before, **retries.not_before()}
            handle: Callable[..., Any] = retries.handle_with_state if has_state else retries.handle
            bound = replace(
                ready, handler=handle, on_failure=retries.decide, on_change=retries.on_change, not_before=not_before
            )
            Consumer.run(bound, stop, report)


def milliseconds(seconds: float) -> int:
    """A delay in whole milliseconds, rounded up, but not for what a sum of floats has added."""
    return math.ceil(round(1000 * seconds, 6))


def written(seconds: float) -> str:
    """A delay as a topic's name has it, without a dot: whole seconds or milliseconds."""
    whole = milliseconds(seconds)
    return f"{whole}ms" if whole % 1000 else f"{whole // 1000}s"


def seconds_of(delay: str) -> float:
    """The seconds of a delay in a topic's name."""
    return int(delay[:-2]) / 1000 if delay.endswith("ms") else float(delay[:-1])


# -- What the consumer does while it runs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """A topic that the consumer reads: its main topic, how many retry topics a record in it has reached, its delay."""

    main: Topic[Any]
    number: int
    delay: float
    own: bool


class _Retries:
    """What one running consumer does with records that fail, and with those that come out of its own topics."""

    def __init__(self, consumer: RetryingConsumer) -> None:
        self.consumer, self.group = consumer, consumer.group
        self.stages: dict[str, _Stage] = {}
        for main in consumer.mains:
            self.stages[main.name] = _Stage(main, 0, 0.0, own=False)
            for own in consumer.co_partitioned[main.name]:
                number, delay = end.groups() if (end := RETRY_TOPIC.search(own.name)) else ("0", "0s")
                self.stages[own.name] = _Stage(main, int(number), seconds_of(delay), own=True)

    def __enter__(self) -> Self:
        self.commands = {main.name: Commands(main, self.group) for main in self.consumer.mains}
        return self

    def __exit__(self, *_: object) -> None:
        for commands in self.commands.values():
            commands.close()

    def not_before(self) -> dict[str, Callable[[Record[Any]], float]]:
        """When a record of one of its own topics may be handled."""

        def of(stage: _Stage) -> Callable[[Record[Any]], float]:
            def due(record: Record[Any]) -> float:
                history = parse(record.headers.get(HEADER))
                # Headers come from outside: a forged "in a year" must not make the record wait for a year.
                latest = record.timestamp + MILLISECOND + stage.delay
                return latest if history is None or history.due is None else min(history.due, latest)

            return due

        return {name: of(stage) for name, stage in self.stages.items() if stage.own}

    def handle(self, record: Record[Any]) -> Any:
        """The consumer's handler. It also sends the tombstone of a dead letter whose replay succeeds. The tombstone is
        confirmed before the commit, so a crash in between cannot leave the dead letter in the queue."""
        result = self.consumer.handler(record)
        if self.stages[record.topic].own:
            self.leave_queue(record.topic, [record.headers.get(HEADER)])
        return result

    def handle_with_state(self, state: Any, given: Any) -> Any:
        """The handler of a consumer with state: `given` is a record, or messages of one topic."""
        changes = self.consumer.handler(state, given)
        topic = given.topic if isinstance(given, Record) else given[0].topic()
        if self.stages[topic].own:
            raw = [given.raw_headers] if isinstance(given, Record) else map(headers_of, given)
            self.leave_queue(topic, [dict(one).get(HEADER) for one in raw])
        return changes

    def leave_queue(self, topic: str, headers: Iterable[str | bytes | None]) -> None:
        """Send the tombstones of the dead letters among records of an own topic; `headers` has their histories."""
        stage = self.stages[topic]
        for history in map(parse, headers):
            if history is not None and history.replayed:
                dead_letters_topic(stage.main, self.group).send(None, history.place)

    def on_change(self, step: Step, subject: Any) -> None:
        """The consumer's `on_change`: passes each step on, to the user's `on_change` and to the commands."""
        if self.consumer.on_change is not None:
            self.consumer.on_change(step, subject)
        if step in (Step.FAILED, Step.BLOCKED, Step.RECOVERED):
            self.commands[self.stages[subject.topic].main.name].on_step(step, subject)
            return
        if step is Step.ASSIGNED:
            self.look_for_others()
        for commands in self.commands.values():
            commands.on_step(step, subject)

    def look_for_others(self) -> None:
        """Look for retry topics of another policy, which another member may have made since this run began. Raises
        LabkitError, which ends this run: the next one reads them too."""
        try:
            there = self.consumer.cluster.topics()
        except ClusterUnreachable:
            return
        for main in self.consumer.mains:
            if others := [name for name in there if self.consumer.is_earlier(main, name, self.stages)]:
                raise LabkitError(
                    f"another member of {self.group} retries in {', '.join(others)}: start again, to read that too"
                )

    def decide(self, failed: FailedRecord) -> Decision:
        """The consumer's `on_failure`: what the policy, or a command, says."""
        stage = self.stages[failed.topic]
        policy = self.consumer.retry
        history = self.history(failed, stage)
        if isinstance(failed.command, Skip):
            return self.skip(failed, stage, history, failed.command)
        # Without a record it did not decode. (A handler may raise PoisonRecord about a record that it looked up.)
        retriable = failed.record is not None and not policy.is_final(failed.error)
        # A longer policy before this one had further retry topics: their records begin anew with this policy.
        if retriable and (stage.number == 0 or stage.number > len(policy.topics)):
            delay = policy.blocks.delay(failed.attempt)
            if delay is not None:
                return Retry(delay)
        if retriable and stage.number < len(policy.topics):
            return self.send_on(failed, stage, history, policy.topics[stage.number])
        # To the dead letters, under the place it came from: so the same record is there once.
        letter = dead_letter_of(failed.message, history, failed.times[-1])
        value, place, headers = letter.kept()
        return SetAside(dead_letters_topic(stage.main, self.group).name, place, value, headers)

    def history(self, failed: FailedRecord, stage: _Stage) -> RetryHistory:
        """Where the record came from, and all that has happened to it."""
        before = history_of(failed.message) if stage.own else None
        if before is None:
            timestamp = max(0, failed.message.timestamp()[1]) / 1000
            before = RetryHistory(failed.topic, failed.partition, failed.offset, timestamp, self.group)
        return msgspec.structs.replace(
            before,
            attempts=before.attempts + failed.attempt,
            failed=(*before.failed, *failed.times)[-TIMES:],
            error=error_text(failed.error),
            due=None,
        )

    def send_on(self, failed: FailedRecord, stage: _Stage, history: RetryHistory, delay: float) -> SetAside:
        """Set the record aside for the next retry topic."""
        following = self.consumer.own_topics(stage.main)[stage.number + 1]
        history = msgspec.structs.replace(history, due=failed.times[-1] + delay)
        headers = with_header(headers_of(failed.message), HEADER, encode(history))
        return SetAside(following.name, failed.message.key(), failed.message.value(), headers)

    def skip(self, failed: FailedRecord, stage: _Stage, history: RetryHistory, skip: Skip) -> SetAside:
        """Set the trace of a skip aside, in the place of the record."""
        key, value = shown(failed.message.key()), shown(failed.message.value())
        trace = Skipped(
            *(skip.by, time.time(), failed.topic, failed.partition, failed.offset, key),
            *(value, history.attempts, history.error),
        )
        return SetAside(skips_topic(stage.main, self.group).name, key, encode(trace))
