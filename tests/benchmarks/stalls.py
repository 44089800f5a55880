"""How long partitions stand still, exactly once: when a process is killed, and while a handler of another one runs."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from typing import Any, NamedTuple, Self
from unittest.mock import patch

from confluent_kafka import Consumer as Client

from benchmarks.bench import Bench, say, wait
from benchmarks.report import Goal, Row
from benchmarks.retrying import running
from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.producer import POD, Producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.runtime import shared_broker

PARTITIONS, KEYS = 6, 120
RATE = 600  # records a second, over all partitions
KILLS = 10
CALM = 4.0  # seconds between two kills: a pod that dies again soon is started later
COMMITS = 0.05  # seconds between two commits
SLOTS = ("one", "two", "three")

SLOW, TIMES = 1.0, 5  # seconds of a handler, and how often it is called
OTHERS = 300  # records a second on the other partitions


# -- kill -9 of one of three processes


def stall(bench: Bench) -> Iterator[Row]:
    """Exactly once, one of three processes is killed: how long its partitions show no output; bare ones, and pods."""
    with shared_broker.shared_broker() as lease:
        try:
            with Lab("stall", pace=1) as lab:
                yield from _rows("bare", "forked where all is imported: no start of Python", 0.28, 0.8, _bare(lab))
                yield from _rows("pods", "the start of the pod is in it", 1.0, 3.0, _pods(lab))
        finally:
            lease.stop()


def _rows(kind: str, start: str, p50: float, longest: float, found: list[Gaps]) -> Iterator[Row]:
    theirs, others = [one.theirs for one in found], [one.others for one in found]
    note = f"longest time without a visible output in its partitions, {len(found)} kills, {RATE}/s over {PARTITIONS} "
    note += f"partitions, {COMMITS * 1000:g} ms commits; {start}; the other partitions' p50 "
    note += f"{statistics.median(others) * 1000:.0f} ms, max {max(others) * 1000:.0f} ms"
    for name, value, bound in (("p50", statistics.median(theirs), p50), ("max", max(theirs), longest)):
        yield Row(f"stall: kill -9 of one of three, {kind}, {name}", value, "s", goal=Goal("≤", bound), note=note)


class Gaps(NamedTuple):
    """Of one kill: the longest time, in seconds, in which a partition showed no output."""

    theirs: float
    others: float


def shipping(source: Topic[str], output: Topic[str], **options: Any) -> Consumer:
    """Each output names the process that made it; its key places it where its cause is."""

    def handle(record: Record[str]) -> None:
        output.send(f"{os.environ[POD]} {os.getpid()}", record.key)

    return Consumer(source, handle, guarantee="exactly once", commit_interval=COMMITS, **options)


def ship(source: Topic[str], output: Topic[str], group: str, slot: str) -> None:
    """A bare process."""
    os.environ[POD] = slot
    shipping(source, output, group=group, slot=slot).run(threading.Event())


def _bare(lab: Lab) -> list[Gaps]:
    source, output = lab.topic("in", PARTITIONS, str), lab.topic("out", PARTITIONS, str)
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([__name__])
    processes: dict[str, Any] = {}
    # The fork server does not know our sys.path, and passes over what it cannot import: each child would import it all.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()

    def start(slot: str) -> None:
        processes[slot] = forking.Process(target=ship, args=(source, output, lab.run.name("bare"), slot), daemon=True)
        processes[slot].start()

    def kill(slot: str) -> None:
        processes[slot].kill()
        start(slot)

    with Traffic(source, output) as traffic:
        try:
            for slot in SLOTS:
                start(slot)
            return _stalls(traffic, SLOTS, kill)
        finally:
            for process in processes.values():
                process.kill()
                process.join()


def _pods(lab: Lab) -> list[Gaps]:
    source, output = lab.topic("orders", PARTITIONS, str), lab.topic("shipped", PARTITIONS, str)
    with Traffic(source, output) as traffic:
        pods = lab.deploy("shop", shipping(source, output), 3)
        by_name = {pod.name: pod for pod in pods.pods}
        return _stalls(traffic, list(by_name), lambda name: by_name[name].kill())


def _stalls(traffic: Traffic, names: Sequence[str], kill: Callable[[str], None]) -> list[Gaps]:
    wait(lambda: len(made := traffic.makers()) == PARTITIONS and {one.split()[0] for one in made.values()} == {*names})
    found: list[Gaps] = []
    for turn in range(KILLS):
        time.sleep(CALM)
        name, before = names[turn % len(names)], traffic.makers()
        mine = {partition for partition, maker in before.items() if maker.split()[0] == name}
        traffic.begin()
        kill(name)
        wait(lambda: all(traffic.makers()[one] != before[one] for one in mine))  # noqa: B023
        gaps = traffic.longest()
        found.append(Gaps(max(gaps[one] for one in mine), max(gaps[one] for one in gaps.keys() - mine)))
        say(f"  {name} killed: {found[-1].theirs:.2f} s, the others' partitions {found[-1].others:.2f} s")
    return found


class Traffic:
    """Records that come all the time, as long as the `with` block lasts, and what a reader of the outputs sees."""

    def __init__(self, source: Topic[str], output: Topic[str]) -> None:
        self._source, self._output = source, output
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._last: dict[int, tuple[float, str]] = {}  # by partition: when its newest output was read, and who made it
        self._longest: dict[int, float] = {}
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._read)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def makers(self) -> dict[int, str]:
        """Who made the newest output, by partition."""
        with self._lock:
            return {partition: maker for partition, (_, maker) in self._last.items()}

    def begin(self) -> None:
        """Measure from now on."""
        with self._lock:
            self._longest = dict.fromkeys(self._last, 0.0)

    def longest(self) -> dict[int, float]:
        """Seconds from one output to the next at most, by partition."""
        with self._lock:
            return dict(self._longest)

    def _send(self) -> None:
        producer, began, number = Producer(self._source.cluster), time.monotonic(), 0
        while not self._stop.wait(max(0.0, began + number / RATE - time.monotonic())):
            producer.send(self._source.name, b'"order"', f"customer {number % KEYS}")
            number += 1
        producer.flush()

    def _read(self) -> None:
        own = {"group.id": f"{self._output.name}-reader", "auto.offset.reset": "earliest", "fetch.wait.max.ms": 5}
        client = Client(self._output.cluster.config({**own, "fetch.queue.backoff.ms": 1}))
        client.subscribe([self._output.name])
        while not self._stop.is_set():
            for message in client.consume(500, 0.01):
                if message.error() is None:
                    self._see(message.partition() or 0, (message.value() or b"").decode().strip('"'))
        client.close()

    def _see(self, partition: int, maker: str) -> None:
        now = time.perf_counter()
        with self._lock:
            since = now - self._last.get(partition, (now, ""))[0]
            self._longest[partition] = max(self._longest.get(partition, 0.0), since)
            self._last[partition] = now, maker


# -- a handler that takes its time


def slow_handler(bench: Bench) -> Iterator[Row]:
    """Exactly once, a handler of 1 s on one partition: how late the outputs of the other partitions are meanwhile."""
    source, output = bench.topic("in", 4, float), bench.topic("out", 1, tuple[int, float])
    ready = threading.Event()
    ran: list[tuple[float, float]] = []  # from when to when the slow handler did

    def handle(record: Record[float]) -> None:
        if record.partition == 0:
            began = time.time()
            time.sleep(SLOW)
            ran.append((began, time.time()))
        output.send((record.partition, record.value))

    def told(step: Step, subject: Any) -> None:
        if step is Step.ASSIGNED:
            ready.set()

    settings: dict[str, Any] = {"guarantee": "exactly once", "slot": "bench", "commit_interval": 0.1}
    with Reader(output) as reader, running(Consumer(source, handle, bench.group(), on_change=told, **settings)):
        assert ready.wait(60), "it was given no partitions"
        _warm_up(source, reader)
        sending = threading.Thread(target=_send, args=(source,), daemon=True)
        sending.start()
        seen: list[tuple[float, float]] = []  # of the other partitions: when it was sent, and when its output was read
        slow, until = 0, time.monotonic() + 2 * SLOW * TIMES + 60
        while (len(seen) < _others() or slow < TIMES) and time.monotonic() < until:
            for partition, sent in (record.value for record in reader.poll(0.1)):
                slow += partition == 0
                if partition > 0:
                    seen.append((sent, time.time()))
        sending.join()
    assert (len(seen), slow) == (_others(), TIMES), "outputs were lost"
    beside, calm = list[float](), list[float]()
    for sent, read in seen:
        on_its_way = any(sent < ended and read > began for began, ended in ran)
        (beside if on_its_way else calm).append((read - sent) * 1000)
    note = f"{len(beside):,} outputs of three other partitions, on their way while it ran; {OTHERS}/s, 100 ms commits"
    if calm:
        note += f"; while it did not run p50 {statistics.median(calm):.0f} ms, max {max(calm):.0f} ms"
    yield Row("slow handler: the others' outputs, p50", statistics.median(beside), "ms", note=note)
    yield Row("slow handler: the others' outputs, max", max(beside), "ms", None, Goal("≤", SLOW * 500), note)


def _warm_up(source: Topic[float], reader: Reader[tuple[int, float]]) -> None:
    """The first records of a topic and of a group wait for coordinators and transaction logs: not to be measured."""
    producer = Producer(source.cluster)
    for partition in range(1, 4):
        producer.send(source.name, encode(time.time()), partition=partition)
    producer.flush()
    first, until = 0, time.monotonic() + 60
    while first < 3:
        assert time.monotonic() < until, "the first outputs are missing"
        first += sum(1 for _ in reader.poll(0.1))


def _others() -> int:
    return round(2 * SLOW * TIMES * OTHERS)


def _send(source: Topic[float]) -> None:
    """Partition 0 gets a record for every second turn of its handler's."""
    producer, began, period = Producer(source.cluster), time.monotonic(), _others() // TIMES
    for number in range(_others()):
        time.sleep(max(0.0, began + number / OTHERS - time.monotonic()))
        producer.send(source.name, encode(time.time()), partition=1 + number % 3)
        if number % period == period // 4:
            producer.send(source.name, encode(time.time()), partition=0)
    producer.flush()
