"""Pattern 4: retry policies, as data, around the handler of the one consumer.

    RetryingConsumer(renewals, renew, retry=blocking(1, 5, 30))                     # keeps order; 1 + 3 calls
    RetryingConsumer(renewals, renew, retry=blocking(exponential(0.1, cap=60)))     # keeps order for ever
    RetryingConsumer(renewals, renew, retry=retry_topics(1, 10, 60))                # later records are not held up
    RetryingConsumer(renewals, renew, retry=blocking(0.1).then(retry_topics(1, 10)))

Delays are seconds. A record whose attempts are used up, one that does not decode, and one that failed with an error
named `non_retriable` go to the dead-letter queue (see `dead_letters`). The topics of a consumer come with it, and its
group is part of their names. Whatever is set aside is confirmed before its source is committed.
"""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import msgspec

from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import ClusterUnreachable, DeliveryFailed, LabkitError, TopicMissing
from labkit.kafka.producer import POD, Producer, producer
from labkit.kafka.records import Record, encode
from labkit.kafka.steps import Ask, Decision, Done, Failure, Report, Retry, Step, Stop
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import SHOWN, Commands, Skip, Skipped, lanes_topic, skips_topic
from labkit.patterns.dead_letters import dead_letter_of, dead_letters_topic, replay_topic
from labkit.patterns.trails import HEADER, TIMES, Trail, error_text, headers_of, own_topic, parse, text_of

FOREVER = 1e9  # seconds, 31 years: no delay is longer
CONFIRM = 5.0  # seconds for what is set aside to be confirmed, before the lane waits
AGAIN, AGAIN_CAP = 0.5, 10.0  # seconds until that is tried again, doubling
MILLISECOND = 0.001  # by which a record's timestamp, a whole number of them, may be too early
LISTED = 10.0  # seconds for a new topic to be listed everywhere
WEEK = 7 * 24 * 3600
RETRY_TOPIC = re.compile(r"retry(\d+)-(\d+)(s|ms)$")  # how its name ends: which one, and its delay


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
        """The same as of `exponential`."""
        return self.delays[attempt - 1] if attempt <= len(self.delays) else None


