"""Handlers that wait, as those which call a service do: how near 16 of them at once come to 16 times one."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.report import Goal, Row
from labkit.kafka.consumer import Consumer
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic

RECORDS = 10_000
KEYS = 1000
WORKERS = 16
_random = random.Random(4)
WAITS = [_random.uniform(0, 0.005) for _ in range(RECORDS)]  # seconds, by record
IDEAL = RECORDS * WORKERS / sum(WAITS)  # records a second, if nothing but waiting took time


def wait(bench: Bench) -> Iterator[Row]:
    """10,000 records whose handler waits 0 to 5 ms, 16 at once: the ratio is total waiting / (16 × elapsed)."""
    unkeyed, keyed = bench.topic("unkeyed", WORKERS, int), bench.topic("keyed", 4, int)
    producer = Producer(bench.cluster)
    for number in range(RECORDS):
        producer.send(unkeyed.name, encode(number), partition=number % WORKERS)
        producer.send(keyed.name, encode(number), f"customer {number % KEYS}")
    producer.flush()
    found = bench.alternate(
        {
            "16 partitions": lambda: run(unkeyed, bench.group(), Timed().handle),
            f"{KEYS:,} keys": lambda: run(keyed, bench.group(), Timed().handle, order="key"),
        }
    )
    bench.cluster.delete_topics([unkeyed.name, keyed.name])
    note = f"peer: waiting alone. {RECORDS:,} records, {sum(WAITS):.1f} s of waiting, {WORKERS} workers"
    for name, median in found.items():
        yield Row(f"wait: {name}", median.rate, "records/s", IDEAL, Goal("≥", 0.8), note)


class Timed:
    """A handler of every record, and the time from its first call to its last return."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.began = self.ended = 0.0
        self._before, self._after = itertools.count(1), itertools.count(1)

    def handle(self, record: Record[int]) -> None:
        if next(self._before) == 1:
            self.began = time.perf_counter()
        time.sleep(WAITS[record.value])  # the work
        if next(self._after) == RECORDS:
            self.ended = time.perf_counter()
            self.stop.set()


def run(topic: Topic[int], group: str, handler: Callable[[Record[int]], Any], **options: Any) -> float:
    """Records a second."""
    timed: Timed = handler.__self__  # type: ignore[attr-defined]
    Consumer(topic, handler, group=group, workers=WORKERS, **options).run(timed.stop)
    return RECORDS / (timed.ended - timed.began)
