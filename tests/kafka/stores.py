"""Topics for stores, and stores in processes that can be frozen and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from confluent_kafka import Producer as Client

from labkit.kafka.cluster import Cluster
from labkit.kafka.lag import end_offsets
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic

FOLDER = Path(__file__).parent
COMPACTED = {"cleanup.policy": "compact"}
# As fast as Kafka compacts: each record gets a segment of its own, and whatever was written a moment ago is compacted.
EAGER = {
    **COMPACTED,
    "segment.ms": "100",
    "min.cleanable.dirty.ratio": "0.001",
    "max.compaction.lag.ms": "100",
    "delete.retention.ms": "1000",
}


def store_topic(
    cluster: Cluster, partitions: int = 2, value: Any = Any, config: dict[str, str] = COMPACTED, name: str = ""
) -> Topic[Any]:
    """A compacted topic nobody has used."""
    topic = Topic(cluster, name or f"test.{uuid.uuid4().hex[:12]}", partitions, value)
    topic.create(config)
    return topic


def raw(topic: Topic[Any], *records: tuple[bytes | None, bytes | None], partition: int = 0) -> None:
    """Write records as they are, and see them confirmed. `partition` -1: where their keys belong."""
    client = Client(topic.cluster.config({"queue.buffering.max.messages": 2_000_000, "partitioner": "murmur2_random"}))
    for key, value in records:
        client.produce(topic.name, value, key, partition)
    assert client.flush(60) == 0


def transaction(topic: Topic[Any], *records: tuple[str, Any], end: str = "commit", partition: int = 0) -> Client:
    """Write records in a transaction, which is committed, aborted or left open."""
    client = Client(
        topic.cluster.config({"transactional.id": f"test-{uuid.uuid4().hex}", "transaction.timeout.ms": 60_000})
    )
    client.init_transactions(20)
    client.begin_transaction()
    for key, value in records:
        client.produce(topic.name, json.dumps(value).encode(), key.encode(), partition)
    client.flush(10)
    if end == "commit":
        client.commit_transaction(20)
    elif end == "abort":
        client.abort_transaction(20)
    return client


def on_disk(topic: Topic[Any]) -> list[tuple[int, str | None, Any]]:
    """What a topic still holds: offset, key, value."""
    with Reader(topic) as reader:
        return [(record.offset, record.key, record.value) for record in reader.read_to_end()]


def compact(topic: Topic[Any], done: Callable[[], object], timeout: float = 60.0) -> None:
    """Write until Kafka has compacted what is asked for: only segments before the one that is written are touched."""
    until = time.monotonic() + timeout
    while not done():
        if time.monotonic() > until:
            pytest.fail(f"not compacted within {timeout:g} s: {on_disk(topic)}")
        for partition in range(topic.partitions):
            raw(topic, (b"roll", b"0"), partition=partition)
        time.sleep(0.15)  # longer than segment.ms, so that the next record begins a segment


def size(topic: Topic[Any]) -> int:
    """Offsets handed out so far."""
    return sum(end_offsets(topic.cluster, [topic.name]).values())


class StoreProcess:
    """A store in another process. Leaving the `with` block ends it, frozen or not."""

    def __init__(self, topic: Topic[Any], name: str = "other") -> None:
        self.options = {
            "bootstrap": topic.cluster.bootstrap,
            "topic": topic.name,
            "partitions": topic.partitions,
            "name": name,
        }

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, str(FOLDER / "store_member.py"), json.dumps(self.options)]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait(10)
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()

    def entries(self) -> int:
        """How many it found, once it is ready. To be asked first."""
        return int(self.hear())

    def say(self, *order: Any) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(order) + "\n")
        self.popen.stdin.flush()

    def hear(self) -> Any:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, f"the store's process ended with {self.popen.wait(10)}"
        return json.loads(line)

    def ask(self, *order: Any) -> Any:
        self.say(*order)
        return self.hear()

    def freeze(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.popen.send_signal(signal.SIGCONT)