@dataclass(frozen=True)
class Policy:
    """What becomes of a record that fails: first `blocks`, then `topics`, then the dead-letter queue."""

    blocks: fixed | exponential = field(default_factory=fixed)
    """The delays for which its lane waits, its order kept."""
    topics: tuple[float, ...] = ()
    """The delays of its retry topics, each handled once."""
    non_retriable: tuple[type[BaseException], ...] = ()
    """Errors that another attempt would not mend: one call, then the dead-letter queue."""

    def then(self, following: Policy) -> Policy:
        """This one, and when it is used up the following one. Raises LabkitError for an order that makes no sense."""
        if isinstance(self.blocks, exponential) and self.blocks.times is None:
            raise LabkitError("what blocks for ever is followed by nothing: give exponential(…, times=8) an end")
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
    whole = tuple(math.ceil(round(1000 * delay, 6)) / 1000 for delay in _checked("retry_topics", delays))
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

    `retry` is one policy, or one for each topic by its name or short name. Lag counts what waits in retry topics too.
    When it is changed, what waits in topics of the policy before is handled as well, each record when it was to be.
    """

    retry: Policy | Mapping[str, Policy] = field(default_factory=dead_letter)

    def __post_init__(self) -> None:
        super().__post_init__()
        for topic in self.mains:
            self.policy(topic)
            if self.group:
                self.own_topics(topic)  # names that are too long are told now

    @property
    def mains(self) -> tuple[Topic[Any], ...]:
        """The topics it was given."""
        return super().sources

    @property
    def sources(self) -> tuple[Topic[Any], ...]:
        """The topics it reads: those it was given, and its own; once prepared, also those of an earlier policy."""
        return (*self.mains, *(own for topic in self.mains if self.group for own in self._beside(topic)))

    def _beside(self, main: Topic[Any]) -> list[Topic[Any]]:
        own = self.own_topics(main)
        names = {topic.name for topic in own}
        return [*own, *(topic for topic in self.companions.get(main.name, ()) if self.is_left(main, topic.name, names))]

    def policy(self, topic: Topic[Any]) -> Policy:
        """What is done with failed records of this topic. Raises LabkitError when nothing was said."""
        retry: Any = self.retry
        if isinstance(retry, Mapping):
            retry = retry.get(topic.name, retry.get(topic.short))
        if not isinstance(retry, Policy):
            raise LabkitError(f"retry for topic {topic.short} is a policy, such as blocking(1, 5, 30), not {retry!r}")
        return retry

    def own_topics(self, topic: Topic[Any]) -> list[Topic[Any]]:
        """Where replayed records of this topic come back, then its retry topics in order: as many partitions."""
        names = [f"retry{n}-{_written(seconds)}" for n, seconds in enumerate(self.policy(topic).topics, 1)]
        retries = [replace(topic, name=own_topic(topic.name, self.group, name)) for name in names]
        return [replay_topic(topic, self.group), *retries]

    def prepare(self) -> Self:
        """Make the topics of its own that are not there yet; it as it will run. `run` and `Lab.deploy` do it.

        A topic that is there stays as it is, though partitions were added to its source meanwhile.
        """
        there = self.cluster.topics()
        beside = {}
        for main in self.mains:
            delays = (0.0, *self.policy(main).topics)
            beside[main.name] = self.own_topics(main)
            for own, delay in zip(beside[main.name], delays, strict=True):
                if not there.get(own.name):
                    # The broker's clock says since when a record waits: a forged timestamp could make it wait for ever.
                    keep = f"{(WEEK + delay) * 1000:.0f}"
                    own = replace(own, partitions=there.get(main.name, own.partitions))
                    own.create({"retention.ms": keep, "message.timestamp.type": "LogAppendTime"})
            if not there.get((letters := dead_letters_topic(main, self.group)).name):
                letters.create({"cleanup.policy": "compact"})
            if not there.get((lanes := lanes_topic(main, self.group)).name):
                lanes.create({"cleanup.policy": "compact"})
            if not there.get((skips := skips_topic(main, self.group)).name):
                skips.create({"retention.ms": "-1"})
            made = {topic.name for topic in (*beside[main.name], letters, lanes, skips)}
            until = time.monotonic() + LISTED
            # One that somebody else makes at this moment may be known already, and be listed without partitions.
            while not all(map(self.cluster.topics().get, made)) and time.monotonic() < until:
                time.sleep(0.02)  # between two questions
            # A policy may be changed while records wait in the topics of the one before.
            beside[main.name] += [replace(main, name=name) for name in sorted(there) if self.is_left(main, name, made)]
        return replace(self, companions=beside)

    def is_left(self, main: Topic[Any], name: str, now: Container[str]) -> bool:
        """Whether a topic is one of its retry topics, of another policy than that with the topics `now`."""
        end = RETRY_TOPIC.search(name)
        if end is None or name in now or not name.startswith(main.name):
            return False
        return own_topic(main.name, self.group, end[0]) == name

    def run(self, stop: threading.Event, report: Report | None = None) -> None:
        """Consume until `stop` is set: see Consumer."""
        if not self.group:
            super().run(stop, report)  # says how to name one
        ready = self.prepare()
        with _Retries(ready) as retries:
            not_before = {**self.not_before, **retries.not_before()}
            on_change = _both(self.on_change, retries.told)
            bound = replace(ready, on_failure=retries.decide, on_change=on_change, not_before=not_before)
            Consumer.run(bound, stop, report)


def _written(seconds: float) -> str:
    """A delay in a topic's name, where no dot may be: whole seconds or milliseconds."""
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{seconds * 1000:.0f}ms"


def _both(first: Report | None, second: Report) -> Report:
    if first is None:
        return second

    def tell(step: Step, subject: Any) -> None:
        first(step, subject)
        second(step, subject)

    return tell


# -- What it does while it runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hop:
    """A topic it reads: the main topic behind it, how many retry topics a record in it has reached, its delay."""

    main: Topic[Any]
    number: int
    delay: float
    own: bool


@dataclass
class _Case:
    """A record that failed and is not finished."""

    since: float
    attempt: int
    failed: list[float]
    """When its attempts failed, in this topic and process."""
    tries: int = 0
    """How often it could not be set aside."""
    sent: dict[str, _Sent] = field(default_factory=dict)
    """What is on its way to where it is set aside, by topic: not to be sent twice."""


class _Sent:
    """One record that is to be confirmed."""

    def __init__(self) -> None:
        self.known = threading.Event()
        self.refused: str | None = None

    def told(self, refused: str | None, partition: int, offset: int) -> None:
        self.refused = refused
        self.known.set()


