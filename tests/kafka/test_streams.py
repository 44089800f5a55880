"""Kafka Streams in a pod: exact counts, a notice for each request that is complete, and nothing of it left."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from consuming import members_of
from lab_helpers import said, wait_said
from processes import is_alive, wait_until

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import committed_offsets
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.lab.pods.deployment import Deployment
from labkit.runtime.streams import StreamsCounter, internal_topics

pytestmark = pytest.mark.usefixtures("connection")
READY = 120.0  # seconds for pods to run: the first one may fetch jars


class Webhook(ThreadingHTTPServer):
    """Takes notices, and keeps their keys. `broken`: answers 503 instead."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.broken = False
        super().__init__(("127.0.0.1", 0), _Answer)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/notices"


class _Answer(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.server.broken:
            self.server.taken.append(self.headers["Idempotency-Key"])
        self.send_response(503 if self.server.broken else 204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        yield server
        server.shutdown()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("streams") as lab:
        yield lab


def counter(lab: Lab, **options: object) -> StreamsCounter:
    """One on topics of this lab."""
    commands = lab.topic("commands", 4, str)
    output = lab.topic("completed", 4, int, compacted=True)
    return StreamsCounter(commands, output, lab.topic("notices", 1, int), **options)  # type: ignore[arg-type]


def report(commands: Topic[str], requests: range, jobs: range, total: int) -> None:
    """Send these jobs of these requests."""
    for job in jobs:
        for request in requests:
            commands.send(f"job {job} completed", key=f"request {request}-{total}")
    commands.flush()


def newest(topic: Topic[int]) -> dict[str | None, int]:
    with Reader(topic) as reader:
        return {record.key: record.value for record in reader.read_to_end()}


def keys(topic: Topic[int]) -> Counter[str | None]:
    with Reader(topic) as reader:
        return Counter(record.key for record in reader.read_to_end())


def wait_counted(counts: Deployment, records: int, timeout: float = READY) -> None:
    """Wait until so many records are committed."""
    commands = counts.topics[0]

    def committed() -> int:
        return sum(committed_offsets(commands.cluster, counts.group or "").values())

    wait_until(lambda: committed() >= records, timeout, f"{records} records to be counted")


@pytest.mark.long  # notebook 06 runs one in the first tier
def test_counts_are_exact_and_a_notice_comes_once_though_a_pod_is_killed(
    lab: Lab, cluster: Cluster, webhook: Webhook
) -> None:
    streams = counter(lab, webhook=webhook.url)
    counts = lab.deploy("counts", streams)
    report(streams.commands, range(50), range(9), total=10)
    streams.commands.send("of no request", key="no total")
    lab.wait_ready(counts, timeout=READY)
    wait_counted(counts, 100)
    process = counts.pods[0].child
    counts.pods[0].kill()
    report(streams.commands, range(40), range(9, 10), total=10)
    assert lab.settle(READY), counts
    complete = {f"request {number}-10": 10 for number in range(40)}
    rest = {f"request {number}-10": 9 for number in range(40, 50)}
    assert newest(streams.output) == complete | rest | {"no total": 1}
    assert streams.notices is not None
    assert keys(streams.notices) == Counter(complete.keys())
    assert set(webhook.taken) == set(complete)
    assert internal_topics(cluster, counts.group or "") == [f"{counts.group}-counts-changelog"]
    wait_until(lambda: lab.figure("memory MB", "counts") > 50, what="the memory of a JVM")
    assert lab.figure("start s", "counts") > 0

    last = counts.pods[0].child
    lab.close()
    assert process is not None
    assert last is not None
    assert not is_alive(process.pid)
    assert not is_alive(last.pid)
    assert not [name for name in (*cluster.topics(), *cluster.groups()) if lab.run.prefix in name]


@pytest.mark.long
@pytest.mark.parametrize("rocksdb", [False, True])
def test_kills_restarts_and_scaling_change_no_count(lab: Lab, webhook: Webhook, rocksdb: bool) -> None:
    streams = counter(lab, webhook=webhook.url, threads=2, rocksdb=lab.folder if rocksdb else None)
    counts = lab.deploy("counts", streams, replicas=2)
    report(streams.commands, range(200), range(20), total=100)
    lab.wait_ready(counts, timeout=READY)
    assert all(pod.partitions != "no partition" for pod in counts.pods)
    for turn, act in enumerate((counts.pods[0].kill, counts.pods[1].restart, lambda: counts.scale(1))):
        act()
        report(streams.commands, range(200), range(20 * turn + 20, 20 * turn + 40), total=100)
        wait_counted(counts, 4000 * (turn + 1))
    counts.scale(2)
    report(streams.commands, range(200), range(80, 100), total=100)
    assert lab.settle(READY), counts
    lab.wait_ready(counts, timeout=READY)
    assert newest(streams.output) == {f"request {number}-100": 100 for number in range(200)}
    assert streams.notices is not None
    assert keys(streams.notices) == Counter(f"request {number}-100" for number in range(200))
    assert set(webhook.taken) == {f"request {number}-100" for number in range(200)}
    assert any(lab.folder.glob("counts-*/**/CURRENT")) is rocksdb  # a file that every RocksDB has


@pytest.mark.long
def test_a_webhook_that_fails_is_told_and_told_again(lab: Lab, webhook: Webhook) -> None:
    webhook.broken = True
    streams = counter(lab, webhook=webhook.url)
    counts = lab.deploy("counts", streams)
    report(streams.commands, range(3), range(5), total=5)
    wait_said(counts, "Kafka Streams ended", timeout=READY)
    assert said(counts, f"the webhook {webhook.url} answers 503")
    webhook.broken = False
    assert lab.settle(READY), counts
    assert set(webhook.taken) == {f"request {number}-5" for number in range(3)}
    assert newest(streams.output) == {f"request {number}-5": 5 for number in range(3)}
    assert streams.notices is not None
    assert keys(streams.notices) == Counter(f"request {number}-5" for number in range(3))


@pytest.mark.long
def test_a_frozen_pod_and_a_broker_that_is_killed_change_no_count() -> None:
    with Lab("streams", cluster="private") as lab:
        streams = counter(lab)
        counts = lab.deploy("counts", streams)
        lab.wait_ready(counts, timeout=READY)
        report(streams.commands, range(10), range(9), total=10)
        wait_counted(counts, 90)
        counts.pods[0].freeze()
        wait_until(lambda: members_of(lab.cluster, counts.group or "") == 0, 60, "the end of its session")
        counts.pods[0].recover()
        lab.broker.kill()
        lab.broker.recover()
        report(streams.commands, range(10), range(9, 10), total=10)
        assert lab.settle(READY), counts
        assert newest(streams.output) == {f"request {number}-10": 10 for number in range(10)}
        assert counts.restarts == 0
        lab.broker.kill()
        counts.drain()
        assert said(counts, "drained"), "without a Kafka it ends in bounded time, too"


def test_what_is_not_installed_is_told_before_a_pod_starts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = counter(lab)
    monkeypatch.setitem(sys.modules, "jpype", None)
    with pytest.raises(LabkitError, match=r"labkit\[streams\]"):
        lab.deploy("counts", streams)
    assert not lab.deployments
