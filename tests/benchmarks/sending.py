"""Sending, up to the broker's confirmation, against the raw producer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from confluent_kafka import KafkaError, Message
from confluent_kafka import Producer as RawProducer

from benchmarks.bench import Bench
from benchmarks.report import Goal, Row
from labkit.kafka.producer import Producer
from labkit.kafka.topics import Topic

RECORDS = 500_000
VALUE = b"v" * 200
KEYS = [f"customer {number}" for number in range(1000)]


def send(bench: Bench) -> Iterator[Row]:
    """Confirmed records of 200 bytes with one header, against the raw client with the same settings."""
    topic = bench.topic("sent", 4)
    ours, raw = Producer(topic.cluster), Raw(topic)
    ours.send(topic.name, VALUE)  # the first waits for the id that makes a producer idempotent
    ours.flush()
    raw.run(1)
    runs = {"labkit": lambda: RECORDS / labkit_producer(topic, ours), "raw client": lambda: RECORDS / raw.run(RECORDS)}
    found = bench.alternate(runs)
    topic.cluster.delete_topics([topic.name])
    mine, theirs = found["labkit"], found["raw client"]
    note = (
        f"peer: confluent-kafka with the same header, key, idempotence and reports; {RECORDS:,} records and a flush; "
    )
    note += f"CPU {mine.cpu:.1f} s, peer {theirs.cpu:.1f} s"
    yield Row("send: confirmed records", mine.rate, "records/s", theirs.rate, Goal("≥", 0.9), note)


def labkit_producer(topic: Topic[bytes], producer: Producer) -> float:
    """Seconds it takes."""
    began = time.perf_counter()
    for number in range(RECORDS):
        producer.send(topic.name, VALUE, KEYS[number % 1000])
    producer.flush()
    return time.perf_counter() - began


class Raw:
    """What one would write without labkit: every record has a correlation id of its own, and a refusal is an error."""

    def __init__(self, topic: Topic[bytes]) -> None:
        self.topic = topic
        self.refused = 0
        own = {
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "linger.ms": 2,
            "delivery.report.only.error": True,
            "delivery.timeout.ms": 30_000,
            "queue.buffering.max.messages": 1_000_000,
            "topic.metadata.refresh.interval.ms": 1000,
        }
        self.client = RawProducer(topic.cluster.config(own))

    def run(self, records: int) -> float:
        """Seconds it takes."""
        produce, name, prefix = self.client.produce, self.topic.name, uuid.uuid4().hex[:12]
        began = time.perf_counter()
        for number in range(records):
            header: list[tuple[str, str | bytes | None]] = [("correlation-id", f"{prefix}-{number}".encode())]
            produce(name, VALUE, KEYS[number % 1000], headers=header, on_delivery=self.reported)
            if number % 1000 == 0:
                self.client.poll(0)
        left = self.client.flush(30)
        assert not left, f"{left} records were not confirmed"
        assert not self.refused, f"{self.refused} records were refused"
        return time.perf_counter() - began

    def reported(self, error: KafkaError | None, _message: Message) -> None:
        self.refused += error is not None
