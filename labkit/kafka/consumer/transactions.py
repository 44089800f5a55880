"""Exactly once: what handlers sent, what was set aside and the offsets of all that go out in one transaction.

What a handler sent stays with its partition (`Partition.held`) until the commit. The thread that polls alone makes the
transaction, and none is open while a handler is waited for:

    begin → offsets, with the membership of now → outputs of all records below these offsets → commit

Offsets come first: a membership that is over is told before an output is queued. (An abort purges what is queued; the
gap would make the next transaction fail, too.) Only Kafka's errors abort. Nothing leaves `held` before the commit is
answered, so after an abort all of it goes with the next transaction, and no handler runs again.

Each call may be left unanswered: it is made again at a later turn, and the loop polls in between. Ending the process is
always safe: its successor in the slot settles what is open before it asks where to begin.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, NoReturn

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as DeliveryReport
from confluent_kafka import Producer as Sender

from labkit.kafka.consumer.commits import REACH, Commits
from labkit.kafka.consumer.failures import FailedRecord, SetAside
from labkit.kafka.consumer.lanes import Held, Partition
from labkit.kafka.consumer.run import Run, log
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import ClusterUnreachable, DeliveryFailed, LabkitError, TopicMissing, error_text, place_of
from labkit.kafka.producer import COPY_MAX_BYTES, HandlerContext, Output, handling, producer
from labkit.kafka.records import Message, Record

TIMEOUT = 10.0  # seconds after which the broker aborts a transaction, and refuses the slot that left it open
PATIENCE = 60.0  # seconds of this run without a commit that is to be, after which it ends
SETTLE = 20.0  # seconds for an open transaction to be settled when partitions come
NO_ANSWER = 10.0  # seconds a call may be out beyond the time it was given: librdkafka can lose one for ever
EXIT_NO_ANSWER = 71  # exit code of a process whose transactional call was lost
LOG = "__transaction_state"

TAKEN = (KafkaError._FENCED, KafkaError.FENCED_INSTANCE_ID, KafkaError.INVALID_PRODUCER_EPOCH)
# Refusals that another attempt would not mend: of a record, and of a topic.
RECORD_REFUSED = (
    *(KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE, KafkaError.INVALID_RECORD),
    *(KafkaError.INVALID_MSG, KafkaError.INVALID_TIMESTAMP, KafkaError.POLICY_VIOLATION),
)
TOPIC_REFUSED = (
    *(KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION),
    *(KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.TOPIC_EXCEPTION),
)


class State(Enum):
    """What the transaction does now."""

    READY = "ready"
    """There is none."""
    OPEN = "open"
    """It has begun; its offsets are not accepted yet."""
    SENDING = "sending"
    """Its offsets are accepted, its outputs go out."""
    COMMITTING = "committing"
    """The commit was asked for: it may be done, and can only be asked for again."""
    ABORTING = "aborting"
    """It is to be aborted."""
    CHECKING = "checking"
    """It was aborted. Are the committed offsets where they are believed to be?"""


_ALLOWED = {
    (State.READY, State.OPEN),
    (State.OPEN, State.SENDING),
    (State.SENDING, State.COMMITTING),
    (State.COMMITTING, State.READY),
    (State.OPEN, State.ABORTING),
    (State.SENDING, State.ABORTING),
    (State.COMMITTING, State.ABORTING),
    (State.ABORTING, State.CHECKING),
    (State.CHECKING, State.READY),
}


class _MustAbort(Exception):
    """Nothing of this transaction can take effect."""


class _Unanswered(Exception):
    """Not known yet: the same call again at a later turn."""


class ExactlyOnce(Commits):
    """Outputs and offsets in one transaction, by a client of its own. Its transactional id is the group's and the
    slot's, and lasts: a restart takes the slot over from its predecessor at once."""

    refuses = (
        "a handler that is exactly once can send only by topic.send(…), to topics of its consumer's cluster: that goes "
        "out with the record's offset, in one transaction. Leave out flush, deliver and a store's put; or make the "
        'consumer guarantee="at least once"'
    )

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        spec = run.spec
        self.slot = f"slot {spec.slot} of group {spec.group}"
        self.half = max(1, spec.max_ahead // 2)
        self.next_commit = 0.0
        self.state = State.READY
        self.positions: dict[Partition, int] = {}  # what is in the transaction
        self.outputs: list[tuple[Held, Output]] = []
        self.sent = 0  # how many of these are queued
        self.began: float | None = None  # the run's clock when a commit that is still to be was begun
        self.refused: dict[int, tuple[Held, int, str]] = {}  # of whom an output was refused: the error's code and text
        self.alone: set[int] = set()  # of whom it is to be known whether it was theirs
        self.over = False  # fenced, or fatal: nothing more may be asked of the client
        self.calls, self.inside = 0, False  # for the watchdog
        self.closed = threading.Event()
        self.sender = Sender(
            spec.cluster.config(
                {
                    "transactional.id": f"{spec.group}.{spec.slot}",
                    "transaction.timeout.ms": int(TIMEOUT * 1000),  # how long a dead slot holds readers back
                    "delivery.timeout.ms": int(TIMEOUT * 1000),  # may not be longer
                    "topic.metadata.propagation.max.ms": 3000,  # else a missing topic is told after 10 s only
                    "topic.metadata.refresh.interval.ms": 1000,
                    "partitioner": "murmur2_random",
                    "linger.ms": 0,
                    "retry.backoff.ms": 1,  # while the last markers are written; with 100 a commit takes 100 ms
                    "retry.backoff.max.ms": 50,
                    "message.max.bytes": COPY_MAX_BYTES,  # copies are among it; `Producer.output` has checked the rest
                    "compression.type": "zstd",
                    "queue.buffering.max.messages": 1_000_000,
                    "delivery.report.only.error": True,
                }
            )
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Static members: a restart changes no assignment. Eager ones: with a cooperative assignor a static member that
        is killed between the two rebalances of a transfer leaves partitions to nobody."""
        return {"partition.assignment.strategy": "range", "group.instance.id": self.run.spec.slot}

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.client.assign(partitions)

    def unassign(self, partitions: list[TopicPartition]) -> None:
        self.client.unassign()

    def start(self, client: Client) -> None:
        """Take the slot over. What its predecessor left open is settled: else `committed()` would wait for that."""
        super().start(client)
        threading.Thread(target=self._watch, name="transactional calls", daemon=True).start()
        spec, until = self.run.spec, time.monotonic() + PATIENCE
        with suppress(KafkaException):  # a connection first: without one the client asks every 0.5 s only
            self.sender.list_topics(spec.sources[0].name, timeout=1.0)
        while not self.run.stop.is_set():
            try:
                self._call(self.sender.init_transactions, REACH)
                return
            except (_Unanswered, _MustAbort) as error:
                self._check_log()
                if time.monotonic() > until:
                    raise ClusterUnreachable(
                        f"{spec.cluster.bootstrap} did not let {self.slot} begin within {PATIENCE:g} s: {error}"
                    ) from error
        self.over = True

    def _check_log(self) -> None:
        """Raise LabkitError if the brokers can keep no log of transactions: the client only waits."""
        cluster = self.run.spec.cluster
        with suppress(ClusterUnreachable):
            about = cluster.ask(lambda client: client.list_topics(timeout=REACH))
            brokers = len(about.brokers)
            if LOG not in about.topics or not about.topics[LOG].partitions:
                raise LabkitError(
                    f"the brokers at {cluster.bootstrap} have made no transaction log, which exactly once needs: set "
                    f"their transaction.state.log.replication.factor to {brokers}, the number of brokers, or less"
                )
            replicas = min(len(one.replicas) for one in about.topics[LOG].partitions.values())
            with suppress(TopicMissing):
                needed = int(cluster.topic_config(LOG)["min.insync.replicas"])
                if needed > replicas:
                    raise LabkitError(
                        f"the transaction log of {cluster.bootstrap} takes no writes, so exactly once cannot work: it "
                        f"has {replicas} replicas and demands {needed}. Set transaction.state.log.min.isr of the "
                        f"brokers, and min.insync.replicas of their topic {LOG}, to {replicas}"
                    )

    # -- called by workers

    def publish(self, partition: Partition, messages: Sequence[Message], outputs: list[Output]) -> None:
        with partition.lock:
            partition.held.append(Held(messages, outputs))

    def set_aside(
        self, partition: Partition, message: Message, aside: SetAside, answered: Callable[[str | None], None]
    ) -> None:
        output = self._copy(aside)
        with partition.lock:
            partition.held.append(Held((message,), [output], is_aside=True))
        answered(None)

    def _copy(self, aside: SetAside) -> Output:
        sender = producer(self.run.spec.cluster, reports=True, copies=True)
        return sender.output(aside.topic, aside.value, aside.key, aside.headers)

    # -- called by the thread that polls

    def ahead(self, partition: Partition) -> int:
        """What is finished is still held here, until it is committed."""
        return partition.next_offset - partition.committed

    def commit(self, now: float) -> None:
        if self.over:
            return
        if self.state is State.READY:
            partitions = self.run.partitions.values()
            if now < self.next_commit and not any(map(self._half_is_finished, partitions)):
                return
            self.next_commit = now + self.run.spec.commit_interval
            self._begin({p: at for p in partitions if (at := p.position()) > p.committed})
        self._advance(0.5)

    def _half_is_finished(self, partition: Partition) -> bool:
        """Whether a commit makes room for so much more that it should come at once."""
        committed = partition.committed
        return partition.next_offset - committed >= self.half and partition.position() - committed >= self.half

    def before_assignment(self) -> None:
        """`committed()` waits for offsets in open transactions: of ours only this thread could settle them."""
        if not self._settle_open(SETTLE):
            self._end(f"its transaction was not settled within {SETTLE:g} s")

    def lost(self) -> None:
        """Offsets that are not accepted yet must never be: with the metadata of a new membership they would."""
        if self.state is State.OPEN:
            self._to(State.ABORTING)

    def settle(self, positions: dict[Partition, int]) -> None:
        patience = max(self.run.spec.drain, REACH)
        for _ in range(3):  # an abort may come of the rebalance itself
            if not self._settle_open(patience):
                break
            self._begin(positions)
            if self._settle_open(patience) and all(p.committed == at for p, at in positions.items()):
                return
        if not self.over:
            log(f"{self.slot}: not committed when partitions went: their next owner learns it, or handles them again")

    def close(self) -> None:
        if self.state not in (State.READY, State.COMMITTING) and not self.over:
            with suppress(Exception):  # else it would hold readers back until it times out
                self._call(self.sender.abort_transaction, 1.0)
        self.closed.set()

    # -- the transaction

    def _to(self, state: State) -> None:
        """Change state; a change that makes no sense is a bug and raises."""
        if (self.state, state) not in _ALLOWED:
            raise AssertionError(f"a transaction cannot go from {self.state.value} to {state.value}")
        self.state = state

    def _begin(self, positions: dict[Partition, int]) -> None:
        # Metadata without a member would be accepted unchecked.
        if not positions or self.over or not self.client.memberid():
            return
        self.run.report(Step.COMMITTING, _by_place(positions))
        self.positions, self.sent = positions, 0
        self.outputs = [(held, one) for p, at in positions.items() for held in p.held_below(at) for one in held.outputs]
        self.began = self.run.clock if self.began is None else self.began
        self._call(self.sender.begin_transaction)
        self._to(State.OPEN)

    def _settle_open(self, patience: float) -> bool:
        """Wait until there is no transaction. False: there is one, or none may be asked for any more."""
        until = time.monotonic() + patience
        while self.state is not State.READY and not self.over and time.monotonic() < until:
            self._advance(0.5)
        return self.state is State.READY and not self.over

    def _advance(self, wait: float) -> None:
        """Take the transaction as far as it goes now; one call may take `wait` seconds, the offsets longer."""
        try:
            try:
                self._commit(wait)
            except _MustAbort as error:
                log(f"{self.slot}: the transaction is aborted, its work goes with the next one: {error}")
                self._to(State.ABORTING)
            if self.state is State.ABORTING:
                self._call(self.sender.abort_transaction, wait)
                self._to(State.CHECKING)
            if self.state is State.CHECKING:
                self._check_committed(wait)
                self._to(State.READY)
                self._replace_refused()
        except _Unanswered as error:
            if self.began is not None and self.run.clock - self.began > PATIENCE:
                self._end(f"no transaction was committed for {PATIENCE:g} s: {error}")

    def _commit(self, wait: float) -> None:
        if self.state is State.OPEN:
            offsets = self.offsets(_by_place(self.positions))
            try:
                metadata = self.client.consumer_group_metadata()  # of now: a generation that is over is told
                self._call(self.sender.send_offsets_to_transaction, offsets, metadata, 4 * wait)
            except _Unanswered as error:  # a second such call can be lost for ever
                raise _MustAbort(str(error)) from error
            self._to(State.SENDING)
            self.run.report(Step.OFFSETS_SENT, None)
        if self.state is State.SENDING:
            self._produce()
            if self.run.hooks:  # the commit waits for them anyway
                self._flush(wait)
                self.run.report(Step.FLUSHED, None)
            self._to(State.COMMITTING)
        if self.state is State.COMMITTING:
            self._call(self.sender.commit_transaction, wait)
            self._to(State.READY)
            self.began = None
            self.alone.clear()
            for partition, at in self.positions.items():
                partition.committed = at
                partition.drop_held(at)
            self.run.report(Step.COMMITTED, _by_place(self.positions))

    def _produce(self) -> None:
        """Queue what is not queued yet."""
        while self.sent < len(self.outputs):
            held, (topic, value, key, number, headers) = self.outputs[self.sent]
            apart = self.sent > 0 and held is not self.outputs[self.sent - 1][0] and bool(self.alone)
            if apart and not self.alone.isdisjoint((id(held), id(self.outputs[self.sent - 1][0]))):
                self._flush(REACH)  # what goes out together is refused together
            try:
                report = partial(self._on_delivery, held)
                self.sender.produce(topic, value, key, number, report, None, 0, headers)  # type: ignore[arg-type]
            except BufferError as error:
                self.sender.poll(0.1)
                raise _Unanswered("the buffer of unsent records is full") from error
            except KafkaException as error:  # _STATE: the transaction failed meanwhile
                if error.args[0].fatal():
                    self._end(error.args[0].str(), error.args[0].code())
                self._on_delivery(held, error.args[0], None)
                raise _MustAbort(error.args[0].str()) from error
            self.sent += 1

    def _flush(self, wait: float) -> None:
        try:
            left = self.sender.flush(wait)
        except SystemError:  # of a client that was fenced meanwhile: the commit tells
            return
        if left and self.refused:
            raise _MustAbort("the broker refused an output")
        if left:
            raise _Unanswered(f"{left:,} outputs are not confirmed yet")

    def _check_committed(self, wait: float) -> None:
        """End if somebody else has moved the committed offsets: what is held here is then not what comes next."""
        ours = {key: p for key, p in self.run.partitions.items() if p in self.positions and p.committed >= 0}
        if not ours:
            return
        try:
            stored = self.client.committed([TopicPartition(*key) for key in ours], timeout=max(wait, 1.0))
        except KafkaException as error:
            raise _Unanswered(error.args[0].str()) from error
        for one in stored:
            believed = ours[one.topic, one.partition].committed
            if one.error is None and one.offset >= 0 and one.offset != believed and not self.of_another_topic(one):
                place = place_of(one.topic, one.partition, one.offset)
                self._end(f"the group's offset is {place}, not {believed}: somebody else has committed. Begin there")

    def _on_delivery(self, held: Held, error: KafkaError | None, message: DeliveryReport | None) -> None:
        if error is not None and error.code() in RECORD_REFUSED + TOPIC_REFUSED:
            topic = "" if message is None else f"{message.topic()}: "
            self.refused[id(held)] = held, error.code(), f"{topic}{error.str()}"

    def _replace_refused(self) -> None:
        """Let dead letters take the place of outputs that the broker does not take, once it is clear whose those are:
        the client sends several together, which are then refused together."""
        refused, self.refused = self.refused, {}
        for held, code, why in refused.values():
            if code in TOPIC_REFUSED:
                raise DeliveryFailed(f"what the handler of {held.place} sent was refused: {why}")
        if len(refused) > 1 and not refused.keys() <= self.alone:
            self.alone |= refused.keys()
            return
        for held, _, why in refused.values():
            self._replace(held, f"what the handler of {held.place} sent was refused: {why}")

    def _replace(self, held: Held, why: str) -> None:
        """Ask the policy about a record whose outputs are refused; no further attempt would mend that."""
        error, (message, *others) = DeliveryFailed(why), held.messages
        if others or held.is_aside:  # of which of them the output was, nobody knows; and a dead letter has no other
            raise error
        failed = FailedRecord(message, lambda _: None)
        failed.fail(None, error)
        failed.decision = self.run.spec.on_failure(failed)
        if not isinstance(failed.decision, SetAside):
            raise error
        log(f"{error_text(error)}: set aside in {failed.decision.topic}")
        token = handling.set(HandlerContext(record=Record(message, None, None)))
        try:
            copy = self._copy(failed.decision)
        finally:
            handling.reset(token)
        self.run.partitions[failed.topic, failed.partition].replace_held(held, Held((message,), [copy], is_aside=True))
        self.run.report(Step.FAILED, failed)
        self.run.report(Step.RECOVERED, failed)

    # -- calls

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.calls, self.inside = self.calls + 1, True
        try:
            function(*arguments)
        except KafkaException as caught:
            error: KafkaError = caught.args[0]
            if error.fatal() or error.code() in TAKEN:  # FENCED_INSTANCE_ID says it is abortable, and is for ever
                self._end(error.str(), error.code())
            if error.txn_requires_abort():
                raise _MustAbort(error.str()) from caught
            if error.retriable():
                raise _Unanswered(error.str()) from caught
            self._end(error.str(), error.code())
        finally:
            self.inside = False

    def _end(self, why: str, code: int = 0) -> NoReturn:
        """End the run, and ask nothing more of the client."""
        self.over = True
        raise self.taken(why) if code in TAKEN else LabkitError(f"{self.slot} cannot go on: {why}")

    def taken(self, why: str) -> LabkitError:
        """The error of a slot that another process has now."""
        return LabkitError(
            f"{self.slot} was taken over while this process had it: by another one that was given the same slot, or "
            f"because this one was frozen or cut off for more than {TIMEOUT:g} s. It ends; its successor handles what "
            f"it had not committed. Give each process a slot of its own [librdkafka: {why}]"
        )

    def _watch(self) -> None:
        """End the process when a call does not come back. A process that was frozen does not age meanwhile."""
        seen, age, before = 0, 0.0, time.monotonic()
        while not self.closed.wait(0.2):
            now = time.monotonic()
            age = age + min(now - before, 1.0) if self.inside and self.calls == seen else 0.0
            seen, before = self.calls, now
            if age > REACH + NO_ANSWER:
                log(f"{self.slot}: a call of the client does not come back; the process ends, nothing is lost. Stacks:")
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_NO_ANSWER)


def _by_place(positions: dict[Partition, int]) -> dict[tuple[str, int], int]:
    return {(partition.topic, partition.number): at for partition, at in positions.items()}
