"""Commits: when what handlers sent goes out, and when offsets are stored. Each guarantee is one class.

At least once, a commit is five named steps, always in this order:

1. finish:   the position of each partition is its lowest unfinished offset;
2. flush:    all that handlers sent is confirmed by the broker, else nothing is committed;
3. commit:   the positions are sent, without waiting, so that polling goes on while the broker is down;
4. confirm:  the broker's answer is noted; a refused commit is sent again with the next one;
5. release:  on a revoke or at the end: wait for what runs, up to a bound, then commit once more and give up.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from labkit.kafka.cluster import PASSING
from labkit.kafka.consumer.failures import SetAside
from labkit.kafka.consumer.lanes import Partition
from labkit.kafka.consumer.run import Run, log
from labkit.kafka.consumer.steps import Step
from labkit.kafka.producer import Output, Producer, producer
from labkit.kafka.records import Message

REACH = 5.0  # seconds to wait for one answer of the broker, in the thread that polls
OF_TOPIC = "labkit topic.id="  # stands before the topic's id in the metadata of a commit
OF_STORE = " store.id="  # the same for a store, behind it


class Commits(ABC):
    """What the loop asks of a guarantee. `publish` and `set_aside` are called by workers, all else by the thread that
    polls."""

    refuses: str | None = None
    """Why a handler may only send what can be held; None: it may send anything."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.producer = producer(run.spec.cluster)  # handlers send through it
        of_store = OF_STORE + run.store_id if run.store_id else ""
        self.metadata = {name: OF_TOPIC + topic_id + of_store for name, topic_id in run.topic_ids.items()}
        self.pausing = False  # True while no handler may be called until `gate` is set
        self.gate = threading.Event()
        self.client: Client

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings of the client that polls: above all, how the group assigns partitions."""

    def start(self, client: Client) -> None:
        """Called once, before the client joins its group."""
        self.client = client

    @abstractmethod
    def assign(self, partitions: list[TopicPartition]) -> None:
        """Have the client read these partitions, which the group has assigned. Only in its callback."""

    @abstractmethod
    def unassign(self, partitions: list[TopicPartition]) -> None:
        """Have the client read these no more, which the group has revoked. Only in its callback."""

    @abstractmethod
    def publish(self, partition: Partition, messages: Sequence[Message], outputs: list[Output]) -> None:
        """A handler has returned: take its outputs, before the records leave their queue. Raises DeliveryFailed."""

    @abstractmethod
    def set_aside(
        self, partition: Partition, message: Message, aside: SetAside, answered: Callable[[str | None], None]
    ) -> None:
        """Publish a failed record; `answered` gets the reason of a refusal, or None once it is confirmed. Raises
        DeliveryFailed, and what `Producer.output` raises."""

    def ahead(self, partition: Partition) -> int:
        """How many records of a partition count against `max_ahead`."""
        return partition.ahead()

    @abstractmethod
    def commit(self, now: float) -> None:
        """Commit what is finished, if it is time."""

    def confirmed(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:  # noqa: B027
        """The client reports the result of a commit."""

    def before_assignment(self) -> None:  # noqa: B027
        """Called before the group is asked where newly assigned partitions begin."""

    def lost(self) -> None:  # noqa: B027
        """Partitions went to others while this member was away."""

    @abstractmethod
    def settle(self, positions: dict[Partition, int]) -> None:
        """Commit these positions of partitions that are given up."""

    def close(self) -> None:  # noqa: B027
        """End what runs in the background."""

    def commit_now(self, positions: dict[tuple[str, int], int]) -> bool:
        """Commit these positions, which have no outputs, and wait for the answer. False: they are not stored."""
        until = time.monotonic() + REACH
        while True:
            try:
                # A commit has no time limit, and would wait a minute for a broker that is down. This request has one.
                self.client.committed(self.offsets(positions), timeout=REACH)
                answers = self.client.commit(offsets=self.offsets(positions), asynchronous=False)
                return not any(one.error for one in answers or ())
            except KafkaException as error:
                if error.args[0].code() not in PASSING or time.monotonic() > until:
                    log(f"{self.run.spec.group}: commit not stored: {error.args[0].str()}")
                    return False
                time.sleep(0.1)

    def of_another_topic(self, stored: TopicPartition) -> bool:
        """Whether the group committed this in a topic of this name that was deleted since. Kafka deletes such offsets,
        but a member that has not noticed yet commits into the new topic."""
        metadata = stored.metadata or ""  # other tools leave it empty, or write their own
        topic_id = metadata.partition(OF_STORE)[0].removeprefix(OF_TOPIC)
        return metadata.startswith(OF_TOPIC) and topic_id != self.run.topic_ids[stored.topic]

    def of_another_store(self, stored: TopicPartition) -> bool:
        """Whether the group committed this together with a state in another store."""
        store_id = (stored.metadata or "").partition(OF_STORE)[2]
        return bool(store_id and self.run.store_id) and store_id != self.run.store_id

    def offsets(self, positions: Mapping[tuple[str, int], int]) -> list[TopicPartition]:
        """These positions as they are committed."""
        return [TopicPartition(*place, offset, self.metadata[place[0]]) for place, offset in positions.items()]


class AtLeastOnce(Commits):
    """Outputs go out at once, through the process's idempotent producer, and are confirmed before their cause is
    committed."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.refused = self.producer.refused  # refusals before this run do not count
        self.next_commit = 0.0
        # Only one commit at a time: after an outage the client sends again in any order, and the older of two commits
        # could be what is stored.
        self.commit_sent = False
        self._reports: SimpleQueue[tuple[Callable[[str | None], None], str | None]] = SimpleQueue()
        self._polling: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = False

    @property
    def settings(self) -> dict[str, Any]:
        return {"partition.assignment.strategy": "cooperative-sticky"}

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.client.incremental_assign(partitions)

    def unassign(self, partitions: list[TopicPartition]) -> None:
        self.client.incremental_unassign(partitions)

    def publish(self, partition: Partition, messages: Sequence[Message], outputs: list[Output]) -> None:
        for output in outputs:
            self.producer.release(output)

    # -- what is set aside: confirmed record by record, because `flush` does not say which record was refused

    def set_aside(
        self, partition: Partition, message: Message, aside: SetAside, answered: Callable[[str | None], None]
    ) -> None:
        sender = producer(self.run.spec.cluster, reports=True, copies=True)
        with self._starting:
            if self._polling is None:
                self._polling = threading.Thread(
                    target=self._poll, args=(sender,), name="delivery reports", daemon=True
                )
                self._polling.start()

        # The client crashes if it is polled within its own callback, and hooks do poll it.
        def on_delivery(refused: str | None, partition: int, offset: int) -> None:
            self._reports.put((answered, refused))

        sender.send(aside.topic, aside.value, aside.key, aside.headers, on_delivery=on_delivery)

    def _poll(self, sender: Producer) -> None:
        """Call `answered` for delivery reports, in a thread of its own and outside of the client's callback."""
        try:
            while not self._closed:
                sender.poll(0.1)
                with suppress(Empty):
                    while True:
                        answered, refused = self._reports.get_nowait()
                        answered(refused)
        except BaseException as error:  # raised by a hook: the thread must not swallow it
            self.run.end(error)

    def close(self) -> None:
        self._closed = True

    # -- offsets

    def commit(self, now: float) -> None:
        if now < self.next_commit or self.commit_sent:
            return
        positions = {
            key: at
            for key, p in self.run.partitions.items()
            if (at := p.position()) > p.committed and at != p.commit_requested
        }
        if not positions:
            self.next_commit = now + self.run.spec.commit_interval
            return
        self.run.report(Step.COMMITTING, positions)
        if self._unconfirmed():
            return  # tried again at the next turn
        self.next_commit = now + self.run.spec.commit_interval
        self.run.report(Step.FLUSHED, None)
        for key, offset in positions.items():
            self.run.partitions[key].commit_requested = offset
        self.commit_sent = True
        try:
            self.client.commit(offsets=self.offsets(positions), asynchronous=True)
        except KafkaException as error:
            self.confirmed(error.args[0], self.offsets(positions))

    def _unconfirmed(self) -> int:
        """How many outputs are unconfirmed. Lanes stand still meanwhile: a busy handler's next send would keep the
        producer from ever being empty, and uncommitted work would pile up.

        Raises DeliveryFailed when the broker refused something.
        """
        left = self.producer.unconfirmed(0)
        if left:
            self.gate.clear()
            self.pausing = True
            try:
                left = self.producer.unconfirmed(0.5)
            finally:
                self.pausing = False
                self.gate.set()
        self.producer.check(self.refused)
        return left

    def confirmed(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        self.commit_sent = False  # whatever the answer is, or nothing would be committed any more
        stored: dict[tuple[str, int], int] = {}
        for one in offsets:
            partition = self.run.partitions.get((one.topic, one.partition))
            if partition is None:
                continue
            if error is not None or one.error is not None:
                partition.commit_requested = (
                    partition.committed
                )  # refused, perhaps by a rebalance: included in the next commit
            else:
                partition.committed = max(partition.committed, one.offset)
                stored[one.topic, one.partition] = one.offset
        if stored:
            self.run.report(Step.COMMITTED, stored)

    def settle(self, positions: dict[Partition, int]) -> None:
        by_place = {(p.topic, p.number): at for p, at in positions.items()}
        self.run.report(Step.COMMITTING, by_place)
        left = self.producer.unconfirmed(self.run.spec.drain)
        self.producer.check(self.refused)
        if left:
            log(f"{self.run.spec.group}: {left:,} outputs are unconfirmed: their records will be delivered again")
            return
        self.run.report(Step.FLUSHED, None)
        if self.commit_now(by_place):
            self.run.report(Step.COMMITTED, by_place)
