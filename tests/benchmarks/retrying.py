"""Retries: how late they are, what an idle policy costs, how soon an outage is forgotten, how soon a skip is felt."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from benchmarks.bench import Bench, wait
from benchmarks.consuming import Counted, filled, labkit_loop
from benchmarks.report import Goal, Row
from labkit.kafka.consumer import Consumer
from labkit.kafka.lag import lag
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import BlockedLanes
from labkit.patterns.retries import RetryingConsumer, blocking, exponential, retry_topics
from labkit.patterns.retry_history import HEADER, parse

RATE, SECONDS, DELAY = 500, 10, 2.0
WAITING, OUTAGE = 10_000, 20.0
SKIPS = 20


def retries(bench: Bench) -> Iterator[Row]:
    """Lateness of retries at 500/s, an idle policy, recovery after an outage, and skips in a long back-off."""
    yield from lateness(bench)
    yield from idle(bench)
    yield from recovery(bench)
    yield from skips(bench)


@contextmanager
def running(consumer: Consumer) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=consumer.run, args=(stop,))
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # thousands of failures, a line each
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(30)


def lateness(bench: Bench) -> Iterator[Row]:
    topic, group = bench.topic("late", 4, int), bench.group()
    late: list[float] = []

    def handle(record: Record[int]) -> None:
        history = parse(record.headers.get(HEADER))
        if history is None:
            raise ConnectionError("no")
        late.append(time.time() - (history.failed[-1] + DELAY))

    producer = Producer(bench.cluster)
    with running(RetryingConsumer(topic, handle, group, retry=retry_topics(DELAY))):
        began = time.monotonic()
        for number in range(RATE * SECONDS):
            producer.send(topic.name, encode(number), f"customer {number}")
            if number % 10 == 0:
                producer.poll()
                time.sleep(max(0.0, began + number / RATE - time.monotonic()))
        producer.flush()
        wait(lambda: len(late) >= RATE * SECONDS)
    late.sort()
    note = f"handled − due of {len(late):,} retries at {RATE}/s, through a topic of {DELAY:g} s; "
    note += f"max {late[-1] * 1000:.0f} ms"
    yield Row("retries: lateness, p50", late[len(late) // 2] * 1000, "ms", goal=Goal("≤", 50), note=note)
    yield Row("retries: lateness, p99", late[int(len(late) * 0.99)] * 1000, "ms", goal=Goal("≤", 200), note=note)
    early = sum(seconds < 0 for seconds in late)
    yield Row("retries: handled early", early, "records", goal=Goal("≤", 0), note="of the same")


def idle(bench: Bench) -> Iterator[Row]:
    topic = filled(bench)

    def with_policy() -> float:
        counted = Counted()
        policy = blocking(exponential(0.1, cap=60))
        RetryingConsumer(topic, counted.handler(), bench.group(), retry=policy).run(counted.stop)
        return counted.rate()

    found = bench.alternate({"with": with_policy, "without": lambda: labkit_loop(topic, bench.group())})
    ours, peer = found["with"], found["without"]
    topic.cluster.delete_topics([topic.name])
    note = f"peer: the loop without one; nothing fails; CPU {ours.cpu:.1f} s, peer {peer.cpu:.1f} s"
    yield Row("retries: a policy that is not needed", ours.rate, "records/s", peer.rate, Goal("≥", 0.9), note)


def recovery(bench: Bench) -> Iterator[Row]:
    took = {}
    for name, policy in {
        "blocking": blocking(exponential(0.1, cap=5)),
        "retry topics": retry_topics(1, 5, 30),
    }.items():
        topic = bench.topic("outage", 4, int)
        took[name] = outage(bench, topic, policy)
    note = f"from the end of an outage of {OUTAGE:g} s, {WAITING:,} records waiting, until all are handled; "
    note += "peer: retry topics of 1, 5 and 30 s"
    yield Row("retries: recovery, blocking up to 5 s", took["blocking"], "s", took["retry topics"], note=note)


def outage(bench: Bench, topic: Topic[Any], policy: Any) -> float:
    up, group = threading.Event(), bench.group()
    done: set[int] = set()

    def handle(record: Record[int]) -> None:
        if not up.is_set():
            raise ConnectionError("down")
        done.add(record.value)

    producer = Producer(bench.cluster)
    for number in range(WAITING):
        producer.send(topic.name, encode(number), f"customer {number % 500}")
    producer.flush()
    with running(RetryingConsumer(topic, handle, group, retry=policy)):
        wait(lambda: lag(bench.cluster, group, [topic.name]) is not None)
        time.sleep(OUTAGE)  # the outage itself
        up.set()
        began = time.monotonic()
        wait(lambda: len(done) == WAITING)
        return time.monotonic() - began


def skips(bench: Bench) -> Iterator[Row]:
    topic, group = bench.topic("skips", 1, int), bench.group()
    called: list[float] = []

    def handle(record: Record[int]) -> None:
        called.append(time.monotonic())
        raise ConnectionError("no")

    producer = Producer(bench.cluster)
    for number in range(SKIPS + 1):
        producer.send(topic.name, encode(number))
    producer.flush()
    consumer = RetryingConsumer(topic, handle, group, retry=blocking(600))
    consumer.prepare()
    took = []
    with running(consumer), BlockedLanes(topic, group) as lanes:
        for number in range(SKIPS):
            place = f"{topic.name}/0/{number}"
            wait(lambda place=place: place in lanes)  # type: ignore[misc]
            began = time.monotonic()
            lanes.skip(place)
            took.append(called[-1] - began)
    took.sort()
    note = f"from the command to the next record's handler, in a back-off of 600 s; median of {SKIPS}, "
    note += f"longest {took[-1] * 1000:.0f} ms"
    yield Row("retries: skip → resumed", took[SKIPS // 2] * 1000, "ms", goal=Goal("≤", 200), note=note)
