"""The one consumer loop: one thread owns the client and only polls, dispatches, pauses and commits.

Records go to lanes (see `lanes`), lanes run on a bounded thread pool. A commit is five steps, always in this order:

1. finish:   the position of each partition is its lowest unfinished offset;
2. flush:    all that handlers sent is confirmed by the broker, else nothing is committed;
3. commit:   the positions are sent, without waiting, so that a broker that is away holds up no polling;
4. confirm:  the broker's answer is noted; a refused commit is sent again with the next one;
5. release:  on a revoke or at the end: wait for what runs, up to a bound, then commit once more and let go.
"""

from __future__ import annotations

import faulthandler
import heapq
import inspect
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from labkit.kafka.cluster import PASSING
from labkit.kafka.errors import (
    ClientRefused,
    ClusterUnreachable,
    DeliveryFailed,
    HandlerExit,
    LabkitError,
    PoisonRecord,
    TopicMissing,
    Unavailable,
    place_of,
)
from labkit.kafka.lanes import Lane, LaneState, Partition
from labkit.kafka.producer import Hand, handling, producer
from labkit.kafka.records import Message, Record, decoder
from labkit.kafka.refusal import explain, is_final
from labkit.kafka.steps import Ask, Decision, Done, Failure, Report, Retry, Step, Stop, keep_trying

if TYPE_CHECKING:
    from labkit.kafka.consumer import Consumer

BATCH = 500  # records taken at once from what the client has fetched
TURN = 0.05  # seconds the loop waits for a first record: bounds how late a retry or a stop is noticed
STAY = 256  # records a lane may handle before it lets other lanes have its worker
FULL = 0.1  # seconds a partition may stay full before it is paused
FULL_BESIDE_EMPTY = 0.005  # the same, while another one waits for its first records
REACH = 5.0  # seconds to wait for one answer of the broker, in the thread that polls
AWAY = 30.0  # seconds to ask again and again where partitions begin
TRACED = 1.0  # seconds from one traceback to the next of its kind
EXIT_DEADLINE = 70  # exit code of a process whose handler overran its deadline

GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_ID)

Place: TypeAlias = tuple[str, int]