class _Retries:
    """Decides about failures in one running consumer, from the threads of its handlers."""

    def __init__(self, consumer: RetryingConsumer) -> None:
        self.consumer, self.group = consumer, consumer.group
        self.hops: dict[str, _Hop] = {}
        for main in consumer.mains:
            self.hops[main.name] = _Hop(main, 0, 0.0, own=False)
            for own in consumer.companions[main.name]:
                number, delay, unit = end.groups() if (end := RETRY_TOPIC.search(own.name)) else ("0", "0", "s")
                seconds = int(delay) / (1000 if unit == "ms" else 1)
                self.hops[own.name] = _Hop(main, int(number), seconds, own=True)
        self.cases: dict[str, _Case] = {}  # by place
        self.replays: dict[tuple[str, int], dict[int, Trail]] = {}  # begun and not committed; by partition and offset
        self.lock = threading.Lock()
        self.producer = Producer(consumer.cluster, tells=True)
        self.patience = min(CONFIRM, consumer.deadline / 2)
        self.me = os.environ.get(POD) or f"{socket.gethostname()}/{os.getpid()}"

    def __enter__(self) -> Self:
        self.commands = {main.name: Commands(main, self.group, self.producer) for main in self.consumer.mains}
        return self

    def __exit__(self, *_: object) -> None:
        for commands in self.commands.values():
            commands.close()
        self.producer.unconfirmed(2.0)

    # -- records of its own topics

    def not_before(self) -> dict[str, Callable[[Record[Any]], float]]:
        """When a record of one of its own topics may be handled."""

        def of(hop: _Hop) -> Callable[[Record[Any]], float]:
            def due(record: Record[Any]) -> float:
                trail = parse(record.headers.get(HEADER))
                if trail is not None and trail.replayed:
                    with self.lock:
                        self.replays.setdefault((record.topic, record.partition), {})[record.offset] = trail
                # Headers come from outside: one that says "in a year" must not make the record wait for a year.
                latest = record.timestamp + MILLISECOND + hop.delay
                return latest if trail is None or trail.due is None else min(trail.due, latest)

            return due

        return {name: of(hop) for name, hop in self.hops.items() if hop.own}

    def told(self, step: Step, subject: Any) -> None:
        """The consumer's `on_change`."""
        if step is Step.RECOVERED:
            with self.lock:
                self.cases.pop(subject.place, None)
            self.commands[self.hops[subject.topic].main.name].unblock(subject)
        elif step is Step.ASSIGNED:
            with self.lock:
                for topic, partition, _ in subject:
                    self.replays.pop((topic, partition), None)  # noted by a worker that was late when it was lost
            self.look_for_others()
            for commands in self.commands.values():
                commands.assigned(subject)
        elif step is Step.COMMITTING:
            self.leave_queue(subject)
        elif step is Step.COMMITTED:
            for commands in self.commands.values():
                commands.committed(subject)
        elif step in (Step.REVOKED, Step.LOST):
            with self.lock:
                for place in subject:
                    self.replays.pop(place, None)
            for commands in self.commands.values():
                commands.revoked(subject)

    def look_for_others(self) -> None:
        """Another member may have run with another policy, and left records in topics that were not there when this one
        began. Raises LabkitError, which ends this run: the next one reads them too."""
        try:
            there = self.consumer.cluster.topics()
        except ClusterUnreachable:
            return
        for main in self.consumer.mains:
            if others := [name for name in there if self.consumer.is_left(main, name, self.hops)]:
                raise LabkitError(
                    f"another member of {self.group} retries in {', '.join(others)}: start again, to read that too"
                )

    def leave_queue(self, positions: Mapping[tuple[str, int], int]) -> None:
        """Replayed records that are about to be committed, and were not set aside again, are no dead letters any more.
        Confirmed before the commit: after a crash in between they are handled again, and not left in the queue."""
        with self.lock:
            done = []
            for place, position in positions.items():
                begun = self.replays.get(place, {})
                done += [(place[0], begun.pop(offset)) for offset in sorted(begun) if offset < position]
        for topic, trail in done:
            letters = dead_letters_topic(self.hops[topic].main, self.group)
            producer(letters.cluster).send(letters.name, None, trail.place)  # what the commit waits for

    # -- failures

    def decide(self, failure: Failure) -> Decision:
        """The consumer's `on_failure`."""
        hop, case = self.hops[failure.topic], self.case(failure)
        commands = self.commands[hop.main.name]
        before = (parse(headers_of(failure.raw).get(HEADER)) if hop.own and failure.raw is not None else None) or Trail(
            *(failure.topic, failure.partition, failure.offset, _timestamp(failure), self.group)
        )
        trail = msgspec.structs.replace(
            before,
            attempts=before.attempts + failure.attempt,
            failed=(*before.failed, *case.failed)[-TIMES:],
            error=error_text(failure.error),
            due=None,
        )
        decision: Decision
        try:
            if (skip := commands.skip_of(failure)) is not None:
                return self.skip(failure, case, hop, trail, skip)
            decision = self.next(failure, case, hop, trail)
        except DeliveryFailed as error:
            if (gone := self.missing(case)) is not None:
                return Stop(TopicMissing(f"topic {gone} was deleted while {self.group} was running: start it again"))
            case.tries += 1
            decision = Ask(min(AGAIN_CAP, AGAIN * 2.0 ** min(case.tries - 1, 60)))
            failure = replace(failure, error=error)  # that is what it is blocked by now
        if isinstance(decision, Retry | Ask):
            commands.block(failure, trail.attempts, time.time() + decision.after, self.me)
        return decision

    def missing(self, case: _Case) -> str | None:
        """A topic that should have taken the record and does not exist any more."""
        try:
            there = self.consumer.cluster.topics()
        except ClusterUnreachable:
            return None
        for name in case.sent.keys() - there.keys():
            try:
                self.consumer.cluster.topic_id(name)  # a broker that just came back lists a topic a moment later
            except TopicMissing:
                return name
            except ClusterUnreachable:
                return None
        return None

    def case(self, failure: Failure) -> _Case:
        """What is known of this record; a new attempt is noted."""
        with self.lock:
            case = self.cases.get(failure.place)
            if case is None or case.since != failure.since:
                case = self.cases[failure.place] = _Case(failure.since, failure.attempt, [time.time()])
            elif case.attempt != failure.attempt:
                case.attempt = failure.attempt
                case.failed = [*case.failed, time.time()][-TIMES:]
            return case

    def next(self, failure: Failure, case: _Case, hop: _Hop, trail: Trail) -> Decision:
        """What the policy says. Raises DeliveryFailed when the record cannot be set aside now."""
        policy = self.consumer.policy(hop.main)
        # Without a record it did not decode. (A handler may raise PoisonRecord of another one, which it has looked up.)
        retriable = failure.record is not None and not isinstance(failure.error, policy.non_retriable)
        # Beyond its last retry topic is what a policy before it has set aside: that begins with this one.
        if retriable and (hop.number == 0 or hop.number > len(policy.topics)):
            delay = policy.blocks.delay(failure.attempt)
            if delay is not None:
                return Retry(max(0.0, case.failed[-1] + delay - time.time()))
        if retriable and hop.number < len(policy.topics):
            self.send_on(failure, case, hop, trail, policy.topics[hop.number])
        else:
            self.send_to_queue(failure, case, hop, trail)
        self.set_aside(failure)
        return Done()

    def send_on(self, failure: Failure, case: _Case, hop: _Hop, trail: Trail, delay: float) -> None:
        """To the next retry topic."""
        following = self.consumer.own_topics(hop.main)[hop.number + 1]
        trail = msgspec.structs.replace(trail, due=case.failed[-1] + delay)
        assert failure.raw is not None  # noqa: S101 - the loop's failures have it
        headers = {**headers_of(failure.raw), HEADER: encode(trail)}
        self.publish(case, following.name, failure.raw.value(), failure.raw.key(), headers)

    def send_to_queue(self, failure: Failure, case: _Case, hop: _Hop, trail: Trail) -> None:
        """To the dead letters, under the place where it came from: the same record is there once."""
        assert failure.raw is not None  # noqa: S101
        letter = dead_letter_of(failure.raw, trail, time.time())
        self.publish(case, dead_letters_topic(hop.main, self.group).name, encode(letter), letter.place)

    def skip(self, failure: Failure, case: _Case, hop: _Hop, trail: Trail, skip: Skip) -> Done:
        """Let it be, once that has left its trace. Raises DeliveryFailed."""
        value = text_of(None if failure.raw is None else failure.raw.value())
        trace = Skipped(
            *(skip.by, time.time(), failure.topic, failure.partition, failure.offset, failure.key),
            *(value and value[:SHOWN], trail.attempts, trail.error),
        )
        self.publish(case, skips_topic(hop.main, self.group).name, encode(trace), failure.key)
        self.set_aside(failure)
        return Done()

    def set_aside(self, failure: Failure) -> None:
        """A replayed record that failed again, or is skipped, does not leave the queue."""
        with self.lock:
            self.replays.get((failure.topic, failure.partition), {}).pop(failure.offset, None)

    def publish(
        self,
        case: _Case,
        topic: str,
        value: bytes | None,
        key: str | bytes | None,
        headers: Mapping[str, str | bytes | None] | None = None,
    ) -> None:
        """Send one record, unless it is on its way already, and see it confirmed. Raises DeliveryFailed."""
        sent = case.sent.get(topic)
        if sent is None or sent.refused is not None:
            sent = _Sent()
            self.producer.send(topic, value, key, headers, told=sent.told)
            case.sent[topic] = sent
        until = time.monotonic() + self.patience
        while not sent.known.is_set():
            if time.monotonic() > until:
                raise DeliveryFailed(f"{topic} did not confirm within {self.patience:g} s: is the broker up?")
            self.producer.hear(0.005)  # what others hear may be ours
        if sent.refused is not None:
            raise DeliveryFailed(f"{topic}: {sent.refused}")


def _timestamp(failure: Failure) -> float:
    return 0.0 if failure.raw is None else max(0, failure.raw.timestamp()[1]) / 1000
