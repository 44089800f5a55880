"""Exactly once: what handlers sent, what was set aside, and the offsets go out in one transaction.

What a handler sent stays with its partition (`Partition.held`) until the commit. Only the thread that polls makes
transactions, and none is open while it waits for a handler:

    begin → offsets, with the present group metadata → outputs of all records below these offsets → commit

Offsets come first, so that a former membership is refused before an output is queued. (An abort purges what is queued,
and the gap would make the next transaction fail, too.) Only Kafka's errors abort. Nothing leaves `held` before the
commit is answered, so after an abort all of it goes with the next transaction, and no handler runs again.

A call that is not answered in time is made again at a later turn; the loop polls in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from labkit.kafka.consumer.commits import REACH, Commits
from labkit.kafka.consumer.failures import FailedRecord, SetAside
from labkit.kafka.consumer.held_outputs import TOPIC_REFUSED, Held, Refusals
from labkit.kafka.consumer.lanes import Partition
from labkit.kafka.consumer.run import Run, log
from labkit.kafka.consumer.state import Changes, PartitionState, most_bytes, outputs_of
from labkit.kafka.consumer.steps import Measured, Step
from labkit.kafka.consumer.transactional_client import MustAbort, TransactionalClient, Unanswered
from labkit.kafka.errors import DeliveryFailed, error_text, place_of
from labkit.kafka.producer import HandlerContext, Output, handling, producer
from labkit.kafka.records import Message, Record

PATIENCE = 60.0  # seconds of this run for a commit to succeed; then the run ends
SETTLE = 20.0  # seconds to settle an open transaction before partitions are assigned
WAIT = 0.5  # seconds for one answer, in the thread that polls
BRIEF = 0.005  # the same while that thread has records to handle itself

NOT_ALLOWED = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)


class State(Enum):
    """What the transaction does now."""

    READY = "ready"
    """There is none."""
    OPEN = "open"
    """It has begun; its offsets are not accepted yet."""
    SENDING = "sending"
    """Its offsets are accepted, its outputs go out."""
    COMMITTING = "committing"
    """The commit was requested: it may be done, and can only be requested again."""
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


class ExactlyOnce(Commits):
    """Outputs and offsets in one transaction. Its transactional id consists of group and slot, so that a restarted
    process takes over from its predecessor at once."""

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
        most = None if spec.store is None else most_bytes(spec.store)
        self.sender = TransactionalClient(spec.cluster, f"{spec.group}.{spec.slot}", self.slot, most)
        self.state = State.READY
        self.positions: dict[Partition, int] = {}  # what is in the transaction
        self.outputs: list[Output] = []
        self.owners: list[Held] = []  # the owner of each output
        self.changes: dict[PartitionState, Changes] = {}  # the changes of states among them
        self.sent = 0  # how many outputs are queued
        self.began: float | None = None  # the run's clock when the commit that is missing was begun
        self.not_allowed = ""  # why no transaction can succeed
        self.counts = {"transactions committed": 0, "transactions aborted": 0}
        self.refused: Refusals = {}
        self.of_states = Held((), [], self.refused, is_aside=True)  # the owner of the changes of states
        self.one_by_one: set[int] = set()  # ids of Held that are flushed one by one, to learn whose output was refused

    @property
    def settings(self) -> dict[str, Any]:
        """Members are static, so that a restart changes no assignment. They are eager: if a static member with a
        cooperative assignor is killed between two rebalances, partitions may have no owner."""
        return {"partition.assignment.strategy": "range", "group.instance.id": self.run.spec.slot}

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.client.assign(partitions)

    def unassign(self, partitions: list[TopicPartition]) -> None:
        self.client.unassign()

    def start(self, client: Client) -> None:
        """Settle the predecessor's open transaction first, because `committed()` would wait for it."""
        super().start(client)
        self.sender.start(self.run.spec.sources[0].name, self.run.stop)

    def close(self) -> None:
        self.sender.close(is_open=self.state not in (State.READY, State.COMMITTING))

    # -- called by workers

    def publish(self, partition: Partition, messages: Sequence[Message], outputs: list[Output]) -> None:
        with partition.lock:
            partition.held.append(Held(messages, outputs, self.refused))

    def set_aside(
        self, partition: Partition, message: Message, aside: SetAside, answered: Callable[[str | None], None]
    ) -> None:
        copy = self._copy(aside)
        with partition.lock:
            partition.held.append(Held((message,), [copy], self.refused, is_aside=True))
        answered(None)

    def _copy(self, aside: SetAside) -> Output:
        sender = producer(self.run.spec.cluster, reports=True, copies=True)
        return sender.output(aside.topic, aside.value, aside.key, aside.headers)

    # -- called by the thread that polls

    def ahead(self, partition: Partition) -> int:
        """Finished records count, too: they are held until they are committed."""
        return partition.next_offset - partition.committed

    def commit(self, now: float) -> None:
        if self.state is State.READY:
            partitions = self.run.partitions.values()
            if now < self.next_commit and not any(map(self._half_is_finished, partitions)):
                return
            self.next_commit = now + self.run.spec.commit_interval
            self._begin({p: at for p in partitions if (at := p.position()) > p.committed})
        self._advance()

    def _half_is_finished(self, partition: Partition) -> bool:
        """Whether half of `max_ahead` is finished, so that a commit should come at once."""
        committed = partition.committed
        return partition.next_offset - committed >= self.half and partition.position() - committed >= self.half

    def before_assignment(self) -> None:
        """Settle our transaction, because `committed()` waits for open ones, and only this thread can settle ours."""
        if not self._settle_open(SETTLE) and not self.sender.over:
            self.sender.end(f"its transaction was not settled within {SETTLE:g} s")

    def lost(self) -> None:
        """Abort if the offsets are not accepted yet: with the metadata of a new membership they would be."""
        if self.state is State.OPEN:
            self._to(State.ABORTING)

    def settle(self, positions: dict[Partition, int]) -> None:
        until = time.monotonic() + max(self.run.spec.drain, REACH)
        while self._settle_open(until - time.monotonic()):  # again after an abort
            left = {p: at for p, at in positions.items() if p.committed != at}
            if not left:
                return
            if time.monotonic() > until:
                break
            self._begin(left)
            if self.state is State.READY:
                break
        self.lost()  # offsets that are not accepted by now must never be: the partitions go to another member
        if not self.sender.over:
            log(f"{self.slot}: not committed on a revoke: the next owner finds it done, or handles the records again")

    # -- the transaction

    def _to(self, state: State) -> None:
        """Change state. A change that is not allowed is a bug, and raises."""
        if (self.state, state) not in _ALLOWED:
            raise AssertionError(f"a transaction cannot go from {self.state.value} to {state.value}")
        self.state = state

    def _begin(self, positions: dict[Partition, int]) -> None:
        # The broker would accept metadata without a member unchecked.
        if not positions:
            self.began = None  # what waited for a commit has gone with its partitions
            return
        if self.sender.over or not self.client.memberid():
            return
        self.run.report(Step.COMMITTING, _by_place(positions))
        self.positions, self.sent = positions, 0
        held = [one for partition, at in positions.items() for one in partition.held_below(at)]
        self.outputs = [output for one in held for output in one.outputs]
        self.owners = [one for one in held for _ in one.outputs]
        # These are all partitions of a state that have progressed, so changes and positions match.
        self.changes = {p.state: dict(p.state.changes) for p in positions if p.state is not None}
        if (store := self.run.spec.store) is not None:
            for state, changes in self.changes.items():
                self.outputs += outputs_of(state, changes, store.name)
                self.owners += [self.of_states] * (len(self.outputs) - len(self.owners))
        self.began = self.run.clock if self.began is None else self.began
        if self.run.clock - self.began > PATIENCE:
            self.sender.end(f"no transaction was committed for {PATIENCE:g} s: each was aborted, and the log says why")
        self.sender.begin()
        self._to(State.OPEN)

    def _settle_open(self, patience: float) -> bool:
        """Wait until no transaction is open. False: one still is, or the client must not be called any more."""
        until = time.monotonic() + patience
        while self.state is not State.READY and not self.sender.over and time.monotonic() < until:
            self._advance()
        return self.state is State.READY and not self.sender.over

    def _advance(self) -> None:
        """Take the transaction as far as possible now."""
        if self.sender.over:
            return
        try:
            try:
                self._commit()
            except MustAbort as error:
                log(f"{self.slot}: the transaction is aborted, its work goes with the next one: {error}")
                if error.code in NOT_ALLOWED:
                    topics = ", ".join(sorted({output.topic for output in self.outputs}))
                    what = f"to read in group {self.run.spec.group}" + (f" and to write to {topics}" if topics else "")
                    self.not_allowed = f"{error}. Allow its principal {what}"
                self._to(State.ABORTING)
            if self.state is State.ABORTING:
                self.sender.abort(WAIT)
                self._to(State.CHECKING)
                self._count("transactions aborted")
                if self.not_allowed:
                    self.sender.end(self.not_allowed)
            if self.state is State.CHECKING:
                self._check_committed()
                self._to(State.READY)
                self._replace_refused()
                self._clear()
        except Unanswered as error:
            if self.began is not None and self.run.clock - self.began > PATIENCE:
                self.sender.end(f"no transaction was committed for {PATIENCE:g} s: {error}")

    def _commit(self) -> None:
        if self.state is State.OPEN:
            metadata = self.client.consumer_group_metadata()  # of now: the broker refuses a former generation
            self.sender.send_offsets(self.offsets(_by_place(self.positions)), metadata, REACH)
            self._to(State.SENDING)
            self.run.report(Step.OFFSETS_SENT, None)
        if self.state is State.SENDING:
            self._produce()
            if self.run.hooks:  # the commit waits for them anyway
                self._flush(self._patience())
                self.run.report(Step.FLUSHED, None)
            self._to(State.COMMITTING)
        if self.state is State.COMMITTING:
            self.sender.commit(self._patience())
            self._to(State.READY)
            self.began = None
            self.one_by_one.clear()
            for partition, at in self.positions.items():
                partition.committed = at
                partition.drop_held(at)
            for state, changes in self.changes.items():
                state.committed(changes)
            self._count("transactions committed")
            self.run.report(Step.COMMITTED, _by_place(self.positions))
            self._clear()

    def _patience(self) -> float:
        """How long to wait for an answer: only briefly while this thread has records of a handler with state."""
        return BRIEF if self.run.more else WAIT

    def _clear(self) -> None:
        """Forget the transaction, and with it states of partitions that others have now."""
        self.positions, self.outputs, self.owners, self.changes = {}, [], [], {}

    def _count(self, what: str) -> None:
        self.counts[what] += 1
        self.run.report(Step.MEASURED, Measured(dict(self.counts)))

    def _produce(self) -> None:
        """Queue what is not queued yet."""
        before = None if self.sent == 0 else self.owners[self.sent - 1]
        while self.sent < len(self.outputs):
            held = self.owners[self.sent]
            if self.one_by_one and held is not before and not self.one_by_one.isdisjoint((id(held), id(before))):
                self._flush(REACH)  # a batch is refused as a whole
            self.sender.produce(self.outputs[self.sent], held)
            self.sent, before = self.sent + 1, held

    def _flush(self, wait: float) -> None:
        left = self.sender.flush(wait)
        if self.refused:
            raise MustAbort("the broker refused an output")
        if left:
            raise Unanswered(f"{left:,} outputs are not confirmed yet")

    def _check_committed(self) -> None:
        """End the run if somebody else has moved the committed offsets: then what is held here does not come next."""
        ours = {key: p for key, p in self.run.partitions.items() if p in self.positions and p.committed >= 0}
        try:
            stored = self.client.committed([TopicPartition(*key) for key in ours], timeout=2 * WAIT) if ours else []
        except KafkaException as error:
            raise Unanswered(error.args[0].str()) from error
        for one in stored:
            believed = ours[one.topic, one.partition].committed
            if one.error is None and one.offset >= 0 and one.offset != believed and not self.of_another_topic(one):
                place = place_of(one.topic, one.partition, one.offset)
                self.sender.end(f"the group's offset is {place}, not {believed}: somebody else has committed")

    # -- outputs that the broker refuses

    def _replace_refused(self) -> None:
        """Replace outputs that the broker refuses by dead letters, once it is clear whose they are: the client sends
        several together, and the broker refuses them together."""
        refused = self.refused.copy()
        self.refused.clear()
        for held, code, why in refused.values():
            if code in TOPIC_REFUSED:
                raise DeliveryFailed(f"{held.what} was refused: {why}")
        if len(refused) > 1 and not refused.keys() <= self.one_by_one:
            self.one_by_one |= refused.keys()
            return
        for held, _, why in refused.values():
            self._replace(held, DeliveryFailed(f"{held.what} was refused: {why}"))

    def _replace(self, held: Held, error: DeliveryFailed) -> None:
        """Ask the policy about a record whose outputs are refused. It gets no record, because another attempt would not
        help."""
        if len(held.messages) != 1 or held.is_aside:
            raise error  # nobody knows whose it was; or it was a dead letter or a state, which nothing replaces
        (message,) = held.messages
        failed = FailedRecord(message, lambda _: None)
        failed.fail(None, error)
        failed.decision = self.run.spec.on_failure(failed)
        if not isinstance(failed.decision, SetAside):
            raise error
        log(f"{error_text(error)}: set aside in {failed.decision.topic}")
        token = handling.set(HandlerContext(record=Record(message, None, None)))  # the cause of its copy
        try:
            copy = self._copy(failed.decision)
        finally:
            handling.reset(token)
        for partition in self.positions:
            partition.replace_held(held, Held((message,), [copy], self.refused, is_aside=True))
        self.run.report(Step.FAILED, failed)
        self.run.report(Step.RECOVERED, failed)


def _by_place(positions: dict[Partition, int]) -> dict[tuple[str, int], int]:
    return {(partition.topic, partition.number): at for partition, at in positions.items()}
