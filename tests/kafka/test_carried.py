"""What a failed record carries: it comes back as it was, whatever it holds and however large it is."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer as Client
from consuming import Member, fresh_group, fresh_topic
from processes import wait_until

from labkit.kafka.clients import forget
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import DeliveryFailed, LabkitError
from labkit.kafka.producer import POD
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import BlockedLanes
from labkit.patterns.dead_letters import DeadLetter, DeadLetters, dead_letters_topic
from labkit.patterns.retries import RetryingConsumer, blocking, dead_letter, retry_topics

BROKER_MAX = 1_048_588  # bytes that a topic takes by default
FRAME = 72  # bytes that Kafka adds to a value of 1 MB without key and headers

HEADERS: list[tuple[str, bytes | None]] = [
    *(("a", b"1"), ("retry", b"mine"), ("b", b"\xff\x00"), ("a", b"2"), ("null", None), ("cause", b"mine")),
    *(("empty", b""), ("pod", b"mine"), ("correlation-id", b"\xfe"), ("a", b"1"), ("\N{SNOWMAN}", b"x")),
]


def write(topic: Topic[Any], value: bytes | None, key: bytes | None = None, headers: Any = None, **config: Any) -> None:
    """As somebody else's service would: nothing is added."""
    told: list[Any] = []
    client = Client(topic.cluster.config({"message.max.bytes": 100_000_000, **config}))
    client.produce(topic.name, value, key, headers=headers, on_delivery=lambda error, _: told.append(error))
    client.flush(20)
    if [error for error in told if error is not None] or not told:
        raise DeliveryFailed(topic.name)


def refuse(record: Record[Any]) -> None:
    raise ConnectionError("no answer")


