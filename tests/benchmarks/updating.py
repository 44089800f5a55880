"""A store that counts, beside Kafka Streams: how soon a count is seen, a killed pod is back, a large state restored.

How fast they count is in `aggregating`.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from confluent_kafka import Consumer as Client
from confluent_kafka import Producer as RawProducer

from benchmarks.aggregating import INTERVAL, PARTITIONS, counting, filled
from benchmarks.bench import Bench, say, wait
from benchmarks.report import Goal, Row
from benchmarks.stalls import Traffic
from labkit import Lab
from labkit.kafka.lag import lag
from labkit.kafka.topics import Topic
from labkit.runtime import shared_broker
from labkit.runtime.streams import StreamsCounter, start_jvm

RATE, SECONDS, WARM = 1_000, 10, 10  # the first so many seconds do not count: Java compiles, the group forms
KILLS, CALM = 5, 4.0  # seconds between two kills
ENTRIES = 1_000_000

Count = Callable[[Topic[Any], Topic[Any], str, Any], None]
"""Count the commands of a topic into another one, as a group, until an event is set. In a process of its own."""


def by_labkit(commands: Topic[Any], store: Topic[Any], group: str, stop: threading.Event) -> None:
    """The store's name is the group's."""
    counting(commands, store).consumer("slot", INTERVAL).run(stop)


def by_streams(commands: Topic[Any], store: Topic[Any], group: str, stop: threading.Event) -> None:
    """Kafka Streams, its counts in memory, without its cache: each count is passed on at once."""
    start_jvm(rocksdb=False, flags=())  # Java compiles what is used much
    StreamsCounter(commands, store, group=group, commit_interval=INTERVAL).run(stop, lambda *_: None)


WHO: dict[str, Count] = {"labkit": by_labkit, "Kafka Streams": by_streams}


@contextmanager
def running(count: Count, commands: Topic[Any], store: Topic[Any], group: str) -> Iterator[None]:
    spawning = get_context("spawn")
    stop = spawning.Event()
    process = spawning.Process(target=count, args=(commands, store, group, stop), daemon=True)
    process.start()
    try:
        yield
    finally:
        stop.set()
        process.join(30)
        process.kill()


# -- how soon a count is seen


def latency(bench: Bench) -> Iterator[Row]:
    """From the send of a command until its count is seen, at 1,000/s: labkit and Kafka Streams, equal commits."""
    found = {who: sorted(_late(bench, count)) for who, count in WHO.items()}
    note = f"{RATE:,} commands/s of 1,000 keys for {SECONDS} s, seen by a read_committed reader; both commit every "
    note += f"{INTERVAL * 1000:g} ms; max {found['labkit'][-1] * 1000:.0f} ms, Kafka Streams "
    note += f"{found['Kafka Streams'][-1] * 1000:.0f} ms"
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        ours, peer = (late[int(part * len(late))] * 1000 for late in (found["labkit"], found["Kafka Streams"]))
        yield Row(f"counting: latency, {name}", ours, "ms", peer, Goal("≤", 1.0), f"peer: Kafka Streams; {note}")


def _late(bench: Bench, count: Count) -> list[float]:
    """Seconds from the send of a command until a count that has it is read."""
    commands, store = filled(bench, 1, 0)
    own = {"group.id": bench.group(), "auto.offset.reset": "earliest", "fetch.wait.max.ms": 5}
    client = Client(store.cluster.config({**own, "fetch.queue.backoff.ms": 1}))
    client.subscribe([store.name])
    sent: defaultdict[bytes, list[float]] = defaultdict(list)  # by key, when each of its commands was sent
    seen: defaultdict[bytes, int] = defaultdict(int)  # how many of them are counted
    late: list[float] = []
    began = time.monotonic() + 1.0  # of what counts; moved when the first count is there

    def send() -> None:
        client, start, number = RawProducer(commands.cluster.config({"linger.ms": 0})), time.monotonic(), 0
        while not stop.is_set():
            time.sleep(max(0.0, start + number / RATE - time.monotonic()))
            key = f"request {number % 1000}".encode()
            sent[key].append(time.monotonic())
            client.produce(commands.name, b"job completed", key)
            client.poll(0)
            number += 1
        client.flush()

    stop, sending = threading.Event(), threading.Thread(target=send)
    with running(count, commands, store, store.name):
        sending.start()
        first, until = 0.0, time.monotonic() + 300
        while time.monotonic() < until and not (late and time.monotonic() > began + SECONDS):
            message = client.poll(0.1)
            if message is None or message.error() is not None:
                continue
            now, key = time.monotonic(), message.key() or b""
            if not first:
                first, began = now, now + WARM
            done = int(message.value() or b"0")
            late += [now - when for when in sent[key][seen[key] : done] if when > began]
            seen[key] = max(seen[key], done)
        stop.set()
        sending.join()
    client.close()
    bench.cluster.delete_topics([commands.name, store.name])
    assert late, "no count was seen"
    return late


# -- kill -9


def kill(bench: Bench) -> Iterator[Row]:
    """kill -9 of the only pod that counts: how long no count is seen, with labkit and with Kafka Streams."""
    with shared_broker.shared_broker() as lease:
        try:
            with Lab("counting", pace=1) as lab:
                ours, peer = _gaps(lab, "labkit"), _gaps(lab, "streams")
        finally:
            lease.stop()
    note = (
        f"peer: Kafka Streams, in a pod as well; longest time without a count in a partition, median of {KILLS} kills; "
    )
    note += f"600 commands/s of 120 keys; max {max(ours):.1f} s, peer {max(peer):.1f} s"
    yield Row(
        "counting: kill -9 of its pod", statistics.median(ours), "s", statistics.median(peer), Goal("≤", 1.0), note
    )


def _gaps(lab: Lab, who: str) -> list[float]:
    commands = lab.topic(f"commands-{who}", PARTITIONS, str)
    store = lab.topic(f"counts-{who}", PARTITIONS, int, compacted=True)
    counter = counting(commands, store).consumer() if who == "labkit" else StreamsCounter(commands, store)
    found: list[float] = []
    with Traffic(commands, store) as traffic:
        pods = lab.deploy(who, counter)
        wait(lambda: len(traffic.makers()) == PARTITIONS)
        for turn in range(KILLS):
            time.sleep(CALM)  # else the pod is restarted later each time
            before = pods.restarts
            traffic.begin()
            pods.pods[0].kill()
            wait(lambda: pods.restarts > before)  # noqa: B023
            counts = traffic.makers()
            wait(lambda: all(traffic.makers()[one] != count for one, count in counts.items()))  # noqa: B023
            found.append(max(traffic.longest().values()))
            say(f"  {who}, kill {turn + 1} of {KILLS}: {found[-1]:.2f} s without a count")
        pods.scale(0)
    return found


# -- a large state


def restore(bench: Bench) -> Iterator[Row]:
    """From the start of a process until it has restored a million counts and committed: labkit and Kafka Streams."""
    found = {who: _restored(bench, count) for who, count in WHO.items()}
    note = f"peer: Kafka Streams, counts in memory; {ENTRIES:,} keys in {PARTITIONS} partitions, from the start of the "
    note += "process (Python's, and Java's) until each partition has committed again"
    ours, peer = found["labkit"], found["Kafka Streams"]
    yield Row(f"counting: restore of {ENTRIES:,} keys", ours, "s", peer, Goal("≤", 1.0), note)


def _restored(bench: Bench, count: Count) -> float:
    commands, store = filled(bench, ENTRIES, ENTRIES)
    cluster = commands.cluster

    def behind() -> int:
        return sum(lag(cluster, store.name, [commands.name]).values())

    with running(count, commands, store, store.name):
        wait(lambda: not behind())
    client = RawProducer(cluster.config({}))
    for partition in range(PARTITIONS):
        client.produce(commands.name, b"job completed", b"request 0-1", partition)
    client.flush()
    began = time.monotonic()
    with running(count, commands, store, store.name):
        wait(lambda: not behind())
        took = time.monotonic() - began
    cluster.delete_topics([commands.name, store.name])
    return took
