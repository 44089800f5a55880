"""Exactly once in tests: consumers in a slot, and what readers of their outputs see."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from consuming import fresh_group

from labkit.kafka.consumer import Consumer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.retries import Policy, RetryingConsumer

SETTINGS: dict[str, Any] = {"guarantee": "exactly once", "slot": "one", "commit_interval": 0.05}


def exactly_once(
    topic: Topic[Any] | list[Topic[Any]], handler: Callable[..., Any], group: str, **options: Any
) -> Consumer:
    """A consumer in slot "one", unless the options say otherwise."""
    return Consumer(topic, handler, group, **{**SETTINGS, **options})


def retrying(
    topic: Topic[Any], handler: Callable[[Any], Any], group: str, retry: Policy, **options: Any
) -> RetryingConsumer:
    """The same with retries."""
    return RetryingConsumer(topic, handler, group, retry=retry, **{**SETTINGS, **options})


def values(topic: Topic[Any], committed: bool = True) -> list[Any]:
    """What readers see, of committed records or of all, a partition in order of its offsets."""
    with Reader(topic, committed) as reader:
        return [record.value for record in reader.read_to_end()]


def visible(topic: Topic[Any]) -> int:
    """How many records of partition 0 a reader of committed records sees before it waits, for an open transaction too.

    (`values` waits for its end.)
    """
    own = {"group.id": fresh_group(), "enable.partition.eof": True}
    client = Client(topic.cluster.config({**own, "auto.offset.reset": "earliest"}))
    client.assign([TopicPartition(topic.name, 0, 0)])
    count = 0
    try:
        while message := client.poll(10.0):
            error = message.error()
            if error is not None:
                assert error.code() == KafkaError._PARTITION_EOF, error
                return count
            count += 1
        raise AssertionError("no end of the partition was told")
    finally:
        client.close()


class Committing:
    """Clients that write to all partitions of a topic, a transaction after the other, as long as the context lasts.

    Kafka may be killed meanwhile: once the context is left, they wait until it is back, and end.
    """

    def __init__(self, topic: Topic[Any], clients: int = 8) -> None:
        self.topic, self.committed, self.stop = topic, threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=self._commit, args=(name,), daemon=True) for name in range(clients)]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        assert self.committed.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()

    def join(self) -> None:
        """Wait for their ends."""
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)

    def _commit(self, name: int) -> None:
        settings = {"transactional.id": f"{self.topic.name}-{name}", "transaction.timeout.ms": 10_000}
        client = Producer(self.topic.cluster.config({**settings, "retry.backoff.ms": 1, "delivery.timeout.ms": 10_000}))
        with suppress(KafkaException):  # of a client whose broker is killed, maybe before it began
            client.init_transactions(30)
            while not self.stop.is_set():
                client.begin_transaction()
                for partition in range(self.topic.partitions):
                    client.produce(self.topic.name, b"1", partition=partition)
                client.commit_transaction(30)
                self.committed.set()


class Sending:
    """A handler that sends each record's value on, and counts its calls by value."""

    def __init__(self, output: Topic[Any]) -> None:
        self.output = output
        self.calls: dict[Any, int] = {}
        self.lock = threading.Lock()

    def __call__(self, record: Record[Any]) -> None:
        with self.lock:
            self.calls[record.value] = self.calls.get(record.value, 0) + 1
        self.output.send(record.value, key=record.key)
