"""Running consumers in tests: in a thread whose steps are kept, or as a process that can be crashed and frozen."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka import ConsumerGroupState, KafkaException, TopicPartition, cimpl
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource  # type: ignore[attr-defined]
from processes import wait_until

from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import ClusterUnreachable
from labkit.kafka.lag import committed_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.topics import Topic

FOLDER = Path(__file__).parent


def fresh_topic(cluster: Cluster, partitions: int = 1, value: Any = int) -> Topic[Any]:
    """A topic nobody has used."""
    topic = Topic(cluster, f"test.{uuid.uuid4().hex[:12]}", partitions, value)
    topic.create()
    return topic


def fresh_group() -> str:
    """A group nobody has used."""
    return f"test-{uuid.uuid4().hex[:12]}"


class Untellable(Exception):
    """An error of which only the type can be told."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Untraceable(Untellable):
    """One whose traceback cannot be had either."""

    @property
    def __notes__(self) -> list[str]:
        raise RuntimeError("no notes")


def put_with_header(topic: Topic[Any], name: bytes) -> None:
    """A record with the value 0 and a header whose name only a client in another language could write."""
    client = ctypes.CDLL(cimpl.__file__)  # librdkafka, as Python's client has it
    for make in (client.rd_kafka_conf_new, client.rd_kafka_new, client.rd_kafka_headers_new):
        make.restype = ctypes.c_void_p
    client.rd_kafka_producev.argtypes = [ctypes.c_void_p]
    told = ctypes.create_string_buffer(500)
    settings, headers = ctypes.c_void_p(client.rd_kafka_conf_new()), ctypes.c_void_p(client.rd_kafka_headers_new(1))
    client.rd_kafka_conf_set(settings, b"bootstrap.servers", topic.cluster.bootstrap.encode(), told, 500)
    producer = ctypes.c_void_p(client.rd_kafka_new(0, settings, told, 500))
    client.rd_kafka_header_add(headers, name, ctypes.c_ssize_t(len(name)), b"", ctypes.c_ssize_t(0))
    to = (1, topic.name.encode())  # pairs of a number that says what follows, and that
    value = (4, b"0", ctypes.c_size_t(1))
    assert client.rd_kafka_producev(producer, *to, *value, 7, 2, 10, headers, 0) == 0, told.value
    assert client.rd_kafka_flush(producer, 20_000) == 0
    client.rd_kafka_destroy(producer)


def put(topic: Topic[Any], *values: Any, partition: int = -1, key: str | None = None) -> None:
    """Produce values as they are (bytes) or as JSON, and see them confirmed."""
    sender = _sender(topic.cluster)
    for value in values:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        sender.send(topic.name, raw, key, partition=partition)
    sender.flush()


@lru_cache
def _sender(cluster: Cluster) -> Producer:
    """Not the process's own producer, whose failures are the business of the consumers under test."""
    return Producer(cluster)


def committed(topic: Topic[Any], group: str) -> dict[int, int]:
    """The group's committed offset, for each partition that has one."""
    return {number: at for (name, number), at in committed_offsets(topic.cluster, group).items() if name == topic.name}


def commit(topic: Topic[Any], group: str, offset: int) -> None:
    """Commit an offset of partition 0, as a group of somebody else's client."""
    client = Client(topic.cluster.config({"group.id": group}))
    offsets = [TopicPartition(topic.name, 0, offset)]
    topic.cluster.ask(lambda _: client.commit(offsets=offsets, asynchronous=False))  # a coordinator may just be loading
    client.close()


def trim(topic: Topic[Any], before: int) -> None:
    """Delete the records of partition 0 before this offset, as retention does."""
    for future in admin(topic.cluster).delete_records([TopicPartition(topic.name, 0, before)]).values():
        future.result(10)


def make_anew(topic: Topic[Any]) -> None:
    """Delete the topic and make another one of its name."""
    topic.cluster.delete_topics([topic.name])
    topic.create()


def alter(topic: Topic[Any], config: dict[str, str]) -> None:
    """Change settings of a topic, and see that they are in force."""
    entries = [ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in config.items()]
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic.name, incremental_configs=entries)
    for future in admin(topic.cluster).incremental_alter_configs([resource]).values():
        future.result(10)
    wait_until(lambda: config.items() <= topic.cluster.topic_config(topic.name).items(), what="the new settings")


def members_of(cluster: Cluster, group: str) -> int | None:
    """How many members a group has; None while it changes, or is not there yet."""
    (future,) = admin(cluster).describe_consumer_groups([group]).values()
    try:
        found = future.result()
    except KafkaException:
        return None
    return len(found.members) if found.state in (ConsumerGroupState.STABLE, ConsumerGroupState.EMPTY) else None


