"""The one consumer loop: one thread owns the client and only polls, dispatches, pauses and commits.

Records go to lanes (see `lanes`), which run on a bounded thread pool (`workers`); `commits` stores what is finished.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any, cast

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as Fetched

from labkit.kafka.connection_errors import NOT_JOINED, explain, is_final
from labkit.kafka.consumer.assignment import GONE, Assignment
from labkit.kafka.consumer.commits import REACH, AtLeastOnce, Commits
from labkit.kafka.consumer.lanes import Partition
from labkit.kafka.consumer.run import Run
from labkit.kafka.consumer.spec import Spec
from labkit.kafka.consumer.state import StateHandler, garbage_kept
from labkit.kafka.consumer.steps import Report
from labkit.kafka.consumer.transactions import ExactlyOnce
from labkit.kafka.consumer.watchdog import EXIT_DEADLINE, end_process, overrun
from labkit.kafka.consumer.workers import Workers
from labkit.kafka.errors import ClientRefused, ClusterUnreachable, LabkitError
from labkit.kafka.records import Message

# Called for every record: the methods take a sixth of the time of a `methodcaller`.
TOPIC, PARTITION = cast(Callable[[Message], str], Fetched.topic), cast(Callable[[Message], int], Fetched.partition)
BATCH = 500  # records taken at once from what the client has fetched
TURN = 0.05  # seconds the loop waits for a first record: bounds how late a retry or a stop is noticed
FULL = 0.1  # seconds a partition may stay full before it is paused
FULL_BESIDE_EMPTY = 0.005  # the same, while another one has nothing to do and this one hardly moves
FINAL = (KafkaError._FATAL, KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)
# A fatal error comes as a message with the code _FATAL; only its text says which one it is.
FENCED = KafkaError(KafkaError.FENCED_INSTANCE_ID).str()
IDENTITY = 1.0  # seconds between two checks that its topics are still the same


class Loop:
    """One run of a Consumer, in the thread that calls `run`."""

    def __init__(self, spec: Spec, stop: threading.Event, report: Report | None) -> None:
        self.spec = spec
        self.shared = Run(spec, stop, report)
        self.partitions = self.shared.partitions
        self.by_key = spec.order == "key"
        at_once = BATCH if spec.store is None else max(BATCH, spec.batch or 1)
        self.batch = max(1, min(at_once, spec.max_ahead // 2))
        self.commits: Commits = (ExactlyOnce if spec.guarantee == "exactly once" else AtLeastOnce)(self.shared)
        self.client = Client(
            spec.cluster.config(
                {
                    "group.id": spec.group,
                    "auto.offset.reset": "earliest",  # where an offset is out of range: see `jumped`
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "on_commit": self.guarded(lambda error, offsets: self.commits.confirmed(error, offsets)),
                    "error_cb": self.client_error,
                    "enable.partition.eof": True,  # so that committed positions pass commit markers
                    "session.timeout.ms": 6000,  # a stock broker refuses less
                    "heartbeat.interval.ms": 300,  # how soon a member hears of a rebalance
                    "topic.metadata.refresh.interval.ms": 1000,  # else a deleted topic stays unnoticed for 40 s
                    "fetch.queue.backoff.ms": 1,  # with the default 1000 the same loop reaches 0.15 of the speed
                    # The prefetch of a partition: more would not be faster, and a pause throws it away.
                    "queued.min.messages": min(300_000, self.spec.max_ahead),
                    "queued.max.messages.kbytes": 65_536,  # bounds it in memory
                    **self.commits.settings,
                }
            )
        )
        self.workers = Workers(self.shared, self.commits)
        self.assignment = Assignment(self.shared, self.commits, self.workers)
        self.states = None if spec.store is None else StateHandler(self.shared, self.commits, self.workers)
        self.closed = threading.Event()

    def run(self) -> None:
        """Consume until the stop, or until an error, which is raised."""
        shared, before = self.shared, time.monotonic()
        try:
            self.commits.start(self.client)
            self.client.subscribe(
                self.assignment.subscribed(),
                on_assign=self.guarded(self.assignment.assigned),
                on_revoke=self.guarded(self.revoked),
                on_lost=self.guarded(self.assignment.lost),
            )
            if self.states is None:
                self.workers.start()
            threading.Thread(target=self.watch_identity, name="identity of topics", daemon=True).start()
            while not shared.stop.is_set() and shared.fatal is None:
                now = time.monotonic()
                shared.clock += min(now - before, 1.0)
                before = now
                self.workers.resume(now)
                if self.states is not None:
                    self.states.go_on()
                self.watch_deadlines()
                for messages in self.fetch():
                    self.dispatch(messages)
                if self.states is not None:
                    self.states.adapt()
                self.go_back()
                self.relieve()
                self.commits.commit(now)
            with nullcontext() if shared.fatal is None else suppress(LabkitError):  # the first error is raised
                self.assignment.release(list(self.partitions.values()))
        finally:
            self.close()
        if shared.fatal is not None:
            raise shared.fatal

    def fetch(self) -> Iterator[list[Message]]:
        """Wait a little for one record, then take what is there: asking for many at once would wait until they are."""
        due = self.workers.next_due()
        patience = TURN if due is None else min(TURN, max(0.0, due - time.monotonic()))
        first = self.client.consume(1, patience)
        self.assignment.newly_assigned.clear()  # those were assigned before this record was taken
        yield cast(list[Message], first)
        self.shared.more = False
        most = self.batch if self.states is None else min(self.batch, self.states.at_once)
        if first and most > 1:
            with nullcontext() if self.states is None else garbage_kept():
                rest = self.client.consume(most - 1, 0)
                self.shared.more = self.states is not None and len(rest) == most - 1
                yield cast(list[Message], rest)
                rest.clear()  # else the garbage collector looks at each of them once more

    def dispatch(self, messages: list[Message]) -> None:
        """Give fetched records to their lanes."""
        shared = self.shared
        batches: dict[tuple[str, int], list[Message]] = {}
        ends: list[Message] = []
        if special := [message for message in messages if message.error() is not None]:
            messages = [message for message in messages if message.error() is None]
        for topic, of_topic in itertools.groupby(messages, TOPIC):  # neighbours are mostly of one partition
            for number, group in itertools.groupby(of_topic, PARTITION):
                batches.setdefault((topic, number), []).extend(group)
        for message in special:
            if (error := message.error()) is not None and error.code() == KafkaError._PARTITION_EOF:
                ends.append(message)
            elif error is not None:
                self.client_error(error, message.topic())
        # A partition was revoked and assigned again within this call: what was fetched before must not run ahead of
        # what the committed offset brings again.
        for key in self.assignment.newly_assigned & {*batches, *((end.topic(), end.partition()) for end in ends)}:
            if partition := self.partitions.get(key):
                partition.seeking = True
        for key, batch in batches.items():
            partition = self.partitions.get(key)
            if partition is None or partition.seeking:
                continue  # revoked meanwhile: uncommitted, so its next owner gets these; or fetched again
            if batch[0].offset() != partition.next_offset:
                partition = self.jumped(partition, batch[0].offset())
                if shared.fatal is not None:
                    return  # records behind a gap must not be handled
            if self.states is not None:
                self.states.handle(partition, batch)
                if shared.fatal is not None:
                    return  # there are unhandled records before these ends
                continue
            for lane in partition.add(batch, self.by_key):
                self.workers.ready.put(lane)
        for end in ends:  # after the records before them, which would else count as fetched twice
            partition = self.partitions.get((end.topic(), end.partition()))
            if partition is not None and not partition.seeking:
                if end.offset() != partition.next_offset and (end.topic(), end.partition()) not in batches:
                    partition = self.jumped(partition, end.offset())
                    if shared.fatal is not None:
                        return
                partition.reached(end.offset())

    def go_back(self) -> None:
        """Have the client seek to the next offset. It refuses until it fetches that partition: we ask again at the next
        turn. (To change the assignment outside of a rebalance callback could hide a loss.)"""
        for partition in self.partitions.values():
            if partition.seeking:
                with suppress(KafkaException):
                    self.client.seek(TopicPartition(partition.topic, partition.number, partition.next_offset))
                    partition.seeking = False

    def client_error(self, error: KafkaError, topic: str | None = None) -> None:
        """An error that the client reports about a topic or a connection. It reports a refused login only here."""
        code = error.code()
        if code in GONE:
            self.shared.end(self.assignment.gone(topic))
        elif code == KafkaError._AUTHENTICATION and is_final(error):
            where = self.spec.cluster
            why = explain(error, dict(where.security))
            self.shared.end(ClientRefused(f"the consumer of {self.spec.group} cannot go on: {why}"))
        elif code in NOT_JOINED:
            why = NOT_JOINED[code].format(strategy=self.commits.settings["partition.assignment.strategy"])
            self.shared.end(LabkitError(f"the consumer of {self.spec.group} cannot join its group: {why}"))
        elif isinstance(self.commits, ExactlyOnce) and (code == KafkaError.FENCED_INSTANCE_ID or FENCED in error.str()):
            self.shared.end(self.commits.sender.taken(error.str()))
        elif error.fatal() or code in FINAL:
            self.shared.end(LabkitError(f"the consumer of {self.spec.group} cannot go on: {error.str()}"))
        # The client recovers by itself from everything else (a broker that is down, a coordinator that moves).

    def jumped(self, partition: Partition, at: int) -> Partition:
        """See `Assignment.jumped`. Offsets that go back may also be those of another topic of this name."""
        if at < partition.next_offset:
            self.check_identity()
        return partition if self.shared.fatal else self.assignment.jumped(self.client, partition, at)

    def revoked(self, client: Client, partitions: list[TopicPartition]) -> None:
        """See `Assignment.revoked`. When a topic is deleted the group rebalances, often before we have noticed that the
        topic was recreated: then the old topic's positions must not be committed."""
        if self.shared.assigned_among(partitions):
            self.check_identity()
        self.assignment.revoked(client, partitions)

    def watch_identity(self) -> None:
        """A topic that is deleted and recreated has other records at the same offsets, and the client reads on in it.
        This check has a thread of its own, because a broker that is down makes it wait."""
        while not self.closed.wait(IDENTITY):
            self.check_identity()

    def check_identity(self) -> None:
        """End the run if a topic was recreated, or if partitions were added that it would never read. (The client
        reports a topic that is only deleted.)"""
        shared, store = self.shared, self.spec.store
        with suppress(ClusterUnreachable):
            there = self.spec.cluster.topic_ids([*shared.topic_ids, *([] if store is None else [store.name])])
            if store is not None and there.pop(store.name, shared.store_id) != shared.store_id:
                shared.end(self.assignment.store_gone())
            for topic, found in there.items():
                if found != shared.topic_ids[topic]:
                    self.assignment.made_anew.add(topic)
                    shared.end(self.assignment.gone(topic))
            if grown := self.assignment.grown():
                shared.end(grown)

    def relieve(self) -> None:
        """Back-pressure: wait at most 100 ms for a full partition; pausing what stays full costs its prefetch.

        The client hands out one partition after the other. If another partition is idle and has more to come, wait for
        a full one only if its handler is quick: the others stand still meanwhile.
        """
        full: list[Partition] = []
        starving = False
        for partition in self.partitions.values():
            if not partition.paused:
                if self.is_full(partition):
                    full.append(partition)
                starving |= not (partition.lanes or partition.state or partition.at_end or partition.seeking)
            elif partition.ahead() <= self.batch // 2 and not self.is_full(partition):
                self.client.resume([TopicPartition(partition.topic, partition.number)])
                partition.paused = False
        shared, began, patience = self.shared, time.monotonic(), FULL_BESIDE_EMPTY if starving else FULL
        to_do = sum(partition.ahead() for partition in full)
        while full and not shared.stop.is_set() and shared.fatal is None:
            if time.monotonic() - began > patience:
                left = sum(partition.ahead() for partition in full)  # 0: all is handled, only a commit is missing
                if patience == FULL or (left and to_do - left < max(1, self.batch // 10)):
                    break
                patience = FULL
            shared.wake.clear()
            self.commits.commit(time.monotonic())  # exactly once, only a commit makes room
            if not any(map(self.is_full, full)):
                return
            shared.wake.wait(0.002)
        for partition in full:
            if self.is_full(partition):
                self.client.pause([TopicPartition(partition.topic, partition.number)])
                partition.paused = True

    def is_full(self, partition: Partition) -> bool:
        """Whether one more batch could exceed `max_ahead`."""
        return self.commits.ahead(partition) + self.batch > self.spec.max_ahead

    def watch_deadlines(self) -> None:
        """End the process when a handler has run for too long."""
        abandoned = self.assignment.abandoned = [lane for lane in self.assignment.abandoned if lane.began is not None]
        ours = (lane for partition in self.partitions.values() for lane in list(partition.lanes.values()))
        for lane in itertools.chain(abandoned, ours):  # also workers that hang with a record of another member now
            began = lane.began
            if began is not None and self.shared.clock - began > self.spec.deadline:
                with suppress(IndexError):  # it returned just now
                    end_process(overrun(lane.queue[0], self.spec.deadline), EXIT_DEADLINE)

    def guarded(self, callback: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        """A callback for the client. Its errors end the loop without passing through the client, which could never
        close after an exception in a rebalance."""

        def call(first: Any, second: Any) -> None:
            try:
                callback(first, second)
            except BaseException as error:
                self.shared.end(error)

        return call

    def close(self) -> None:
        """End the workers and leave the group. Takes at most 2 × REACH; a frozen broker would make it a minute."""
        self.closed.set()
        self.assignment.forget(list(self.partitions.values()))
        self.workers.close()
        self.commits.close()
        if self.states is not None:
            self.states.close()
        leaving = threading.Thread(target=self.leave, name="leaving", daemon=True)
        leaving.start()
        leaving.join(2 * REACH)

    def leave(self) -> None:
        with suppress(KafkaException):  # the client was fenced
            if not self.client.assignment():  # then `close` would not leave: the group would wait for our session
                self.client.unsubscribe()
        self.client.close()
