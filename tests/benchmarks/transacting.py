"""Exactly once against at least once, with the same topic and handler; and how long an output takes to be visible."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

from confluent_kafka import Consumer as Client

from benchmarks.bench import Bench
from benchmarks.consuming import PARTITIONS, Order, filled
from benchmarks.report import Goal, Row
from benchmarks.retrying import running
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic

Guarantee = Literal["at least once", "exactly once"]

RECORDS = 400_000
RATE, SECONDS = 1000, 10


def transactions(bench: Bench) -> Iterator[Row]:
    """Exactly once against at least once: decoding and one send a record."""
    topic, output = filled(bench, RECORDS), bench.topic("shipped", PARTITIONS, Order)
    exactly, at_least = "exactly once", "at least once"
    found = bench.alternate(
        {
            exactly: lambda: rate(topic, output, bench.group(), "exactly once"),
            at_least: lambda: rate(topic, output, bench.group(), "at least once"),
        }
    )
    for one in (topic, output):
        one.cluster.delete_topics([one.name])
    ours, peer = found[exactly], found[at_least]
    note = f"peer: the same consumer at least once; {RECORDS:,} records of 200 bytes, commits every 100 ms, from the "
    note += f"first record handled to the last offset committed; CPU {ours.cpu:.1f} s, peer {peer.cpu:.1f} s"
    yield Row("exactly once: decode, one send", ours.rate, "records/s", peer.rate, Goal("≥", 0.7), note)


def visible(bench: Bench) -> Iterator[Row]:
    """From input to visible output at 1,000/s, exactly once with commits every 10 and 100 ms, and at least once."""
    ways: tuple[tuple[Guarantee, float], ...] = (("exactly once", 0.01), ("exactly once", 0.1), ("at least once", 0.1))
    for guarantee, interval in ways:
        late = sorted(latencies(bench, guarantee, interval))
        note = f"{RATE:,}/s for {SECONDS} s, from send to a read_committed reader; max {late[-1] * 1000:.0f} ms"
        for name, part in (("p50", 0.5), ("p99", 0.99)):
            work = f"visible: {guarantee}, {interval * 1000:g} ms commits, {name}"
            yield Row(work, late[int(part * len(late))] * 1000, "ms", note=note)


def rate(topic: Topic[Any], output: Topic[Any], group: str, guarantee: Guarantee) -> float:
    """Records a second, until all are committed."""
    stop, times, done = threading.Event(), list[float](), dict[tuple[str, int], int]()

    def handle(record: Record[Order]) -> None:
        if not times:
            times.append(time.perf_counter())
        output.send(record.value, record.key)

    def told(step: Step, subject: Any) -> None:
        if step is Step.COMMITTED:
            done.update(subject)
            if sum(done.values()) == RECORDS:
                times.append(time.perf_counter())
                stop.set()

    Consumer(
        *(topic, handle, group),
        guarantee=guarantee,
        slot="bench",
        commit_interval=0.1,
        on_change=told,  # type: ignore[arg-type]
    ).run(stop)
    return RECORDS / (times[1] - times[0])


def latencies(bench: Bench, guarantee: Guarantee, interval: float) -> list[float]:
    """Seconds from the send of a record to the moment at which its output is read."""
    topic, output = bench.topic("in", PARTITIONS, float), bench.topic("out", PARTITIONS, float)

    def handle(record: Record[float]) -> None:
        output.send(record.value, record.key)

    consumer = Consumer(topic, handle, bench.group(), guarantee=guarantee, slot="bench", commit_interval=interval)
    own = {"group.id": bench.group(), "auto.offset.reset": "earliest", "fetch.wait.max.ms": 5}
    reader = Client(output.cluster.config({**own, "fetch.queue.backoff.ms": 1}))
    reader.subscribe([output.name])
    late: list[float] = []
    sending = threading.Thread(target=send, args=(topic,))
    with running(consumer):
        sending.start()
        until = time.monotonic() + SECONDS + 60
        while len(late) < RATE * SECONDS and time.monotonic() < until:
            message = reader.poll(0.1)
            if message is not None and message.error() is None:
                late.append(time.time() - float(message.value() or b"nan"))
        sending.join()
    reader.close()
    assert len(late) == RATE * SECONDS, "outputs were lost"
    return late[RATE:] or late  # the first ones wait for the group


def send(topic: Topic[float]) -> None:
    producer, began = Producer(topic.cluster), time.monotonic()
    for number in range(RATE * SECONDS):
        time.sleep(max(0.0, began + number / RATE - time.monotonic()))
        producer.send(topic.name, encode(time.time()), f"customer {number % 1000}")
    producer.flush()
