"""Pattern 2: how many notices a second reach pages, and how soon one does."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.bench import Bench, say
from benchmarks.browsers import Note, note
from benchmarks.report import Goal, Row
from labkit.kafka.producer import Producer
from labkit.kafka.records import encode
from labkit.kafka.topics import Topic
from labkit.runtime.broker import free_ports
from labkit.services.clients import direct

PARTITIONS = 4
NOTICES = 200_000
PAGES = (1, 100, 1000)
RATE, SECONDS = 1000, 20.0  # notices a second, and for how long
LISTENING = 100  # pages, meanwhile


class Process:
    """One of `browsers`, which ends with the `with` block. The block begins when it has said a first thing."""

    first: Any

    def __init__(self, role: str, **options: Any) -> None:
        self.role, self.options = role, options

    def __enter__(self) -> Self:
        script = Path(__file__).with_name("browsers.py")
        self.popen = subprocess.Popen(
            [sys.executable, "-P", str(script), self.role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(self.options) + "\n")
        self.popen.stdin.flush()
        try:
            self.first = self.hear()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self.popen:
            self.popen.kill()

    def cpu(self) -> float:
        """Seconds that it has computed: on a busy machine a better measure than time."""
        times = psutil.Process(self.popen.pid).cpu_times()
        return times.user + times.system

    def hear(self) -> Any:
        """What it says next."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, f"{self.role} ended with {self.popen.wait()}"
        return json.loads(line)


def notifications(bench: Bench) -> Iterator[Row]:
    """Notices to 1, 100 and 1,000 pages, against a bare aiohttp server that sends the same; how soon one arrives."""
    for pages in PAGES:
        found = bench.alternate({"notifications": lambda p=pages: ours(bench, p), "bare": lambda p=pages: theirs(p)})
        rate, peer = found["notifications"].rate, found["bare"].rate
        text = "peer: a bare aiohttp server that has the notices in memory, and encodes and sends them; "
        text += f"{NOTICES:,} of {len(encode(note(0, 0)))} bytes, spread over the pages, written to Kafka while the "
        text += "service is stopped, then from its first turn until a client by hand has the last"
        named = f"notifications: {pages:,} page{'s' if pages > 1 else ''}"
        yield Row(named, rate, "notices/s", peer, goal=Goal("≥", 0.8), note=text)
    runs = [delays(bench) for _ in range(bench.rounds)]
    half, most = (statistics.median(run[name] for run in runs) for name in ("p50 ms", "p99 ms"))
    text = f"from when a notice was due to be sent until its page has it; {RATE:,}/s, {LISTENING} pages, "
    text += f"{SECONDS:g} s × {bench.rounds}"
    yield Row("notifications: stage to browser, p50", half, "ms", goal=Goal("≤", 20), note=text)
    yield Row("notifications: stage to browser, p99", most, "ms", goal=Goal("≤", 100), note=text)


def serving(bench: Bench) -> tuple[Topic[Note], str, Process]:
    """A topic of its own, where the service answers, and its process."""
    topic: Topic[Note] = bench.topic("notices", PARTITIONS, Note)
    (port, *_), bootstrap = free_ports(), bench.cluster.bootstrap
    process = Process("service", port=port, bootstrap=bootstrap, topic=topic.name, partitions=PARTITIONS)
    return topic, f"http://127.0.0.1:{port}", process


def ours(bench: Bench, pages: int) -> float:
    """Notices a second."""
    topic, url, process = serving(bench)
    with process as service, Process("pages", url=url, pages=pages, notices=NOTICES) as browser:
        channels = browser.first
        os.kill(service.popen.pid, signal.SIGSTOP)
        producer = Producer(bench.cluster)
        for number in range(NOTICES):
            producer.send(topic.name, encode(note(number, 0)), channels[number % pages])
        producer.flush()
        began, before = time.monotonic(), service.cpu()
        os.kill(service.popen.pid, signal.SIGCONT)
        found = browser.hear()
        say(f"    the service's CPU: {service.cpu() - before:.2f} s")
    assert found["notices"] == NOTICES, found
    topic.cluster.delete_topics([topic.name])
    return float(NOTICES / (found["ended"] - began))


def theirs(pages: int) -> float:
    """The same of the bare server."""
    port = free_ports()[0]
    url = f"http://127.0.0.1:{port}"
    bare = Process("bare", port=port, notices=NOTICES)
    with bare as server, Process("pages", url=url, pages=pages, notices=NOTICES) as browser:
        before = server.cpu()
        with direct(f"{url}/tell", b"", timeout=300) as answer:
            began = json.load(answer)["began"]
        found = browser.hear()
        say(f"    the bare server's CPU: {server.cpu() - before:.2f} s")
    return float(NOTICES / (found["ended"] - began))


def delays(bench: Bench) -> dict[str, float]:
    """From a stage to its browser, at a steady rate."""
    topic, url, process = serving(bench)
    notices = int(RATE * SECONDS)
    with process, Process("pages", url=url, pages=LISTENING, notices=notices) as browser:
        channels = browser.first
        topic.send(note(0, 0), "nobody's channel")  # the producer connects, and knows the topic
        topic.flush()
        began = time.monotonic()
        for number in range(notices):
            due = began + number / RATE
            while (early := due - time.monotonic()) > 0:
                time.sleep(early)
            topic.send(note(number, int(due * 1e9)), channels[number % LISTENING])
        found: dict[str, float] = browser.hear()
    topic.cluster.delete_topics([topic.name])
    say(f"  stage to browser: p50 {found['p50 ms']:.1f} ms, p99 {found['p99 ms']:.1f} ms")
    return found
