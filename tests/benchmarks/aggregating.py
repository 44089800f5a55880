"""Counting commands by key, exactly once: labkit, Kafka Streams with its best settings, and a loop written by hand.

Each counts the same topics, which `filled` makes, and is timed by `Watch`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import psutil
from confluent_kafka import Consumer as Client
from confluent_kafka import Producer as RawProducer

from benchmarks.bench import Bench, say
from benchmarks.report import Goal, Row
from labkit.kafka.cluster import Cluster
from labkit.kafka.lag import committed_offsets
from labkit.kafka.topics import Topic
from labkit.patterns import AtomicKeyValueStore
from labkit.runtime.streams import StreamsCounter, internal_topics, start_jvm

CASES = {1_000: 8_000_000, 100_000: 4_000_000}
"""Keys, and so many records that a run lasts 10 s."""
PARTITIONS = 4
INTERVAL = 0.1  # seconds between two commits, of everybody
PATIENCE = 300.0  # seconds for one run


class Counted(NamedTuple):
    """What one process needed to count a topic."""

    rate: float
    """Records a second, from the first commit to the last."""
    cpu: float
    """Microseconds of CPU for each record."""
    memory: float
    """MB in the end."""


def aggregation(bench: Bench) -> Iterator[Row]:
    """Counting by key, exactly once, with 1,000 and 100,000 keys: labkit, Kafka Streams at its best, a loop by hand."""
    for keys, records in CASES.items():
        commands, output = filled(bench, keys, records)
        # A process of its own, whose JVM stays and is warm: the first run counts for nothing.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:

            def by_streams(threads: int, rocksdb: bool) -> Counted:
                counter = StreamsCounter(
                    *(commands, output),  # noqa: B023 - called in this turn only
                    group=bench.group(),
                    commit_interval=INTERVAL,
                    threads=threads,
                    rocksdb=bench.folder if rocksdb else None,
                    caching=True,
                )
                return process.submit(with_streams, counter, records).result(PATIENCE)  # noqa: B023

            by_streams(1, True)
            found: dict[str, Counted] = {}
            for threads, rocksdb in product((1, 2), (False, True)):
                name = f"{threads} thread{'s' * (threads > 1)}, {'RocksDB' if rocksdb else 'in memory'}"
                found[name] = by_streams(threads, rocksdb)
                say(f"  Kafka Streams, {name}, {keys:,} keys: {found[name]}")
        best = max(found, key=lambda name: found[name].rate)
        streams = found[best]
        ours = {
            "labkit, 1 process": (by_labkit(commands, 1, records), Goal("≥", 1.0)),
            "labkit, 2 processes": (by_labkit(commands, 2, records), Goal("≥", 1.5)),
            "by hand, 1 process": (by_hand(commands, output, bench.group(), records), None),
        }
        for topic in (commands, output):
            topic.cluster.delete_topics([topic.name])
        peer = (
            f"peer: Kafka Streams, exactly_once_v2, {best}; {records:,} records, commits every {INTERVAL * 1000:g} ms"
        )
        for who, (own, goal) in ours.items():
            note = f"{peer}; CPU a record {own.cpu:.2f} µs, peer {streams.cpu:.2f} µs; memory {own.memory:.0f} MB, "
            note += f"peer {streams.memory:.0f} MB"
            yield Row(f"counting {keys:,} keys, {who}", own.rate, "records/s", streams.rate, goal, note)


def filled(bench: Bench, keys: int, records: int) -> tuple[Topic[Any], Topic[Any]]:
    """A topic with so many commands, spread over so many keys; and an empty compacted one for the counts."""
    commands = bench.topic("commands", PARTITIONS)
    output = Topic(commands.cluster, f"{commands.name}-counts", PARTITIONS, int)
    output.create({"cleanup.policy": "compact"})
    client = RawProducer(commands.cluster.config({"linger.ms": 20, "queue.buffering.max.messages": 1_000_000}))
    names = [f"request {number}-{records // keys}" for number in range(keys)]
    for number in range(records):
        while True:
            try:
                client.produce(commands.name, b"job completed", names[number * 7919 % keys])
                break
            except BufferError:
                client.poll(0.1)
    client.flush()
    return commands, output


class Watch(threading.Thread):
    """Looks at a group's commits, and calls `stop` when all records are committed."""

    def __init__(self, cluster: Cluster, group: str, records: int, stop: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.cluster, self.group, self.records, self.stop = cluster, group, records, stop
        self.seen: list[tuple[float, int, float]] = []

    def run(self) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            done = sum(committed_offsets(self.cluster, self.group).values())
            if done:
                self.seen.append((time.perf_counter(), done, time.process_time()))
            if done >= self.records:
                break
            time.sleep(0.05)  # nothing tells of a commit
        self.stop()

    def counted(self) -> Counted:
        """What this process needed."""
        (began, first, cpu), *_, (ended, last, cpu_then) = self.seen
        assert last == self.records, f"{last:,} of {self.records:,} records were counted"
        memory = psutil.Process().memory_info().rss / 1e6
        return Counted((last - first) / (ended - began), (cpu_then - cpu) / (last - first) * 1e6, memory)


def with_streams(counter: StreamsCounter, records: int) -> Counted:
    """Kafka Streams, in this process."""
    start_jvm(rocksdb=True, flags=())  # Java compiles what is used much
    stop, cluster = threading.Event(), counter.commands.cluster
    watch = Watch(cluster, counter.group, records, stop.set)
    watch.start()
    counter.run(stop, lambda _step, _subject: None)
    cluster.delete_topics(internal_topics(cluster, counter.group))
    return watch.counted()


def by_labkit(commands: Topic[Any], processes: int, records: int) -> Counted:
    """labkit's store, in so many processes. It counts in a topic of its own, whose name is its group's."""
    store = Topic(commands.cluster, f"{commands.name}-in-{processes}", PARTITIONS, int)
    store.create({"cleanup.policy": "compact"})
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        runs = [pool.submit(with_labkit, commands, store, f"slot-{number}", records) for number in range(processes)]
        counted = [run.result(PATIENCE) for run in runs]
    store.cluster.delete_topics([store.name])
    rates, cpu, memory = zip(*counted, strict=True)
    return Counted(min(rates), sum(cpu), sum(memory))


def with_labkit(commands: Topic[Any], store: Topic[Any], slot: str, records: int) -> Counted:
    """The store, in this process. The rate is that of all who count."""
    stop, counts = threading.Event(), counting(commands, store)
    watch = Watch(commands.cluster, counts.group, records, stop.set)
    watch.start()
    counts.consumer(slot, INTERVAL).run(stop)
    watch.join()
    return watch.counted()


def counting(commands: Topic[Any], store: Topic[Any]) -> AtomicKeyValueStore[str, Any, int]:
    """The store of all these benchmarks."""
    return AtomicKeyValueStore(commands, store, _one_more)


def _one_more(count: int | None, command: object) -> int:
    return (count or 0) + 1


def by_hand(commands: Topic[Any], output: Topic[Any], group: str, records: int) -> Counted:
    """What one would write who needs speed and nothing else: no restore of the counts, no rebalance, no errors."""
    stop = threading.Event()
    watch = Watch(commands.cluster, group, records, stop.set)
    own = {"group.id": group, "auto.offset.reset": "earliest", "enable.auto.commit": False, "fetch.wait.max.ms": 5}
    client = Client(commands.cluster.config({**own, "fetch.queue.backoff.ms": 1, "queued.min.messages": 300_000}))
    producer = RawProducer(commands.cluster.config({"transactional.id": group, "linger.ms": 0, "retry.backoff.ms": 1}))
    producer.init_transactions()
    client.subscribe([commands.name])
    counts: Counter[tuple[int, bytes]] = Counter()
    watch.start()
    while not stop.is_set():
        until, batch = time.monotonic() + INTERVAL, list[Any]()
        while (left := until - time.monotonic()) > 0:
            batch += client.consume(500, left)
        if not batch:
            continue
        new = Counter((message.partition(), message.key()) for message in batch)
        counts.update(new)
        producer.begin_transaction()
        for partition, key in new:
            producer.produce(output.name, b"%d" % counts[partition, key], key, partition)
            producer.poll(0)
        producer.send_offsets_to_transaction(client.position(client.assignment()), client.consumer_group_metadata())
        producer.commit_transaction()
    client.close()
    watch.join()
    return watch.counted()
