"""Sending records: one idempotent producer for each process and cluster, confirmed at `flush`.

The header `correlation-id` goes from record to record, end to end, for tracing only; one that a record is sent with is
kept. A record sent in a handler also says which record caused it (`labkit-cause`) and which pod made it (`labkit-pod`).
By these a verdict tells a redelivery from a mistake. All other headers are the sender's own.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TypeAlias

import msgspec
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import Message as Report
from confluent_kafka import Producer as Client

from labkit.kafka.clients import kept
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import DeliveryFailed, LabkitError, TopicMissing
from labkit.kafka.records import CAUSE, CORRELATION, MADE_BY, Record

Headers: TypeAlias = Mapping[str, str | bytes | None] | Sequence[tuple[str, str | bytes | None]]
"""By name; or as a list, in which a name may occur twice."""

RawHeaders: TypeAlias = list[tuple[str, bytes | None]]

OnDelivery: TypeAlias = Callable[[str | None, int, int], None]
"""Called with a delivery report: why the record was refused (None: it was not), its partition and offset."""


class Output(msgspec.Struct, eq=False, gc=False):
    """A record that a handler has sent, held until the handler has returned, or until the commit."""

    topic: str
    value: bytes | None
    key: bytes | None
    partition: int
    headers: RawHeaders


class HandlerContext:
    """The handler's call that a thread is in: the record that it handles, and what it has sent so far.

    The consumer's worker fills it. Only the handler's own thread may send in it. What is sent by `producer` is held,
    and confirmed before a commit. Any other producer sends at once, or is refused for the reason in `refuses`.
    """

    __slots__ = ("collecting", "outputs", "producer", "record", "refuses", "thread")

    def __init__(
        self, producer: Producer | None = None, record: Record[object] | None = None, refuses: str | None = None
    ) -> None:
        self.producer = producer
        self.record = record
        self.refuses = refuses
        self.collecting = False  # True while the handler runs: what it sends is held
        self.outputs: list[Output] = []
        self.thread = threading.get_ident()

    def take(self) -> list[Output]:
        """Take out what was sent in it."""
        outputs, self.outputs, self.collecting = self.outputs, [], False
        return outputs


# Its object is changed, because setting the variable itself for every record takes longer than calling a handler.
NOBODY = HandlerContext()  # of a thread that is in no handler
handling: ContextVar[HandlerContext] = ContextVar("handling", default=NOBODY)

# What the client takes at most: its default, 1,000,000 bytes, and labkit's own headers. Brokers take 1,048,588.
MESSAGE_MAX_BYTES = 1_040_000
COPY_MAX_BYTES = 1_000_000_000  # for copies: as large as possible, because their topic may compress them
OVERHEAD = 100  # bytes of a record beside its value, key and headers; the client counts some 40
PROPAGATION = 3.0  # seconds for a new topic to be known everywhere
UNKNOWN = 1 << 31  # stands for the partitions of a topic when no broker answers
ASK_AGAIN, FOREVER = 30.0, 1e9  # seconds for which an answer is kept
OUTAGE = 600.0  # seconds for which what a process has sent waits for a broker that is away
POLL = 500  # records from one `poll` to the next
POD = "LABKIT_POD"  # environment variable: the pod's name, put into what it sends


class Producer:
    """An idempotent producer: the broker drops what the client sends twice, and keeps each partition's order.

    `send` only queues. A record that the broker refuses, or does not confirm in `timeout` seconds, makes the next
    `flush` raise DeliveryFailed.

    With `idempotent=False` a record may arrive twice. Only with `reports` may `send` be given `on_delivery`.

    With `copies` it sends copies of records from Kafka: it compresses them, lets the broker check their size, and adds
    no correlation id.
    """

    def __init__(
        self,
        cluster: Cluster,
        timeout: float = 30.0,
        idempotent: bool = True,
        reports: bool = False,
        copies: bool = False,
    ) -> None:
        self._max_bytes = COPY_MAX_BYTES if copies else MESSAGE_MAX_BYTES  # counted before compression
        own = {
            "message.max.bytes": self._max_bytes,
            "compression.type": "zstd" if copies else "none",
            "enable.idempotence": idempotent,
            "partitioner": "murmur2_random",  # where Java clients put the same key
            "linger.ms": 0 if reports and not copies else 2,  # somebody waits for each record whose report is asked for
            "delivery.report.only.error": not reports,  # a callback for each record costs up to half the speed
            "delivery.timeout.ms": int(timeout * 1000),
            "queue.buffering.max.messages": 1_000_000,
            "topic.metadata.refresh.interval.ms": 1000,
            "topic.metadata.propagation.max.ms": 3000,  # else a missing topic is reported after 30 s only
        }
        self.cluster = cluster
        self._client = Client(cluster.config(own))
        self._partitions: dict[str, tuple[int, float]] = {}  # by topic: how many, and until when that holds
        self.refused = 0
        """How many records were not delivered so far. `check` compares it with an earlier value."""
        self._copies = copies
        self._raised = 0  # how many of them `flush` has raised for
        self._reasons: deque[str] = deque(maxlen=3)
        self._failing = threading.Lock()
        self._pod = os.environ.get(POD, "").encode()
        self._prefix, self._count = uuid.uuid4().hex[:12].encode(), itertools.count(1)

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: str | bytes | None = None,
        headers: Headers | None = None,
        partition: int = -1,
        on_delivery: OnDelivery | None = None,
    ) -> None:
        """Queue one record. Blocks only while the client's buffer is full. Raises DeliveryFailed when it stays full.

        In a handler the record is held until the handler has returned: a handler that raises has sent nothing. What
        cannot be sent is refused here. Raises TopicMissing; LabkitError for a partition that does not exist, a record
        that is too large, and a thread that is not the handler's own.

        `on_delivery` gets the delivery report, in the thread that calls `poll` or sends. Such a record is not held, and
        `flush` does not raise for it. An exactly-once handler is refused what cannot be held.
        """
        context = handling.get()
        ours = context.producer is self and on_delivery is None
        if context.collecting and context.refuses and not ours:
            raise LabkitError(f"{topic}: {context.refuses}")
        if on_delivery is None and context is not NOBODY and context.thread != threading.get_ident():
            raise LabkitError(
                f"{topic}: only the handler's own thread may send. Send in the handler"
                + ("" if context.refuses else ", or start the thread without a copy of its context")
            )
        if context.collecting and ours:
            context.outputs.append(self.output(topic, value, key, headers, partition))
        else:
            self.release(self._made(topic, value, key, headers, partition), on_delivery)

    def output(
        self,
        topic: str,
        value: bytes | None,
        key: str | bytes | None = None,
        headers: Headers | None = None,
        partition: int = -1,
    ) -> Output:
        """A record as `send` would hold it: checked, and not sent. Raises TopicMissing, LabkitError."""
        made = self._made(topic, value, key, headers, partition)
        self._check(made)
        return made

    def _made(
        self,
        topic: str,
        value: bytes | None,
        key: str | bytes | None,
        headers: Headers | None,
        partition: int,
    ) -> Output:
        number = next(self._count)
        if number % POLL == 1:
            self._client.poll(0)
            if number == 1:
                self._connect(topic)
        cause = handling.get().record
        given = _raw(headers) if headers else []
        own: dict[str, bytes] = {}
        if not given or CORRELATION not in dict(given):
            correlation = None if cause is None else dict(cause.raw_headers).get(CORRELATION)
            if correlation is not None:
                own[CORRELATION] = correlation
            elif not self._copies:
                own[CORRELATION] = b"%b-%d" % (self._prefix, number)
        if cause is not None:
            own[CAUSE] = cause.place.encode()
        if self._pod:
            own[MADE_BY] = self._pod
        wire: RawHeaders = [*(one for one in given if one[0] not in own), *own.items()] if given else [*own.items()]
        return Output(topic, value, key.encode() if isinstance(key, str) else key, partition, wire)

    def release(self, output: Output, on_delivery: OnDelivery | None = None) -> None:
        """Queue what was held. Raises DeliveryFailed."""
        o, topic = output, output.topic
        report = self._report if on_delivery is None else partial(_tell, on_delivery)
        for wait in (0.1, 1.0, 10.0, 0.0):
            try:
                # By position (value, key, partition, on_delivery, timestamp, headers): names cost a tenth of a send.
                self._client.produce(topic, o.value, o.key, o.partition, report, None, 0, o.headers)  # type: ignore[arg-type]
                return
            except BufferError:
                self._client.poll(wait)
            except KafkaException as error:
                raise DeliveryFailed(f"{topic}: {error.args[0].str()}") from error
        raise DeliveryFailed(
            f"{topic}: the buffer of {len(self._client):,} unsent records stays full: is the broker up?"
        )

    def _check(self, output: Output) -> None:
        """Refuse what cannot be sent now, so that the handler fails: later nobody knows which record caused it."""
        topic, size, partition = output.topic, _size(output), output.partition
        if size > self._max_bytes:
            raise LabkitError(f"{topic}: a record of {size:,} bytes is too large: {self._max_bytes:,} are allowed")
        known, until = self._partitions.get(topic, (0, 0.0))
        if partition >= known or time.monotonic() > until:
            known = self._ask_partitions(topic)
        if not -1 <= partition < known:
            raise LabkitError(f"{topic} has {known} partitions: there is no partition {partition}")

    def _ask_partitions(self, topic: str) -> int:
        """How many partitions a topic has. A broker that does not answer refuses nothing. Raises TopicMissing."""
        until = time.monotonic() + PROPAGATION
        while True:
            try:
                found = self._client.list_topics(topic, timeout=1.0).topics[topic]
            except KafkaException:
                known = UNKNOWN
                break
            if known := len(found.partitions):
                break
            if time.monotonic() > until:  # a new topic is known everywhere by now
                raise TopicMissing(f"topic {topic} does not exist at {self.cluster.bootstrap}: create it first")
            time.sleep(0.05)
        self._partitions[topic] = (known, time.monotonic() + (ASK_AGAIN if known == UNKNOWN else FOREVER))
        return known

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until the broker has confirmed all that was sent so far.

        In a handler that has sent something it raises LabkitError: what was sent goes out after the handler.
        Raises DeliveryFailed: for records that were refused, with their number and the first reasons, or when some are
        still unconfirmed after `timeout` seconds.
        """
        context = handling.get()
        if context.collecting and context.refuses:
            raise LabkitError(f"flush: {context.refuses}")
        if context.collecting and context.outputs and context.producer is self:
            raise LabkitError(
                "flush: what a handler has sent goes out when the handler has returned, and is confirmed before its "
                "record is committed. Leave flush out; deliver() sends at once and waits"
            )
        left = self._client.flush(timeout)
        self.raise_failures()
        if left:
            raise DeliveryFailed(
                f"{left:,} records were not confirmed within {timeout:g} s: is the broker up? They may still arrive"
            )

    def unconfirmed(self, wait: float) -> int:
        """How many records are unconfirmed after at most `wait` seconds."""
        return int(self._client.flush(wait))

    def _connect(self, topic: str) -> None:
        """Find the broker before the first record: the client asks for the id by which the broker knows an idempotent
        producer every 0.5 s only, and the first time before it has a connection."""
        with suppress(KafkaException):  # the broker is away: the record waits for it
            self._client.list_topics(topic, timeout=0.5)

    def poll(self, wait: float = 0.0) -> None:
        """Have `on_delivery` called for what is known by now, or becomes known within `wait` seconds."""
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


