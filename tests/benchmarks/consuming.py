"""The consumer loop, against a loop written by hand for this one purpose, and against the bare client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import Queue
from typing import Any, cast

import msgspec
from confluent_kafka import Consumer as Client
from confluent_kafka import Producer as RawProducer
from confluent_kafka import TopicPartition

from benchmarks.bench import Bench
from benchmarks.report import Goal, Row
from labkit.kafka.consumer import Consumer
from labkit.kafka.records import Message, Record, decoder, encode
from labkit.kafka.topics import Topic

RECORDS = 2_000_000
PARTITIONS = 4
KEYS = 1000
CLOCK = "from the first record handled to the last"


class Order(msgspec.Struct):
    """About 200 bytes of JSON."""

    id: int
    customer: str
    address: str
    cents: int
    paid: bool


@dataclass
class AsDataclass:
    """The same, as a notebook defines it."""

    id: int
    customer: str
    address: str
    cents: int
    paid: bool


def consume(bench: Bench) -> Iterator[Row]:
    """The loop with decoding and a handler that does nothing, against a hand-written loop and the bare client."""
    topic = filled(bench)
    runs: dict[str, Callable[[], float]] = {
        "labkit": lambda: labkit_loop(topic, bench.group()),
        "by hand": lambda: hand_written_loop(topic, bench.group()),
        "bare client": lambda: bare_client(topic, bench.group()),
    }
    found = bench.alternate(runs)
    topic.cluster.delete_topics([topic.name])
    ours, by_hand, bare = found["labkit"], found["by hand"], found["bare client"]
    unit = "records/s"
    note = f"peer: a loop by hand, same records and hand-off; {RECORDS:,} records of 200 bytes, {CLOCK}; "
    note += f"CPU {ours.cpu:.1f} s, peer {by_hand.cpu:.1f} s"
    yield Row("consume: decode, no-op handler", ours.rate, unit, by_hand.rate, Goal("≥", 0.9), note)
    note = "peer: `consume(500)` in one thread that only counts: no decoding, no handler, no commit; "
    note += f"CPU {ours.cpu:.1f} s, peer {bare.cpu:.1f} s"
    yield Row("consume: the same against the bare client", ours.rate, unit, bare.rate, note=note)


def consume_modes(bench: Bench) -> Iterator[Row]:
    """What order by key, the hook of a pod, and a dataclass as value cost the loop."""
    topic = filled(bench)
    runs: dict[str, Callable[[], float]] = {
        "by partition": lambda: labkit_loop(topic, bench.group()),
        "by key": lambda: labkit_loop(topic, bench.group(), order="key"),
        "with a hook": lambda: labkit_loop(topic, bench.group(), report=lambda _step, _subject: None),
        "dataclass": lambda: labkit_loop(replace(topic, value=AsDataclass), bench.group()),
    }
    found = bench.alternate(runs)
    topic.cluster.delete_topics([topic.name])
    plain, by_key, hook, as_dataclass = found.values()
    unit = "records/s"
    note = f"peer: the loop in order of partitions; {KEYS:,} keys; CPU {by_key.cpu:.1f} s, peer {plain.cpu:.1f} s"
    yield Row("consume: in order of keys", by_key.rate, unit, plain.rate, note=note)
    note = f"peer: the loop without one; the hook returns at once; CPU {hook.cpu:.1f} s, peer {plain.cpu:.1f} s"
    yield Row("consume: with a `report` hook, as pods have", hook.rate, unit, plain.rate, note=note)
    note = "peer: the loop with the same fields as a msgspec Struct; "
    note += f"CPU {as_dataclass.cpu:.1f} s, peer {plain.cpu:.1f} s"
    yield Row("consume: a dataclass as value", as_dataclass.rate, unit, plain.rate, note=note)


def filled(bench: Bench, records: int | None = None) -> Topic[Order]:
    """A topic with so many records, all if nothing is said, as many in each partition."""
    topic = bench.topic("orders", PARTITIONS, Order)
    client = RawProducer(topic.cluster.config({"linger.ms": 20, "queue.buffering.max.messages": 1_000_000}))
    for number in range(records or RECORDS):
        order = Order(number, f"customer {number % KEYS}", "12 Long Street, Springfield; " * 4, 999, paid=True)
        while True:
            try:
                client.produce(topic.name, encode(order), str(number % KEYS), partition=number % PARTITIONS)
                break
            except BufferError:
                client.poll(0.1)
    client.flush()
    return topic


class Counted:
    """A handler that does nothing but see the first and the last record of each partition, by their offsets."""

    def __init__(self) -> None:
        self.last = RECORDS // PARTITIONS - 1
        self.stop = threading.Event()
        self.began: list[float] = []
        self.ended: list[float] = []

    def handler(self) -> Callable[[Record[Any]], None]:
        last, note = self.last, self.note

        def handle(record: Record[Any]) -> None:
            if not 0 < record.offset < last:
                note(record.offset)

        return handle

    def note(self, offset: int) -> None:
        (self.began if offset == 0 else self.ended).append(time.perf_counter())
        if len(self.ended) == PARTITIONS:
            self.stop.set()

    def rate(self) -> float:
        """Records a second."""
        assert len(self.began) == len(self.ended) == PARTITIONS, "records were handled twice, or not at all"
        return RECORDS / (max(self.ended) - min(self.began))


def labkit_loop(topic: Topic[Any], group: str, **options: Any) -> float:
    """Ours."""
    report = options.pop("report", None)
    counted = Counted()
    Consumer(topic, counted.handler(), group=group, **options).run(counted.stop, report)
    return counted.rate()


def hand_written_loop(topic: Topic[Order], group: str) -> float:
    """What somebody would write who needs speed, a thread for each partition and at-least-once, and nothing else.

    No retry, no rebalance, no order by key, no deadline, no flush before a commit, no steps told to anybody. A batch
    counts as finished when all of it was handled.
    """
    counted = Counted()
    decode, handle, stop = decoder(topic.value), counted.handler(), counted.stop
    finished: dict[int, int] = {}
    batches: dict[int, Queue[list[Message] | None]] = {}
    threads: list[threading.Thread] = []

    def serve(number: int, queue: Queue[list[Message] | None]) -> None:
        while (batch := queue.get()) is not None:
            for message in batch:
                handle(decode(message))
            finished[number] = batch[-1].offset() + 1

    client = Client(settings(topic, group))
    client.subscribe([topic.name])
    next_commit = time.monotonic() + 0.2
    committed: dict[int, int] = {}
    while not stop.is_set():
        messages = cast(list[Message], client.consume(1, 0.05))
        if messages:
            messages += cast(list[Message], client.consume(499, 0))
        by_partition: dict[int, list[Message]] = {}
        for message in messages:
            if message.error() is None:
                by_partition.setdefault(message.partition(), []).append(message)
        for number, batch in by_partition.items():
            if number not in batches:
                batches[number] = Queue(4)  # bounded: or the whole topic would be in memory
                threads.append(threading.Thread(target=serve, args=(number, batches[number]), daemon=True))
                threads[-1].start()
            batches[number].put(batch)
        if time.monotonic() > next_commit:
            next_commit = time.monotonic() + 0.2
            new = {number: at for number, at in finished.copy().items() if at != committed.get(number)}
            if new:
                committed |= new
                offsets = [TopicPartition(topic.name, number, at) for number, at in new.items()]
                client.commit(offsets=offsets, asynchronous=True)
    for queue in batches.values():
        queue.put(None)
    for thread in threads:
        thread.join()
    client.close()
    return counted.rate()


def bare_client(topic: Topic[Order], group: str) -> float:
    """The most there is: what the client hands over, counted."""
    client = Client(settings(topic, group))
    client.subscribe([topic.name])
    count, began = 0, 0.0
    while count < RECORDS:
        messages = client.consume(500, 0.05)
        began = began or (time.perf_counter() if messages else 0.0)
        count += sum(message.error() is None for message in messages)
    took = time.perf_counter() - began
    client.close()
    return RECORDS / took


def settings(topic: Topic[Any], group: str) -> dict[str, Any]:
    """Those of labkit's own loop."""
    own = {
        "group.id": group,
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": True,
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": 6000,
        "heartbeat.interval.ms": 300,
        "topic.metadata.refresh.interval.ms": 1000,
        "fetch.queue.backoff.ms": 1,
        "queued.min.messages": 300_000,
        "queued.max.messages.kbytes": 65_536,
    }
    return topic.cluster.config(own)
