"""Pattern 1: how fast a topic becomes a view, and how fast and how soon its readers answer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.bench import Bench, say
from benchmarks.report import Goal, Row
from labkit import Lab
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.patterns.projection import Projection
from labkit.patterns.views import Batch, Change, SqliteView
from labkit.runtime import shared_broker
from labkit.services.sites.content import App, Site, site_id, sites, updates
from labkit.services.sites.metasite import MetaSite, fill
from labkit.services.sites.view_reader import ViewReader

RECORDS, PARTITIONS, BATCH = 60_000, 4, 500
SITES = 10_000  # that the reader is asked for
OPEN_LOOP = 1_000_000 / 60  # requests a second: MetaSite's million a minute
UPDATES = 1000  # a second, meanwhile
SECONDS = 10.0
CONNECTIONS = 32


class Context(msgspec.Struct):
    """What the view needs of a site."""

    version: int
    apps: list[App]


def apps_of(record: Record[Context]) -> list[tuple[str, str]]:
    return [(app.name, app.version) for app in record.value.apps]


class Timed(SqliteView):
    """Notes when its first batch came and its last was committed."""

    began = ended = 0.0

    def apply(self, batch: Batch) -> None:
        self.began = self.began or time.perf_counter()
        super().apply(batch)
        self.ended = time.perf_counter()
        if sum(map(self.reached, range(PARTITIONS))) >= RECORDS:
            self.complete.set()

    complete: threading.Event


def fresh_view(folder: Path) -> Timed:
    made = Timed(folder / f"{time.time_ns()}.db", "apps", {"app": "text", "version": "text"}, ["app"], key="site")
    made.complete = threading.Event()
    return made


def view(bench: Bench) -> Iterator[Row]:
    """60,000 sites from a topic into a SQLite view, against the same upserts without Kafka."""
    topic: Topic[Context] = bench.topic("sites", PARTITIONS, Context)
    partitions: list[list[tuple[int, Change]]] = [[] for _ in range(PARTITIONS)]
    producer, rows = Producer(bench.cluster), 0
    for number, site in enumerate(sites(RECORDS, pages=0)):
        found = [(app.name, app.version) for app in site.apps]
        rows += len(found)
        offset = number // PARTITIONS
        partitions[number % PARTITIONS].append((offset, Change(site.id, site.version, found)))
        producer.send(topic.name, encode(site), site.id, partition=number % PARTITIONS)
    producer.flush()

    def from_topic() -> float:
        with fresh_view(bench.folder) as made:
            Projection(topic, apps_of, made).consumer(bench.group(), BATCH).run(made.complete)
            assert made.count() == rows, "the view is not complete"
            return rows / (made.ended - made.began)

    def from_memory() -> float:
        with fresh_view(bench.folder) as made:
            made.begin(topic.name, "id", range(PARTITIONS))
            for start in range(0, len(partitions[0]), BATCH):
                for number, changes in enumerate(partitions):
                    part = changes[start : start + BATCH]
                    made.apply(Batch(number, start, start + len(part), 0.0, part, []))
            assert made.count() == rows, "the view is not complete"
            return rows / (made.ended - made.began)

    found = bench.alternate({"topic → view": from_topic, "upserts alone": from_memory})
    topic.cluster.delete_topics([topic.name])
    ours, peer = found["topic → view"], found["upserts alone"]
    note = f"{RECORDS:,} sites of {rows / RECORDS:.1f} rows, decoded, projected, two indexes, versions, and the offset "
    note += f"with up to {BATCH} records a transaction; from the first batch to the last commit; CPU {ours.cpu:.1f} s"
    yield Row("view: topic → SQLite", ours.rate, "rows/s", goal=Goal("≥", 50_000), note=note)
    note = "peer: the same transactions from memory, nothing to fetch or decode; "
    note += f"CPU {ours.cpu:.1f} s, peer {peer.cpu:.1f} s"
    yield Row("view: the same against the upserts alone", ours.rate, "rows/s", peer.rate, note=note)


def reader(bench: Bench) -> Iterator[Row]:
    """A million requests a minute, open loop, to two reader processes while 1,000 updates a second are projected."""
    with shared_broker.shared_broker() as lease:
        try:
            with Lab("bench", pace=1) as lab:
                yield from answered(bench, lab)
        finally:
            lease.stop()


def answered(bench: Bench, lab: Lab) -> Iterator[Row]:
    everything: Topic[Any] = lab.topic("sites", PARTITIONS, Context)
    made = SqliteView(bench.folder / "reader.db", "apps", {"app": "text", "version": "text"}, ["app"], key="site")
    writer = lab.deploy("writer", Projection(everything, apps_of, made).consumer())
    lab.load(everything, sites(SITES, pages=0), rate=1e6).wait(60)
    assert lab.settle(60), "the view is not complete"
    service = ViewReader(lab.port("reader"), made, everything)
    readers = lab.deploy("reader", service, replicas=2)
    lab.wait_until(lambda: writer.ready() and readers.ready(), "the pods to run")
    paths = [f"/site/{site_id(number)}" for number in range(0, SITES, 7)]
    runs: list[dict[str, float]] = []
    changes = updates(SITES, 10**6, pages=0)  # goes on from round to round: a version costs as many draws as it counts
    for _ in range(bench.rounds):
        load = lab.load(everything, changes, rate=UPDATES)
        lab.wait_until(lambda load=load: load.count > UPDATES, "the updates to flow")
        runs.append(requests(service.port, paths, OPEN_LOOP))
        load.stop()
        say(f"  reader: {runs[-1]}")
    said = f"open loop, {CONNECTIONS} connections, {SECONDS:g} s × {bench.rounds}, generator and writer on the same "
    said += f"{os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f}"
    rate, half, most = (statistics.median(run[name] for run in runs) for name in ("rate", "p50 ms", "p99 ms"))
    failed = sum(run["failed"] for run in runs)
    note = f"{OPEN_LOOP:,.0f} a second wanted, {failed:,.0f} failed; {said}"
    yield Row("reader: requests answered", rate, "requests/s", goal=Goal("≥", 0.99 * OPEN_LOOP), note=note)
    yield Row("reader: p50 from when a request was due", half, "ms", note=said)
    yield Row("reader: p99 from when a request was due", most, "ms", goal=Goal("≤", 10), note=said)
    readers.drain()
    writer.drain()
    yield from owner(bench, lab)


def owner(bench: Bench, lab: Lab) -> Iterator[Row]:
    """What MetaSite can do at best."""
    database = lab.postgres()
    fill(database.dsn, sites(2000))
    service = MetaSite(lab.port("metasite"), database.dsn, lab.topic("changes", PARTITIONS, Site), connections=8)
    metasite = lab.deploy("metasite", service, replicas=2)
    lab.wait_until(metasite.ready, "MetaSite to run")
    paths = [f"/sites/{site_id(number)}/apps" for number in range(0, 2000, 7)]
    runs = [requests(service.port, paths, None) for _ in range(bench.rounds)]
    rate, most = (statistics.median(run[name] for run in runs) for name in ("rate", "p99 ms"))
    note = (
        f"two processes, objects of 12 kB in its PostgreSQL; closed loop, {CONNECTIONS} connections; p99 {most:.1f} ms"
    )
    yield Row("reader: what MetaSite does at best", rate, "requests/s", note=note)


def requests(port: int, paths: Sequence[str], rate: float | None) -> dict[str, float]:
    """What the generator, a process of its own, found."""
    options = {"port": port, "paths": list(paths), "rate": rate, "seconds": SECONDS, "connections": CONNECTIONS}
    script = Path(__file__).with_name("requests.py")
    done = subprocess.run([sys.executable, str(script)], input=json.dumps(options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found