def _raw(headers: Headers) -> RawHeaders:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return [(name, one.encode() if isinstance(one, str) else one) for name, one in pairs]


def _size(output: Output) -> int:
    """The bytes that the client counts for a record, or a few more."""
    rest = sum(len(name) + len(one or b"") + 10 for name, one in output.headers)
    return len(output.value or b"") + len(output.key or b"") + rest + OVERHEAD


def _tell(on_delivery: OnDelivery, error: KafkaError | None, message: Report) -> None:
    on_delivery(None if error is None else error.str(), message.partition() or 0, message.offset() or 0)


def producer(cluster: Cluster, reports: bool = False, copies: bool = False) -> Producer:
    """The process's one producer for `cluster`: what one thread sends, another one's `flush` confirms.

    With `reports` another one, of which each sender hears what became of its own records; with `copies` too, one for
    records as they were before.
    """
    return kept(_producer, cluster, reports, copies)


def _producer(cluster: Cluster, reports: bool, copies: bool) -> Producer:
    # Who hears of each of its records can send it again; of the others a time-out would end the consumer.
    return Producer(cluster, 30.0 if reports else OUTAGE, reports=reports, copies=copies)


def deliver(
    cluster: Cluster,
    topic: str,
    records: Iterable[
        tuple[bytes | None, str | bytes | None, Headers | None]
        | tuple[bytes | None, str | bytes | None, Headers | None, int]
    ],
    timeout: float = 30.0,
    copies: bool = False,
) -> None:
    """Send these records (value, key, headers; and the partition, if not the key says it), and wait until each of them
    is confirmed, whatever else is sent.

    `flush` is the whole process's, and tells of a refusal only whoever calls it first. `copies` as of `producer`.
    Raises DeliveryFailed when some were refused, or not confirmed within `timeout` seconds: those may still arrive.
    """
    sender = producer(cluster, reports=True, copies=copies)
    known: list[str | None] = []  # why each was refused, None if it was not; filled by any thread that polls

    def on_delivery(refused: str | None, partition: int, offset: int) -> None:
        known.append(refused)

    sent = 0
    for sent, (value, key, headers, *to) in enumerate(records, 1):  # noqa: B007 - the last one counts
        sender.send(topic, value, key, headers, to[0] if to else -1, on_delivery)
    until = time.monotonic() + timeout
    while len(known) < sent and time.monotonic() < until:
        sender.poll(0.005)  # what others hear may be ours
    left = sent - len(known)
    refused = [why for why in known if why is not None]
    if refused:
        raise DeliveryFailed(f"{topic}: {len(refused):,} of {sent:,} records were refused: {refused[0]}")
    if left > 0:
        raise DeliveryFailed(
            f"{topic}: {left:,} of {sent:,} records were not confirmed within {timeout:g} s: is the broker up? "
            "They may still arrive"
        )


def end_transactions(cluster: Cluster, transactional_ids: Iterable[str], timeout: float = 30.0) -> None:
    """Abort what dead producers of these ids have left open, and shut those out that are not dead.

    Raises LabkitError when that is not done within `timeout` seconds.
    """
    for one in transactional_ids:
        try:
            Client(cluster.config({"transactional.id": one})).init_transactions(timeout)
        except KafkaException as error:
            raise LabkitError(
                f"the transaction of {one} at {cluster.bootstrap} could not be ended: {error.args[0].str()}"
            ) from error
