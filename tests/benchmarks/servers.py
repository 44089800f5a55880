"""How long one waits for processes: a broker, one that was killed, a pod."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterator

from benchmarks.bench import Bench, say, wait
from benchmarks.report import Goal, Row
from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.lab.pods.pod import PodState
from labkit.runtime import shared_broker
from labkit.runtime.broker import Broker, prepare
from labkit.runtime.child import Child

RECORDS = 20_000
PATIENCE = 60.0  # seconds after which waiting is given up


def start(bench: Bench) -> Iterator[Row]:
    """An embedded Kafka from nothing but its prepared template and AOT cache to its first answer."""
    prepare()
    took = [started(bench, turn) for turn in range(bench.rounds)]
    note = f"`prepare`, a new data folder, Java, until it answers metadata; {spread(took)}"
    yield Row("start: embedded Kafka, warm", statistics.median(took), "s", goal=Goal("≤", 1.0), note=note)


def started(bench: Bench, turn: int) -> float:
    """Seconds."""
    began = time.perf_counter()
    kafka = prepare()
    broker = Broker.create(bench.folder / f"started-{turn}", kafka)
    with Child(kafka.command(broker.folder), cwd=broker.folder, output=broker.log) as child:
        broker.wait_until_ready(lambda: child.poll() is None)
        took = time.perf_counter() - began
    say(f"  start: {took:.2f} s")
    return took


def kill(bench: Bench) -> Iterator[Row]:
    """The shared broker after kill -9: seconds until a record is confirmed again, and what was lost of 20,000."""
    took: list[float] = []
    lost = 0
    with shared_broker.shared_broker() as lease:
        try:
            for turn in range(bench.rounds):
                topic = Topic(lease.cluster, f"kept-{turn}", 4, int)
                topic.create()
                for number in range(RECORDS):
                    topic.send(number, str(number))
                topic.flush()
                took.append(killed(topic))
                with Reader(topic) as reader:
                    missing = set(range(RECORDS + 1)) - {record.value for record in reader.read_to_end()}
                lost += len(missing)
                say(f"  kill: confirmed again after {took[-1]:.2f} s, {len(missing)} of {RECORDS:,} lost")
        finally:
            lease.stop()
    note = f"from the signal until a new record is confirmed; {spread(took)}"
    yield Row("kill: Kafka back after kill -9", statistics.median(took), "s", goal=Goal("≤", 3.0), note=note)
    note = f"confirmed before {bench.rounds} kills, then read again: {bench.rounds} × {RECORDS:,}"
    yield Row("kill: confirmed records lost", lost, "records", goal=Goal("≤", 0), note=note)


def killed(topic: Topic[int]) -> float:
    """Seconds from the end of the broker until it has confirmed the record RECORDS."""
    before = shared_broker.status()
    assert before is not None, "the shared broker is gone"
    assert before.pid, "the shared broker does not run"
    os.kill(before.pid, signal.SIGKILL)
    began = time.perf_counter()
    topic.send(RECORDS, "after")
    topic.flush(PATIENCE)
    took = time.perf_counter() - began
    after = shared_broker.status()
    assert after is not None, "the shared broker is gone"
    assert after.pid != before.pid, "the broker was not killed"
    return took


def pod(bench: Bench) -> Iterator[Row]:
    """A pod, from `deploy` until the lab knows that it runs."""
    with shared_broker.shared_broker() as lease:
        try:
            with Lab("bench", pace=1) as lab:
                topic = lab.topic("orders", 1, int)
                running = [deployed(lab, topic, f"shop-{turn}") for turn in range(bench.rounds)]
        finally:
            lease.stop()
    note = f"a Python process with labkit, its report, and the kernel's next look at it; {spread(running)}"
    yield Row("pod: deploy to RUNNING", statistics.median(running), "s", note=note)


def deployed(lab: Lab, topic: Topic[int], name: str) -> float:
    """Seconds from the call of `deploy` until the pod's state is RUNNING."""

    def handle(record: Record[int]) -> None:
        pass

    began = time.perf_counter()
    deployment = lab.deploy(name, Consumer(topic, handle))
    wait(lambda: deployment.pods[0].state is PodState.RUNNING)
    took = time.perf_counter() - began
    deployment.drain(timeout=5)
    say(f"  pod: {took:.2f} s")
    return took


def spread(figures: list[float]) -> str:
    """Between which seconds the rounds were."""
    return f"{min(figures):.2f}–{max(figures):.2f} s in {len(figures)} rounds"