class Loop:
    """One run of a Consumer."""

    def __init__(self, consumer: Consumer, stop: threading.Event, report: Report | None) -> None:
        self.spec, self.stop = consumer, stop
        self.hooks = [hook for hook in (consumer.on_step, report) if hook is not None]
        self.change_hooks = self.hooks if consumer.on_change is None else [*self.hooks, consumer.on_change]
        self.by_key = consumer.order == "key"
        self.topic_ids = {topic.name: consumer.cluster.topic_id(topic.name) for topic in consumer.sources}
        there = consumer.cluster.topics()
        self.companions = {
            main: [(topic.name, there.get(topic.name, 0)) for topic in beside]
            for main, beside in consumer.companions.items()
        }
        self.decode = {topic.name: decoder(topic.value) for topic in consumer.sources}
        self.producer = producer(consumer.cluster)
        self.refused = self.producer.refused  # before this run: none of our handlers' business
        self.batch = max(1, min(BATCH, consumer.max_ahead // 2))
        self.partitions: dict[Place, Partition] = {}
        self.left: list[Lane] = []  # of partitions that were given up while their handler was running
        self.arrived: set[Place] = set()  # assigned during the consume call that runs now
        self.back_offs: list[tuple[float, int, Lane]] = []
        self.back_offs_lock = threading.Lock()
        self.tie = itertools.count()
        self.traced: dict[type[BaseException], float] = {}  # until when errors of this type are told in one line
        self.wake = threading.Event()  # a lane ran empty
        self.shut = False  # True while a commit waits for what handlers sent: no handler is called until
        self.gate = threading.Event()  # this is set
        self.fatal: BaseException | None = None
        self.clock = 0.0  # seconds this loop has been alive: a frozen process does not age
        self.next_commit = 0.0
        # One is on its way. A second could overtake it: after an outage the client sends again what it had sent, in any
        # order, and the older of two would be what is stored.
        self.commit_sent = False
        self.ready: SimpleQueue[Lane | None] = SimpleQueue()  # lanes that want a worker
        self.threads = [  # daemons, because one that hangs in its handler must not keep the process
            threading.Thread(target=self.serve, name=f"lane-{number}", daemon=True)
            for number in range(consumer.workers)
        ]
        self.client = Client(
            consumer.cluster.config(
                {
                    "group.id": consumer.group,
                    "auto.offset.reset": consumer.start,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "on_commit": self.guarded(self.confirmed),
                    "error_cb": self.heard,
                    "enable.partition.eof": True,  # so that committed positions pass commit markers
                    "partition.assignment.strategy": "cooperative-sticky",
                    "session.timeout.ms": 6000,  # a stock broker refuses less
                    "heartbeat.interval.ms": 300,  # how soon a member hears of a rebalance
                    "topic.metadata.refresh.interval.ms": 1000,  # else a deleted topic stays unnoticed for 40 s
                    "fetch.queue.backoff.ms": 1,  # with the default 1000 the same loop reaches 0.15 of the speed
                    "queued.min.messages": 300_000,
                    "queued.max.messages.kbytes": 65_536,  # bounds the prefetch in memory
                }
            )
        )

    # -- the thread that polls ------------------------------------------------------------------------------------

    def run(self) -> None:
        before = time.monotonic()
        try:
            beside = {name for topics in self.companions.values() for name, _ in topics}
            self.client.subscribe(
                [topic.name for topic in self.spec.sources if topic.name not in beside],
                on_assign=self.guarded(self.assigned),
                on_revoke=self.guarded(self.revoked),
                on_lost=self.guarded(self.lost),
            )
            for thread in self.threads:
                thread.start()
            while not self.stop.is_set() and self.fatal is None:
                now = time.monotonic()
                self.clock += min(now - before, 1.0)
                before = now
                self.resubmit(now)
                self.watch_deadlines()
                for messages in self.fetch():
                    self.dispatch(messages)
                self.relieve()
                self.commit(now)
            with (
                nullcontext() if self.fatal is None else suppress(DeliveryFailed)
            ):  # the first error is the one to tell
                self.release(list(self.partitions.values()))
        finally:
            self.close()
        if self.fatal is not None:
            raise self.fatal

    def fetch(self) -> Iterator[list[Message]]:
        """One record, waiting a little, then whatever is there already: asking for many at once waits to fill."""
        first = self.client.consume(1, self.patience())
        self.arrived.clear()  # what was assigned during that call was assigned before its one record was taken
        yield cast(list[Message], first)
        if first and self.batch > 1:
            yield cast(list[Message], self.client.consume(self.batch - 1, 0))

    def patience(self) -> float:
        with self.back_offs_lock:
            due = self.back_offs[0][0] if self.back_offs else None
        return TURN if due is None else min(TURN, max(0.0, due - time.monotonic()))

    def dispatch(self, messages: list[Message]) -> None:
        batches: dict[Place, list[Message]] = {}
        ends: list[Message] = []
        last, append = None, None
        for message in messages:
            error = message.error()
            if error is None:
                place = (message.topic(), message.partition())
                if place != last or append is None:  # neighbours are mostly of one partition
                    last, append = place, batches.setdefault(place, []).append
                append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                ends.append(message)
            else:
                self.client_error(message.topic(), error)
        for place in self.arrived & {*batches, *((end.topic(), end.partition()) for end in ends)}:
            # Taken away and given back within this very call: what was fetched before must not run ahead of what the
            # committed offset brings again. (A seek so soon after an assignment can be refused; this cannot.)
            if partition := self.partitions.get(place):
                self.client.incremental_unassign([TopicPartition(*place)])
                self.client.incremental_assign([TopicPartition(*place, partition.next_offset)])
        for place, batch in batches.items():
            partition = self.partitions.get(place)
            if partition is None or place in self.arrived:
                continue  # revoked meanwhile: uncommitted, so its next owner gets these
            if batch[0].offset() < partition.next_offset:
                self.check_identity(partition.topic)
            for lane in partition.add(batch, self.by_key):
                self.ready.put(lane)
        for end in ends:  # only after the records before it, which would look as if they were fetched twice
            place = (end.topic(), end.partition())
            if place in self.partitions and place not in self.arrived:
                self.partitions[place].reached(end.offset())

    def heard(self, error: KafkaError) -> None:
        """What the client says of its connections: a login that is refused it tells nowhere else."""
        self.client_error(None, error)

    def client_error(self, topic: str | None, error: KafkaError) -> None:
        code = error.code()
        if code in GONE:
            self.fatal = self.gone(topic)
        elif code == KafkaError._AUTHENTICATION and is_final(error):
            why = explain(error, dict(self.spec.cluster.security))
            self.fatal = ClientRefused(f"the consumer of {self.spec.group} cannot go on: {why}")
        elif error.fatal() or code in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED):
            self.fatal = LabkitError(f"the consumer of {self.spec.group} cannot go on: {error.str()}")
        # Everything else (a broker that is away, a coordinator that moves) the client mends by itself.

    def check_identity(self, topic: str) -> None:
        """Offsets that go back may be those of another topic of this name, whose records would be passed over."""
        try:
            same = self.spec.cluster.topic_id(topic) == self.topic_ids[topic]
        except TopicMissing:
            same = False
        except ClusterUnreachable:
            same = True  # asked again when more comes
        if not same:
            self.fatal = self.gone(topic)

    def gone(self, topic: str | None) -> TopicMissing:
        return TopicMissing(
            f"topic {topic or ', '.join(one.name for one in self.spec.sources)} was deleted while group "
            f"{self.spec.group} was reading it: create a topic of another name and deploy again"
        )

    def relieve(self) -> None:
        """Back-pressure: stop consuming for at most 100 ms; pause only what stays full, as that costs the prefetch.

        The client hands out one partition after the other: while one has nothing to do and more to come, a full one is
        waited for no longer than a handler without work of its own needs, or that one would stand still for it.
        """
        full: list[Partition] = []
        starving = False
        for partition in self.partitions.values():
            if not partition.paused:
                if self.is_full(partition):
                    full.append(partition)
                starving |= not partition.lanes and not partition.at_end
            elif partition.ahead() <= self.batch // 2:
                self.client.resume([TopicPartition(partition.topic, partition.number)])
                partition.paused = False
        until = time.monotonic() + (FULL_BESIDE_EMPTY if starving else FULL)
        while full and time.monotonic() < until and not self.stop.is_set() and self.fatal is None:
            self.wake.clear()
            if not any(map(self.is_full, full)):
                return
            self.wake.wait(0.002)
        for partition in full:
            if self.is_full(partition):
                self.client.pause([TopicPartition(partition.topic, partition.number)])
                partition.paused = True

    def is_full(self, partition: Partition) -> bool:
        """Whether one more batch could exceed `max_ahead`."""
        return partition.ahead() + self.batch > self.spec.max_ahead

    def resubmit(self, now: float) -> None:
        """Give lanes whose back-off is over to a worker."""
        while True:
            with self.back_offs_lock:
                if not self.back_offs or self.back_offs[0][0] > now:
                    return
                due, _, lane = heapq.heappop(self.back_offs)
            with lane.partition.lock:
                waits = lane.state is LaneState.BACKING_OFF and lane.due == due  # else this back-off ended before
                if not waits or not lane.partition.active:
                    continue
                lane.to(LaneState.RUNNING)
            self.ready.put(lane)

    def watch_deadlines(self) -> None:
        self.left = [lane for lane in self.left if lane.began is not None]
        ours = (lane for partition in self.partitions.values() for lane in list(partition.lanes.values()))
        for lane in itertools.chain(self.left, ours):  # a worker that hangs is missed, whoever has the record now
            began = lane.began
            if began is not None and self.clock - began > self.spec.deadline:
                with suppress(IndexError):  # it returned just now
                    self.overrun(_place(lane.queue[0]))

    def overrun(self, place: str) -> None:
        """End the process, as Python cannot end a thread."""
        try:
            _log(
                f"handler of {place} has run for more than its deadline of {self.spec.deadline:g} s; "
                "the process ends, the record will be delivered again. Stacks:"
            )
            faulthandler.dump_traceback(all_threads=True)
        finally:
            os._exit(EXIT_DEADLINE)

    # -- commits --------------------------------------------------------------------------------------------------

    def commit(self, now: float) -> None:
        if now < self.next_commit or self.commit_sent:
            return
        positions = {
            place: at for place, p in self.partitions.items() if (at := p.position()) > p.committed and at != p.asked
        }
        if not positions:
            self.next_commit = now + self.spec.commit_interval
            return
        self.tell(Step.COMMITTING, positions)
        if self.unconfirmed():
            return  # tried again at the next turn
        self.next_commit = now + self.spec.commit_interval
        self.tell(Step.FLUSHED, None)
        for place, offset in positions.items():
            self.partitions[place].asked = offset
        self.commit_sent = True
        try:
            self.client.commit(offsets=_offsets(positions), asynchronous=True)
        except KafkaException as error:
            self.confirmed(error.args[0], _offsets(positions))

    def unconfirmed(self) -> int:
        """How much of what handlers sent is still on its way. Lanes stand still meanwhile: a busy handler's next send
        would keep the producer from ever being empty, and uncommitted work would pile up.

        Raises DeliveryFailed when the broker refused something.
        """
        left = self.producer.unconfirmed(0)
        if left:
            self.gate.clear()
            self.shut = True
            try:
                left = self.producer.unconfirmed(0.5)
            finally:
                self.shut = False
                self.gate.set()
        self.producer.check(self.refused)
        return left

    def confirmed(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        self.commit_sent = False  # whatever the answer is: without this nothing would be committed any more
        stored: dict[Place, int] = {}
        for one in offsets:
            partition = self.partitions.get((one.topic, one.partition))
            if partition is None:
                continue
            if error is not None or one.error is not None:
                partition.asked = partition.committed  # refused, say by a rebalance: goes with the next commit
            else:
                partition.committed = max(partition.committed, one.offset)
                stored[one.topic, one.partition] = one.offset
        if stored:
            self.tell(Step.COMMITTED, stored)

    def release(self, partitions: Sequence[Partition]) -> None:
        """Let partitions go: start nothing more, wait for what runs, flush, commit. Nothing is committed late."""
        for partition in partitions:
            partition.active = False
        until = time.monotonic() + self.spec.drain
        while any(lane.began is not None for p in partitions for lane in list(p.lanes.values())):
            if time.monotonic() > until:
                break
            self.wake.clear()
            self.wake.wait(0.01)
        positions = {(p.topic, p.number): at for p in partitions if (at := p.position()) > p.committed}
        self.forget(partitions)
        if not positions:
            return
        self.tell(Step.COMMITTING, positions)
        left = self.producer.unconfirmed(self.spec.drain)
        self.producer.check(self.refused)
        if left:
            _log(f"{self.spec.group}: {left:,} records sent by handlers stay unconfirmed, so their causes come again")
            return
        self.tell(Step.FLUSHED, None)
        if self.commit_now(positions):
            self.tell(Step.COMMITTED, positions)

    def commit_now(self, positions: dict[Place, int]) -> bool:
        """Commit and wait for the answer. False: not stored, so the next owner gets these records again."""
        until = time.monotonic() + REACH
        while True:
            try:
                # A commit has no time limit: a broker that is away would keep us for a minute. This question has one.
                self.client.committed(_offsets(positions), timeout=REACH)
                answers = self.client.commit(offsets=_offsets(positions), asynchronous=False)
                return not any(one.error for one in answers or ())
            except KafkaException as error:
                if error.args[0].code() not in PASSING or time.monotonic() > until:
                    _log(f"{self.spec.group}: commit not stored: {error.args[0].str()}")
                    return False
                self.wake.wait(0.1)

    def forget(self, partitions: Iterable[Partition]) -> None:
        """Nothing that belongs to these partitions counts any more, whoever still works on it."""
        for partition in partitions:
            partition.active = False
            self.partitions.pop((partition.topic, partition.number), None)
            for lane in list(partition.lanes.values()):
                if lane.began is not None:
                    self.left.append(lane)
                failure, lane.failure = lane.failure, None
                if failure is not None:
                    self.tell(Step.RECOVERED, failure)
        with self.back_offs_lock:
            self.back_offs = [entry for entry in self.back_offs if entry[2].partition.active]
            heapq.heapify(self.back_offs)

    # -- the group ------------------------------------------------------------------------------------------------

    def guarded(self, callback: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        """A callback for the client. What it raises ends the loop, but not through the client: that could never close
        after an exception out of a rebalance."""

        def call(first: Any, second: Any) -> None:
            try:
                callback(first, second)
            except BaseException as error:
                self.fatal = self.fatal or error

        return call

    def with_companions(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """The partitions that the group gives or takes, and those which go with them."""
        beside = [
            TopicPartition(name, one.partition)
            for one in partitions
            for name, count in self.companions.get(one.topic, ())
            if one.partition < count
        ]
        return [*partitions, *beside]

    def assigned(self, client: Client, partitions: list[TopicPartition]) -> None:
        partitions = self.with_companions(partitions)
        starts, fresh = self.starts(client, partitions)
        client.incremental_assign(starts)
        if not starts:
            return
        client.resume(starts)  # a pause from before outlives a rebalance in librdkafka
        for one in starts:
            place = (one.topic, one.partition)
            self.partitions[place] = Partition(one.topic, one.partition, one.offset)
            self.arrived.add(place)
        # "latest" means from now on: without a commit, what is produced while the member restarts would be lost.
        if fresh and not self.commit_now(fresh):
            for place in fresh:  # refused, say by the next rebalance: goes with the next commit
                self.partitions[place].committed = self.partitions[place].asked = -1
        self.tell(Step.ASSIGNED, [(one.topic, one.partition, one.offset) for one in starts])

    def starts(self, client: Client, partitions: list[TopicPartition]) -> tuple[list[TopicPartition], dict[Place, int]]:
        """Where to begin, and which of these positions are to be committed. Asks until there is an answer."""
        until = time.monotonic() + AWAY
        while partitions and not self.stop.is_set():
            try:
                return self.ask_starts(client, partitions)
            except KafkaException as error:
                if error.args[0].code() in GONE:
                    raise self.gone(None) from error
                if time.monotonic() > until:
                    raise ClusterUnreachable(
                        f"{self.spec.cluster.bootstrap} does not say where group {self.spec.group} is to begin: "
                        f"{error.args[0].str()}"
                    ) from error
            except (Unavailable, ClusterUnreachable) as error:  # of who tells positions
                if isinstance(error, ClientRefused) or time.monotonic() > until:
                    raise
                _log(f"{self.spec.group}: where to read on is not told yet: {error}")
            self.stop.wait(0.1)
        return [], {}

    def ask_starts(
        self, client: Client, partitions: list[TopicPartition]
    ) -> tuple[list[TopicPartition], dict[Place, int]]:
        starts: list[TopicPartition] = []
        fresh: dict[Place, int] = {}
        told = self.spec.positions and self.spec.positions([(one.topic, one.partition) for one in partitions])
        beside = {name for topics in self.companions.values() for name, _ in topics}
        for one in client.committed(partitions, timeout=REACH):
            if one.error is not None:  # not to be taken for "nothing committed"
                raise KafkaException(one.error)
            place = (one.topic, one.partition)
            offset = one.offset if told is None else told.get(place, -1)
            if offset < 0 or told is not None:
                low, high = client.get_watermark_offsets(TopicPartition(*place), timeout=REACH)
                if 0 <= offset < low:
                    raise LabkitError(
                        f"group {self.spec.group} is to read {one.topic}/{one.partition} from offset {offset:,} up to "
                        f"{low:,} yet, but those records are gone from the topic: build anew what was made of it"
                    )
            if offset < 0:
                # What is in a companion is the group's own work, whenever it came.
                latest = self.spec.start == "latest" and one.topic not in beside
                offset = high if latest else low
                if latest:
                    fresh[place] = offset
            if told is not None and offset != one.offset:
                fresh[place] = offset  # else the group's lag would be that of another one's work
            starts.append(TopicPartition(*place, offset))
        return starts, fresh

    def revoked(self, client: Client, partitions: list[TopicPartition]) -> None:
        partitions = self.with_companions(partitions)
        try:
            self.release(self.held(partitions))
        finally:
            client.incremental_unassign(partitions)
        self.tell(Step.REVOKED, [(one.topic, one.partition) for one in partitions])

    def lost(self, client: Client, partitions: list[TopicPartition]) -> None:
        partitions = self.with_companions(partitions)
        self.forget(self.held(partitions))
        client.incremental_unassign(partitions)
        self.tell(Step.LOST, [(one.topic, one.partition) for one in partitions])

    def held(self, partitions: Iterable[TopicPartition]) -> list[Partition]:
        places = ((one.topic, one.partition) for one in partitions)
        return [self.partitions[place] for place in places if place in self.partitions]

    def close(self) -> None:
        """End the workers and leave the group. Takes at most 2 × REACH: a frozen broker would keep us for a minute."""
        self.forget(list(self.partitions.values()))
        for _ in self.threads:
            self.ready.put(None)
        leaving = threading.Thread(target=self.leave, name="leaving", daemon=True)
        leaving.start()
        leaving.join(2 * REACH)

    def leave(self) -> None:
        if not self.client.assignment():  # then `close` alone tells the group nothing: it waits for our session's end
            self.client.unsubscribe()
        self.client.close()

    # -- the workers ----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """A worker thread."""
        while (lane := self.ready.get()) is not None:
            try:
                self.work(lane) if self.spec.batch is None else self.work_in_batches(lane, self.spec.batch)
            except BaseException as error:  # of a hook: never to be swallowed by a thread
                self.end(lane, error)

    def work(self, lane: Lane) -> None:
        """Handle a lane's records until it is empty, fails, or has had its turn and others wait for a worker.

        What is done here is done for every record: hence the local names, and no call that can be spared.
        """
        handler, hooks, queue, partition = self.spec.handler, self.hooks, lane.queue, lane.partition
        decode, hand = self.decode[partition.topic], Hand()
        not_before = self.spec.not_before.get(partition.topic)
        handling.set(hand)
        if lane.asks and not self.ask_again(lane):
            return
        while True:
            for _ in range(STAY):
                lane.began = self.clock  # before the look at `active`: either we see the release, or it waits for us
                if not (queue and partition.active):
                    if self.rests(lane):
                        return
                    continue
                if self.shut:
                    self.gate.wait()
                message, record = queue[0], None
                try:
                    record = hand.record = decode(message)  # what its handler sends names it as the cause
                    if not_before is not None and self.waits(lane, not_before(record)):
                        return
                    for hook in hooks:
                        hook(Step.HANDLING, record)
                    result = handler(record)
                    if result is not None and inspect.iscoroutine(result):
                        result.close()
                        raise TypeError("the handler returned a coroutine, which nobody runs: make it a plain `def`")
                except BaseException as error:
                    if record is None:
                        hand.record = Record(message, None, None)  # what a policy sends names the poison
                    if not self.failed(lane, message, record, error):
                        return
                    continue
                if hooks or lane.failure is not None:
                    self.handled(lane, record)
                queue.popleft()
            if not self.ready.empty():
                lane.began = None
                self.ready.put(lane)
                return

    def work_in_batches(self, lane: Lane, most: int) -> None:
        """The same for a handler that takes batches."""
        queue, partition, decode = lane.queue, lane.partition, self.decode[lane.partition.topic]
        handling.set(Hand())
        if lane.asks and not self.ask_again(lane):
            return
        done = 0
        while done < STAY or self.ready.empty():
            lane.began = self.clock
            if not (queue and partition.active):
                if self.rests(lane):
                    return
                continue
            if self.shut:
                self.gate.wait()
            # By index: the thread that polls appends meanwhile, which an iterator would not survive.
            messages = [queue[number] for number in range(min(len(queue), 1 if lane.alone else most))]
            batch: list[Record[Any] | PoisonRecord] = []
            for message in messages:
                try:
                    batch.append(decode(message))
                except PoisonRecord as poison:
                    batch.append(poison)
            records = [one for one in batch if isinstance(one, Record)] if self.hooks else []
            try:
                for record in records:
                    self.tell(Step.HANDLING, record)
                result = self.spec.handler(batch)
                if inspect.iscoroutine(result):
                    result.close()
                    raise TypeError(
                        "the handler of batches returned a coroutine, which nobody runs: make it a plain `def`"
                    )
            except BaseException as error:
                first = batch[0] if isinstance(batch[0], Record) else None
                if not self.failed(lane, messages[0], first, error, len(messages)):
                    return
                continue
            for record in records:
                self.tell(Step.HANDLED, record)
            self.recovered(lane)
            for _ in messages:
                queue.popleft()
            lane.alone = max(0, lane.alone - len(messages))
            done += len(messages)
        lane.began = None
        self.ready.put(lane)

    def rests(self, lane: Lane) -> bool:
        """Give up a lane that is empty, or whose partition was given up. False: more has come meanwhile."""
        lane.began = None
        if not lane.partition.rest(lane):
            return False
        self.wake.set()
        return True

    def handled(self, lane: Lane, record: Record[Any]) -> None:
        for hook in self.hooks:
            hook(Step.HANDLED, record)
        self.recovered(lane)

    def recovered(self, lane: Lane) -> None:
        failure, lane.failure, lane.asks = lane.failure, None, False
        if failure is not None:
            self.tell(Step.RECOVERED, failure)

    def failed(
        self, lane: Lane, message: Message, record: Record[Any] | None, error: BaseException, many: int = 1
    ) -> bool:
        """Ask the policy about a failed record; `many` come one by one first. True when the lane goes on at once."""
        if isinstance(error, SystemExit | KeyboardInterrupt):
            return self.end(lane, error, message)
        if not lane.partition.active:  # its next owner gets the record again, and asks its own policy
            _log(f"{_place(message)} failed while its partition was given up: {type(error).__name__}: {error}")
            lane.began = None
            self.wake.set()
            return False
        if many > 1:  # which of them it was is known once they come one by one: only then the policy is asked
            _log(f"{many} records from {_place(message)} on failed, now one by one: {type(error).__name__}: {error}")
            lane.alone, lane.began = many, None
            return True
        failure = lane.next_failure(message, record, error)
        failure = replace(failure, reconsider=lambda: self.reconsider(lane, failure))
        return self.decide(lane, failure, news=True)

    def ask_again(self, lane: Lane) -> bool:
        """Ask the policy about a failure that it had been asked about. True when the lane goes on at once."""
        if (failure := lane.failure) is None or not lane.partition.active:
            lane.asks = False
            return True
        handling.get().record = failure.record or Record(lane.queue[0], None, None)
        return self.decide(lane, failure, news=False)

    def decide(self, lane: Lane, failure: Failure, news: bool) -> bool:
        """Do what the policy decides. True when the lane goes on with its next record at once."""
        while True:
            lane.began, lane.asks = self.clock, False  # deciding has a deadline of its own
            failure = replace(failure, decision=(decision := self.decision(failure)))
            if news:
                self.log_failure(failure)
                self.tell(Step.FAILED, failure)
                news = False
            match decision:
                case Retry(after) | Ask(after):
                    lane.failure = failure
                    if self.back_off(lane, after, isinstance(decision, Ask)):
                        if not lane.partition.active:  # given up while the policy was asked: nobody else tells its end
                            self.recovered(lane)
                        return False
                case Done():
                    self.tell(Step.RECOVERED, failure)
                    lane.failure = None
                    lane.queue.popleft()
                    lane.began, lane.alone = None, max(0, lane.alone - 1)
                    return True
                case Stop(error):
                    return self.end(lane, error or failure.error)

    def decision(self, failure: Failure) -> Decision:
        """The policy's, or the default's when it cannot do its work: that must neither lose the record nor spin."""
        try:
            decision = self.spec.on_failure(failure)
            if not isinstance(decision, Decision):
                raise TypeError(f"on_failure returned {decision!r}, not Retry, Ask, Done or Stop")
            if isinstance(decision, Retry | Ask) and not decision.after >= 0:  # NaN is not either
                raise ValueError(f"on_failure returned {decision!r}, which says no time to wait")
        except Exception as broken:
            traceback.print_exception(broken)
            return keep_trying(0.5)(failure)
        return decision

    def back_off(self, lane: Lane, after: float, asks: bool = False) -> bool:
        """Let a lane wait. False when somebody wants its failure reconsidered since the policy was asked."""
        with lane.partition.lock:
            if lane.asks:
                return False
            lane.began, lane.asks = None, asks
            lane.due = time.monotonic() + after
            lane.to(LaneState.BACKING_OFF)
        with self.back_offs_lock:
            heapq.heappush(self.back_offs, (lane.due, next(self.tie), lane))
        return True

    def waits(self, lane: Lane, due: float) -> bool:
        """Whether its first record is not due yet (seconds since 1970); then the lane waits, and nothing has failed."""
        left = due - time.time()
        if left <= 0:
            return False
        lane.asks = False
        return self.back_off(lane, left)

    def reconsider(self, lane: Lane, failure: Failure) -> None:
        """See `Failure.reconsider`. Called from any thread."""
        with lane.partition.lock:
            try:
                if lane.queue[0].offset() != failure.offset or not lane.partition.active:
                    return
            except IndexError:
                return
            lane.asks = True
            if lane.state is not LaneState.BACKING_OFF:
                return  # its worker looks before it lets the lane wait
            lane.to(LaneState.RUNNING)
        self.ready.put(lane)

    def end(self, lane: Lane, error: BaseException, message: Message | None = None) -> bool:
        """Let the consumer stop with an error; what the lane has in hand stays uncommitted."""
        if not isinstance(error, Exception):
            place = "a record" if message is None else _place(message)
            error = HandlerExit(f"the handler ended the process ({error!r}) on {place}, which is not committed")
        self.fatal = self.fatal or error
        lane.began = None
        self.wake.set()
        return False

    def log_failure(self, failure: Failure) -> None:
        """One line for each failed attempt; the traceback, below the loop's own frame, once for errors of a kind that
        come in numbers."""
        error, now = failure.error, time.monotonic()
        _log(f"{failure.place} failed, attempt {failure.attempt}: {type(error).__name__}: {error}")
        if failure.attempt == 1 and not isinstance(error, PoisonRecord) and now > self.traced.get(type(error), 0):
            self.traced[type(error)] = now + TRACED
            traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)

    def tell(self, step: Step, subject: Any) -> None:
        for hook in self.change_hooks:
            hook(step, subject)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - a pod's log is its stderr


def _place(message: Message) -> str:
    return place_of(message.topic(), message.partition(), message.offset())


def _offsets(positions: dict[Place, int]) -> list[TopicPartition]:
    return [TopicPartition(topic, number, offset) for (topic, number), offset in positions.items()]