class Journal:
    """Steps as they were told, in order; `wait` waits for what should come."""

    def __init__(self) -> None:
        self.steps: list[tuple[Step, Any]] = []
        self.changed = threading.Condition()
        self.ended = False

    def __call__(self, step: Step, subject: Any) -> None:
        with self.changed:
            self.steps.append((step, subject))
            self.changed.notify_all()

    def end(self) -> None:
        """Nothing more will come: whoever waits need not wait on."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def of(self, step: Step) -> list[Any]:
        """The subjects of one kind of step."""
        with self.changed:
            return [subject for one, subject in self.steps if one is step]

    def assigned(self) -> set[tuple[str, int]]:
        """What is assigned now."""
        held: set[tuple[str, int]] = set()
        with self.changed:
            for step, subject in self.steps:
                if step is Step.ASSIGNED:
                    held |= {(topic, number) for topic, number, _ in subject}
                elif step in (Step.REVOKED, Step.LOST):
                    held -= set(subject)
        return held

    def wait(self, condition: Callable[[], Any], timeout: float = 30.0, what: str = "") -> Any:
        """Wait until `condition()` holds; it is asked again at each step and every 50 ms."""
        until = time.monotonic() + timeout
        while not (found := condition()):
            with self.changed:
                if self.ended and not condition():
                    pytest.fail(f"the consumer ended before {what or 'what was waited for'}: {self.tail()}")
                if time.monotonic() > until:
                    faulthandler.dump_traceback(2)  # of all threads: who has not come back
                    pytest.fail(f"not within {timeout:g} s: {what or 'what was waited for'}: {self.tail()}")
                self.changed.wait(0.05)
        return found

    def wait_for(self, step: Step, count: int = 1, timeout: float = 30.0) -> list[Any]:
        """Wait until a step was told `count` times."""
        self.wait(lambda: len(self.of(step)) >= count, timeout, f"{count} × {step.value}")
        return self.of(step)

    def tail(self) -> str:
        return " · ".join(f"{step.value} {subject}" for step, subject in self.steps[-12:])


class Member:
    """A consumer that runs in a thread of this process; leaving the `with` block stops it and raises what it raised."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer, self.journal = consumer, Journal()
        self.stopping = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="member", daemon=True)

    def _run(self) -> None:
        try:
            self.consumer.run(self.stopping, self.journal)
        except BaseException as error:
            self.error = error
            traceback.print_exc()  # shown by a test that did not expect it
        finally:
            self.journal.end()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.stopping.set()
            self.thread.join(20)

    def stop(self, timeout: float = 20.0) -> None:
        """Stop it, and raise what it raised."""
        self.stopping.set()
        if error := self.ends(timeout):
            raise error

    def ends(self, timeout: float = 20.0) -> BaseException | None:
        """Wait for its end. What it raised is returned, and then counts as expected."""
        self.thread.join(timeout)
        assert not self.thread.is_alive(), f"still running after {timeout:g} s: {self.journal.tail()}"
        error, self.error = self.error, None
        return error

    def wait_committed(self, expected: dict[int, int], timeout: float = 30.0) -> None:
        """Wait until the broker, which may be away meanwhile, has these offsets of its first topic."""
        found: dict[int, int] = {}

        def reached() -> bool:
            with suppress(ClusterUnreachable):
                found.clear()
                found.update(committed(self.consumer.sources[0], self.consumer.group))
            return found == expected

        self.journal.wait(reached, timeout, f"committed offsets {expected}")


class Process:
    """A member in a process of its own (see `member.py`); leaving the `with` block ends it, frozen or not."""

    script = "member.py"

    def __init__(self, topic: Topic[Any], group: str, **options: Any) -> None:
        self.lines: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self.options = {"bootstrap": topic.cluster.bootstrap, "topic": topic.name, "group": group, **options}
        self.options.setdefault("partitions", topic.partitions)

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.popen = subprocess.Popen(
            [sys.executable, str(FOLDER / self.script), json.dumps(self.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.stderr = ""
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self.readers:
            reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()  # works on a frozen process too
        self.popen.wait(10)
        for reader in self.readers:
            reader.join(10)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with self.changed:
                self.lines.append(json.loads(line))
                self.changed.notify_all()

    def _read_errors(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.stderr += line

    def of(self, step: Step) -> list[Any]:
        """The subjects of one kind of step."""
        with self.changed:
            return [line["subject"] for line in self.lines if line["step"] == step.value]

    def wait_for(self, step: Step, count: int = 1, timeout: float = 20.0) -> list[Any]:
        """Wait until a step was told `count` times."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.of(step)) >= count, timeout):
                pytest.fail(f"not within {timeout:g} s: {count} × {step.value}: {self.lines[-12:]} {self.stderr}")
        return self.of(step)

    def freeze(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def ends(self, timeout: float = 20.0) -> int:
        """Wait for its end; its exit code."""
        code = self.popen.wait(timeout)
        for reader in self.readers:
            reader.join(10)
        return code


def crash_points(steps: Iterable[Step], first: set[tuple[Step, str]]) -> list[Any]:
    """Each step, with a kill -9 and with a freeze. Those that are not in `first` are of the second tier."""
    return [
        pytest.param(step, how, id=f"{step.value}-{how}", marks=() if (step, how) in first else pytest.mark.long)
        for step in steps
        for how in ("kill", "freeze")
    ]
