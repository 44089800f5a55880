"""Sending records: one idempotent producer for each process and cluster, confirmed at `flush`.

The header `correlation-id` goes from record to record, end to end, for tracing only. A record sent in a handler also
says which record caused it (`cause`) and which pod made it (`pod`): that is how an audit tells a redelivery from
a mistake.
"""

from __future__ import annotations

import itertools
import os
import threading
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import Message as Report
from confluent_kafka import Producer as Client

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.records import Record

# The record being handled by this thread or task; set by the consumer loop.
handling: ContextVar[Record[object] | None] = ContextVar("handling", default=None)

POD = "LABKIT_POD"  # environment variable: the pod's name, put into what it sends


class Producer:
    """An idempotent producer: the broker drops what the client sends twice, and keeps each partition's order.

    `send` only queues. A record that the broker refuses, or does not confirm in `timeout` seconds, makes the next
    `flush` raise DeliveryFailed.
    """

    def __init__(self, cluster: Cluster, timeout: float = 30.0) -> None:
        own = {
            "enable.idempotence": True,
            "partitioner": "murmur2_random",  # where Java clients put the same key
            "linger.ms": 2,
            "delivery.report.only.error": True,  # a callback for each record costs up to half the speed
            "delivery.timeout.ms": int(timeout * 1000),
            "queue.buffering.max.messages": 1_000_000,
            "topic.metadata.refresh.interval.ms": 1000,
        }
        self._client = Client(cluster.config(own))
        self._failed: list[str] = []
        self._failing = threading.Lock()
        self._pod = os.environ.get(POD, "").encode()
        self._prefix, self._count = uuid.uuid4().hex[:12], itertools.count(1)

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        partition: int = -1,
    ) -> None:
        """Queue one record. Blocks only while the client's buffer is full. Raises DeliveryFailed when it stays full."""
        wire: list[tuple[str, str | bytes | None]] = (
            [(name, text.encode()) for name, text in headers.items()] if headers else []
        )
        cause = handling.get()
        correlation = None if cause is None else cause.headers.get("correlation-id")
        wire.append(("correlation-id", (correlation or f"{self._prefix}-{next(self._count)}").encode()))
        if cause is not None:
            wire.append(("cause", cause.place.encode()))
        if self._pod:
            wire.append(("pod", self._pod))
        raw_key = None if key is None else key.encode()
        for wait in (0.0, 0.1, 1.0, 10.0):
            self._client.poll(wait)
            try:
                self._client.produce(topic, value, raw_key, partition=partition, headers=wire, on_delivery=self._report)
                return
            except BufferError:
                continue
            except KafkaException as error:
                raise DeliveryFailed(f"{topic}: {error.args[0].str()}") from error
        raise DeliveryFailed(
            f"{topic}: the buffer of {len(self._client):,} unsent records stays full: is the broker up?"
        )

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until the broker has confirmed all that was sent so far.

        Raises DeliveryFailed: for records that were refused, with their number and the first reasons, or when some are
        still unconfirmed after `timeout` seconds.
        """
        left = self._client.flush(timeout)
        self.raise_failures()
        if left:
            raise DeliveryFailed(f"{left:,} records were not confirmed within {timeout:g} s: is the broker up?")

    def unconfirmed(self, wait: float) -> int:
        """How many records are unconfirmed after at most `wait` seconds. Raises DeliveryFailed for refused ones."""
        left = self._client.flush(wait)
        self.raise_failures()
        return int(left)

    def raise_failures(self) -> None:
        """Raise DeliveryFailed, once, for what was refused since the last call."""
        with self._failing:
            failed, self._failed = self._failed, []
        if failed:
            raise DeliveryFailed(f"{len(failed):,} records were not delivered: {'; '.join(sorted(set(failed))[:3])}")

    def _report(self, error: KafkaError | None, message: Report) -> None:
        if error is not None:
            with self._failing:
                self._failed.append(f"{message.topic()}: {error.str()}")


@lru_cache(maxsize=8)
def _producer(cluster: Cluster, _process: int) -> Producer:
    return Producer(cluster)


def producer(cluster: Cluster) -> Producer:
    """The process's one producer for `cluster`."""
    return _producer(cluster, os.getpid())
