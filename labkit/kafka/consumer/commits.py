"""Commits: when what handlers sent goes out, and when offsets are stored. Each guarantee is one class.

At least once, a commit is five named steps, always in this order:

1. finish:   the position of each partition is its lowest unfinished offset;
2. flush:    all that handlers sent is confirmed by the broker, else nothing is committed;
3. commit:   the positions are sent, without waiting, so that a broker that is away holds up no polling;
4. confirm:  the broker's answer is noted; a refused commit is sent again with the next one;
5. release:  on a revoke or at the end: wait for what runs, up to a bound, then commit once more and let go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from labkit.kafka.cluster import PASSING
from labkit.kafka.consumer.failures import SetAside
from labkit.kafka.consumer.run import Run, log
from labkit.kafka.consumer.steps import Step
from labkit.kafka.producer import Output, Producer, producer

REACH = 5.0  # seconds to wait for one answer of the broker, in the thread that polls
OF_TOPIC = "labkit topic.id="  # stands, with the id, in the metadata of what is committed


class Commits(Protocol):
    """What the loop asks of a guarantee. `publish` and `set_aside` are called by workers, all else by the thread that
    polls."""

    producer: Producer
    """What handlers send through it is held until they have returned."""
    pausing: bool
    """Whether no handler may be called until `gate` is set."""
    gate: threading.Event

    def publish(self, outputs: list[Output]) -> None:
        """A handler has returned: send what it sent. Raises DeliveryFailed."""

    def set_aside(self, aside: SetAside, answered: Callable[[str | None], None]) -> None:
        """Keep a failed record elsewhere; `answered` gets the reason of a refusal, or None once the broker
        has confirmed. Raises DeliveryFailed."""

    def commit(self, now: float) -> None:
        """Commit what is finished, if it is time."""

    def commit_now(self, positions: dict[tuple[str, int], int]) -> bool:
        """Commit these positions and wait for the answer. False: they are not stored."""

    def confirmed(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        """The client tells what became of a commit."""

    def of_another_topic(self, stored: TopicPartition) -> bool:
        """Whether the group committed this in a topic of this name that was deleted since. Kafka deletes such offsets,
        but a member that has not noticed yet commits into the new topic."""

    def settle(self, positions: dict[tuple[str, int], int]) -> None:
        """Commit these positions, of partitions that are let go."""

    def close(self) -> None:
        """End what runs in the background."""


class AtLeastOnce:
    """What a handler sent goes out at once, through the process's idempotent producer; it is confirmed before its cause
    is committed."""

    def __init__(self, run: Run, client: Client) -> None:
        self.run, self.client = run, client
        self.metadata = {name: OF_TOPIC + topic_id for name, topic_id in run.topic_ids.items()}
        self.pausing = False  # True while a commit waits for what handlers sent
        self.gate = threading.Event()
        self.producer = producer(run.spec.cluster)
        self.refused = self.producer.refused  # times_refused before this run do not concern it
        self.next_commit = 0.0
        # One is on its way. A second could overtake it: after an outage the client sends again what it had sent, in any
        # order, and the older of two would be what is stored.
        self.commit_sent = False
        self._reports: SimpleQueue[tuple[Callable[[str | None], None], str | None]] = SimpleQueue()
        self._polling: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = False

    def publish(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.producer.release(output)

    # -- what is set aside: confirmed record by record, as the refusal of a flush names no record

    def set_aside(self, aside: SetAside, answered: Callable[[str | None], None]) -> None:
        sender = producer(self.run.spec.cluster, reports=True, copies=True)
        with self._starting:
            if self._polling is None:
                self._polling = threading.Thread(
                    target=self._poll, args=(sender,), name="delivery reports", daemon=True
                )
                self._polling.start()

        # The client may not be polled again from within its own callback (it would crash), and hooks do poll it.
        def on_delivery(refused: str | None, partition: int, offset: int) -> None:
            self._reports.put((answered, refused))

        sender.send(aside.topic, aside.value, aside.key, aside.headers, on_delivery=on_delivery)

    def _poll(self, sender: Producer) -> None:
        """Call `answered` for what has been delivered, in a thread of its own and outside of the client."""
        try:
            while not self._closed:
                sender.poll(0.1)
                with suppress(Empty):
                    while True:
                        answered, refused = self._reports.get_nowait()
                        answered(refused)
        except BaseException as error:  # of a hook: never to be swallowed by a thread
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
            self.client.commit(offsets=self._offsets(positions), asynchronous=True)
        except KafkaException as error:
            self.confirmed(error.args[0], self._offsets(positions))

    def _unconfirmed(self) -> int:
        """How much of what handlers sent is still on its way. Lanes stand still meanwhile: a busy handler's next send
        would keep the producer from ever being empty, and uncommitted work would pile up.

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
        self.commit_sent = False  # whatever the answer is: without this nothing would be committed any more
        stored: dict[tuple[str, int], int] = {}
        for one in offsets:
            partition = self.run.partitions.get((one.topic, one.partition))
            if partition is None:
                continue
            if error is not None or one.error is not None:
                partition.commit_requested = (
                    partition.committed
                )  # refused, say by a rebalance: goes with the next commit
            else:
                partition.committed = max(partition.committed, one.offset)
                stored[one.topic, one.partition] = one.offset
        if stored:
            self.run.report(Step.COMMITTED, stored)

    def settle(self, positions: dict[tuple[str, int], int]) -> None:
        self.run.report(Step.COMMITTING, positions)
        left = self.producer.unconfirmed(self.run.spec.drain)
        self.producer.check(self.refused)
        if left:
            log(f"{self.run.spec.group}: {left:,} outputs are unconfirmed: their records will be delivered again")
            return
        self.run.report(Step.FLUSHED, None)
        if self.commit_now(positions):
            self.run.report(Step.COMMITTED, positions)

    def commit_now(self, positions: dict[tuple[str, int], int]) -> bool:
        until = time.monotonic() + REACH
        while True:
            try:
                # A commit has no time limit: a broker that is away would keep us for a minute. This question has one.
                self.client.committed(self._offsets(positions), timeout=REACH)
                answers = self.client.commit(offsets=self._offsets(positions), asynchronous=False)
                return not any(one.error for one in answers or ())
            except KafkaException as error:
                if error.args[0].code() not in PASSING or time.monotonic() > until:
                    log(f"{self.run.spec.group}: commit not stored: {error.args[0].str()}")
                    return False
                time.sleep(0.1)

    def of_another_topic(self, stored: TopicPartition) -> bool:
        metadata = stored.metadata or ""  # other tools leave it empty, or write what is theirs
        return metadata.startswith(OF_TOPIC) and metadata != self.metadata[stored.topic]

    def _offsets(self, positions: dict[tuple[str, int], int]) -> list[TopicPartition]:
        return [TopicPartition(*place, offset, self.metadata[place[0]]) for place, offset in positions.items()]