@pytest.fixture
def pod(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Records say which pod made them."""
    monkeypatch.setenv(POD, "shop-1")
    forget(cluster)
    yield
    forget(cluster)


def carried(message: Any) -> tuple[Any, ...]:
    """What of a record is its sender's."""
    own = [(name, value) for name, value in message.headers() or [] if not name.startswith("labkit-")]
    return message.key(), message.value(), own


@pytest.mark.parametrize("headers", [HEADERS, []], ids=["many", "none"])
def test_key_value_and_headers_come_back_byte_for_byte(
    cluster: Cluster, pod: None, headers: list[tuple[str, bytes | None]]
) -> None:
    """correctness 18: through a retry topic, the dead letters and a replay; in order, repeated, null, or no text."""
    topic, group = fresh_topic(cluster), fresh_group()
    sent = (b"k", b" 7", headers)
    write(topic, sent[1], sent[0], headers)
    with (
        Member(RetryingConsumer(topic, refuse, group, retry=retry_topics(0.05)).prepare()) as member,
        DeadLetters(topic, group) as queue,
    ):
        wait_until(lambda: len(queue) == 1, 20, "the dead letter")
        queue.replay()
        failures = member.journal.wait_for(Step.FAILED, 4)
    assert [carried(failure.message) for failure in failures] == [sent] * 4
    assert len({failure.topic for failure in failures}) == 3


@pytest.mark.parametrize("value", [None, b"", b"\xff\x00{"], ids=["null", "empty", "bytes"])
def test_a_value_that_is_null_empty_or_no_text_comes_back_as_it_was(cluster: Cluster, value: bytes | None) -> None:
    """A null value takes an entry out of the queue, and so needs another form there."""
    topic, group = fresh_topic(cluster), fresh_group()
    write(topic, value, b"\xfe")
    with (
        Member(RetryingConsumer(topic, refuse, group, retry=dead_letter()).prepare()) as member,
        DeadLetters(topic, group) as queue,
    ):
        wait_until(lambda: len(queue) == 1, 20, "the dead letter")
        with Reader(dead_letters_topic(topic, group)) as reader:  # as `lab.records` shows it
            (record,) = reader.read_to_end()
        (letter,) = queue.values()
        assert record.value == letter
        assert (letter.value is None) == (value is None)
        queue.replay()
        failures = member.journal.wait_for(Step.FAILED, 2)
        wait_until(lambda: [one.attempts for one in queue.values()] == [2], 20, "the second failure")
    assert [carried(failure.message) for failure in failures] == [(b"\xfe", value, [])] * 2


def words() -> bytes:
    """3 MB of text as JSON, which compresses well."""
    dice = random.Random(7)
    return json.dumps(" ".join(f"customer {dice.randrange(1000)}" for _ in range(230_000))).encode()


LARGE = {
    "binary": lambda: os.urandom(300_000),
    "quotes": lambda: json.dumps('"' * 450_000).encode(),  # and each of its bytes doubles as JSON in JSON
    "compressed": words,
    "exact": lambda: os.urandom(BROKER_MAX - FRAME),
}


@pytest.mark.parametrize("kind", LARGE)
def test_what_fitted_its_topic_can_be_set_aside_and_replayed(cluster: Cluster, kind: str) -> None:
    """correctness 18: whatever its size is, what is told about it does not make it too large."""
    topic, group, value = fresh_topic(cluster, value=str), fresh_group(), LARGE[kind]()
    write(topic, value, **{"compression.type": "gzip"} if kind == "compressed" else {})
    if kind == "exact":
        with pytest.raises(DeliveryFailed):
            write(topic, value + b"x")
    with (
        Member(RetryingConsumer(topic, refuse, group, retry=retry_topics(0.05)).prepare()) as member,
        DeadLetters(topic, group) as queue,
    ):
        wait_until(lambda: len(queue) == 1 or member.journal.of(Step.BLOCKED), 20, "the dead letter")
        assert [str(failed.refused) for failed in member.journal.of(Step.BLOCKED)] == []
        before = len(member.journal.of(Step.FAILED))
        queue.replay()
        failures = member.journal.wait_for(Step.FAILED, before + 1)
        wait_until(lambda: [one.attempts for one in queue.values()] == [2 * before], 20, "the same again")
    assert all(failure.message.value() == value for failure in failures)


def test_the_queues_of_a_topic_for_larger_records_take_them_too(cluster: Cluster) -> None:
    topic, group = Topic(cluster, f"{fresh_topic(cluster).name}.large", 1, str), fresh_group()
    topic.create({"max.message.bytes": "3000000"})
    write(topic, value := os.urandom(2_900_000))
    with (
        Member(RetryingConsumer(topic, refuse, group, retry=dead_letter()).prepare()) as member,
        DeadLetters(topic, group) as queue,
    ):
        wait_until(lambda: len(queue) == 1 or member.journal.of(Step.BLOCKED), 20, "the dead letter")
        assert [one.raw_value for one in queue.values()] == [value]


def test_the_trace_of_a_skip_has_a_bounded_size(cluster: Cluster) -> None:
    """correctness 15: a large key is shown, and skipped, like any other."""
    topic, group = fresh_topic(cluster, value=str), fresh_group()
    write(topic, words(), b'"' * 700_000, **{"compression.type": "gzip"})
    with (
        Member(RetryingConsumer(topic, refuse, group, retry=blocking(300)).prepare()) as member,
        BlockedLanes(topic, group) as lanes,
    ):
        wait_until(lambda: len(lanes) == 1, 20, "the blocked record")
        (place,) = lanes
        lanes.skip(place)
        member.wait_committed({0: 1})
        (trace,) = lanes.skipped()
    assert (trace.key, len(trace.value or "")) == ('"' * 1000, 1000)


def test_what_is_no_dead_letter_disturbs_none(cluster: Cluster) -> None:
    """Whatever lies in the queue: it is neither shown nor replayed, and hides no other."""
    topic, group = fresh_topic(cluster), fresh_group()
    write(topic, b"1")
    kept = dead_letters_topic(topic, group)
    with (
        Member(RetryingConsumer(topic, refuse, group, retry=dead_letter()).prepare()),
        DeadLetters(topic, group) as queue,
    ):
        wait_until(lambda: len(queue) == 1, 20, "the dead letter")
        (letter,) = queue.values()
        for headers in (None, [("labkit-retry", b"{"), ("labkit-dead-letter", None)]):
            write(kept, b"1", b"elsewhere/0/0", headers)
        with Reader(kept) as reader:
            stored = next(one for one in reader.read_to_end() if isinstance(one.value, DeadLetter))
            assert len(reader.poison) == 2
        write(kept, b"1", b"elsewhere/0/1", stored._message.headers())  # it says that it came from elsewhere
        wait_until(lambda: len(queue.store.unreadable) == 2, 20, "what is none")
        assert list(queue) == [f"{topic.name}/0/0"]
        with pytest.raises(LabkitError, match="whole records"):
            queue.store.put(letter.place, letter)
