"""Sending records: one idempotent producer for each process and cluster, confirmed at `flush`.

The header `correlation-id` goes from record to record, end to end, for tracing only. A record sent in a handler also
says which record caused it (`cause`) and which pod made it (`pod`): that is how an audit tells a redelivery from
a mistake.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TypeAlias

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import Message as Report
from confluent_kafka import Producer as Client

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.records import Record


class Hand:
    """What a thread or task has in hand: the record whose handler runs. The consumer loop fills it."""

    __slots__ = ("record",)

    def __init__(self, record: Record[object] | None = None) -> None:
        self.record = record


# An object that is changed, because setting the variable itself for every record takes longer than calling a handler.
handling: ContextVar[Hand] = ContextVar("handling", default=Hand())  # noqa: B039 - the default is never changed

Told: TypeAlias = Callable[[str | None, int, int], None]
"""Called once it is known what became of a record: why it was refused (None: it was not), its partition and offset."""

POLL = 500  # records from one look at what was refused to the next
POD = "LABKIT_POD"  # environment variable: the pod's name, put into what it sends


class Producer:
    """An idempotent producer: the broker drops what the client sends twice, and keeps each partition's order.

    `send` only queues. A record that the broker refuses, or does not confirm in `timeout` seconds, makes the next
    `flush` raise DeliveryFailed.

    With `idempotent=False` a record may arrive twice. Only with `tells` may `send` be given `told`.
    """

    def __init__(self, cluster: Cluster, timeout: float = 30.0, idempotent: bool = True, tells: bool = False) -> None:
        own = {
            "enable.idempotence": idempotent,
            "partitioner": "murmur2_random",  # where Java clients put the same key
            "linger.ms": 2,
            "delivery.report.only.error": not tells,  # a callback for each record costs up to half the speed
            "delivery.timeout.ms": int(timeout * 1000),
            "queue.buffering.max.messages": 1_000_000,
            "topic.metadata.refresh.interval.ms": 1000,
            "topic.metadata.propagation.max.ms": 3000,  # else a topic that is missing is told after 30 s only
        }
        self._client = Client(cluster.config(own))
        self.refused = 0
        """How many records were not delivered so far: who depends on them compares (see `check`)."""
        self._raised = 0  # how many of them `flush` has told of
        self._reasons: deque[str] = deque(maxlen=3)
        self._failing = threading.Lock()
        self._pod = os.environ.get(POD, "").encode()
        self._prefix, self._count = uuid.uuid4().hex[:12].encode(), itertools.count(1)

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: str | bytes | None = None,
        headers: Mapping[str, str | bytes | None] | Mapping[str, str] | None = None,
        partition: int = -1,
        told: Told | None = None,
    ) -> None:
        """Queue one record. Blocks only while the client's buffer is full. Raises DeliveryFailed when it stays full.

        `told` hears what became of it, from the thread that calls `hear` or sends; then it is no business of `flush`.
        """
        number = next(self._count)
        if number % POLL == 1:
            self._client.poll(0)
            if number == 1:
                self._connect(topic)
        cause = handling.get().record
        wire: dict[str, str | bytes | None] = dict(headers) if headers else {}
        if "correlation-id" not in wire:
            correlation = None if cause is None else cause.headers.get("correlation-id")
            wire["correlation-id"] = b"%b-%d" % (self._prefix, number) if correlation is None else correlation.encode()
        if cause is not None:
            wire["cause"] = cause.place.encode()
        if self._pod:
            wire["pod"] = self._pod
        raw_key = key.encode() if isinstance(key, str) else key
        report = self._report if told is None else partial(_tell, told)
        for wait in (0.1, 1.0, 10.0, 0.0):
            try:
                # By position (value, key, partition, on_delivery, timestamp, headers): names cost a tenth of a send.
                self._client.produce(topic, value, raw_key, partition, report, None, 0, wire)
                return
            except BufferError:
                self._client.poll(wait)
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
        """How many records are unconfirmed after at most `wait` seconds."""
        return int(self._client.flush(wait))

    def _connect(self, topic: str) -> None:
        """Find the broker before the first record: the client asks for the id by which the broker knows an idempotent
        producer every 0.5 s only, and the first time before it has a connection."""
        with suppress(KafkaException):  # the broker is away: the record waits for it
            self._client.list_topics(topic, timeout=0.5)

    def hear(self, wait: float = 0.0) -> None:
        """Have `told` called for what is known by now, or becomes known within `wait` seconds."""
        self._client.poll(wait)

    def raise_failures(self) -> None:
        """Raise DeliveryFailed, once, for what was refused since the last call."""
        with self._failing:
            before, self._raised = self._raised, self.refused
        self.check(before)

    def check(self, before: int) -> None:
        """Raise DeliveryFailed if records were refused since `refused` was `before`, whoever was told of them."""
        with self._failing:
            failed, reasons = self.refused - before, list(self._reasons)
        if failed > 0:
            why = "; ".join(sorted(set(reasons[-failed:])))
            raise DeliveryFailed(f"{failed:,} records were not delivered: {why}")

    def _report(self, error: KafkaError | None, message: Report) -> None:
        if error is not None:
            with self._failing:
                self.refused += 1
                self._reasons.append(f"{message.topic()}: {error.str()}")


def _tell(told: Told, error: KafkaError | None, message: Report) -> None:
    told(None if error is None else error.str(), message.partition() or 0, message.offset() or 0)


_producers: dict[tuple[Cluster, int, bool], Producer] = {}
_making = threading.Lock()


def producer(cluster: Cluster, tells: bool = False) -> Producer:
    """The process's one producer for `cluster`: what one thread sends, another one's `flush` confirms.

    With `tells` another one, of which each sender hears what became of its own records.
    """
    key = (cluster, os.getpid(), tells)
    found = _producers.get(key)
    if found is None:
        with _making:
            found = _producers.setdefault(key, _producers.get(key) or Producer(cluster, tells=tells))
    return found


def deliver(
    cluster: Cluster,
    topic: str,
    records: Iterable[tuple[bytes | None, str | bytes | None, Mapping[str, str] | None]],
    timeout: float = 30.0,
) -> None:
    """Send these records (value, key, headers), and wait until each of them is confirmed, whatever else is sent.

    `flush` is the whole process's, and tells of a refusal only whoever calls it first. Raises DeliveryFailed when some
    were refused, or not confirmed within `timeout` seconds: those may still arrive.
    """
    sender = producer(cluster, tells=True)
    known: list[str | None] = []  # why each was refused, None if it was not; told from any thread that listens

    def told(refused: str | None, partition: int, offset: int) -> None:
        known.append(refused)

    sent = 0
    for sent, (value, key, headers) in enumerate(records, 1):  # noqa: B007 - the last one counts
        sender.send(topic, value, key, headers, told=told)
    until = time.monotonic() + timeout
    while len(known) < sent and time.monotonic() < until:
        sender.hear(0.005)  # what others hear may be ours
    left = sent - len(known)
    refused = [why for why in known if why is not None]
    if refused:
        raise DeliveryFailed(f"{topic}: {len(refused):,} of {sent:,} records were refused: {refused[0]}")
    if left > 0:
        raise DeliveryFailed(
            f"{topic}: {left:,} of {sent:,} records were not confirmed within {timeout:g} s: is the broker up? "
            "They may still arrive"
        )


def let_go(cluster: Cluster) -> None:
    """Forget the process's producers for `cluster`, with what they have not sent."""
    with _making:
        for tells in (False, True):
            _producers.pop((cluster, os.getpid(), tells), None)
