"""Retry policies as data, names of topics, and headers that come from outside."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import lanes_topic, skips_topic
from labkit.patterns.dead_letters import dead_letters_topic
from labkit.patterns.own_topics import own_topic, taken_apart
from labkit.patterns.retries import (
    Policy,
    RetryingConsumer,
    blocking,
    dead_letter,
    exponential,
    retry_topics,
)
from labkit.patterns.retry_history import RetryHistory, parse

TOPIC = Topic(Cluster("127.0.0.1:1"), "shop.orders", 3, int)


def delays(policy: Policy, attempts: int) -> list[float | None]:
    return [policy.blocks.delay(attempt) for attempt in range(1, attempts + 1)]


def test_delays_are_what_was_said() -> None:
    """correctness 13"""
    assert delays(blocking(1, 5, 30), 5) == [1, 5, 30, None, None]
    assert delays(blocking(exponential(0.5, cap=3)), 5) == [0.5, 1, 2, 3, 3]
    assert delays(blocking(exponential(0.5, cap=3, times=2)), 3) == [0.5, 1, None]
    assert blocking(exponential(0.1, cap=60)).blocks.delay(10_000) == 60
    assert retry_topics(1, 10).topics == (1, 10)
    assert retry_topics(0, 0.0004, 0.07, 1.2345).topics == (0, 0.001, 0.07, 1.235)  # as names of topics can tell it
    assert delays(dead_letter(), 1) == [None]


def test_policies_follow_each_other() -> None:
    both = blocking(0.1, non_retriable=(ValueError,)).then(retry_topics(1, 10, non_retriable=[KeyError]))
    assert both == Policy(blocking(0.1).blocks, (1, 10), (ValueError, KeyError))
    assert both.then(dead_letter()) == both
    assert retry_topics(1).then(retry_topics(2)) == retry_topics(1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blocking(), "at least one delay"),
        (lambda: retry_topics(), "at least one delay"),
        (lambda: blocking(-1), "from 0 to"),
        (lambda: retry_topics(1, -0.5), "from 0 to"),
        (lambda: blocking(float("nan")), "from 0 to"),
        (lambda: retry_topics(float("inf")), "from 0 to"),
        (lambda: blocking("1"), "from 0 to"),  # type: ignore[arg-type]
        (lambda: blocking(True), "from 0 to"),
        (lambda: blocking(1, exponential(1, 2)), "one exponential"),
        (lambda: exponential(0, 5), "0 < first"),
        (lambda: exponential(5, 1), "0 < first"),
        (lambda: exponential(1, 5, times=0), "times ≥ 1"),
        (lambda: blocking(exponential(1, 2)).then(retry_topics(1)), "nothing follows a policy that blocks for ever"),
        (lambda: retry_topics(1).then(blocking(1)), "comes first"),
        (lambda: blocking(1).then(blocking(1)), "comes first"),
        (lambda: blocking(1, non_retriable=["ValueError"]), "types of errors"),  # type: ignore[list-item]
    ],
)
def test_a_policy_that_makes_no_sense_is_told(make: Any, message: str) -> None:
    with pytest.raises(LabkitError, match=message):
        make()


def test_delays_of_nothing_and_of_a_million_seconds_are_delays() -> None:
    assert blocking(0).blocks.delay(1) == 0
    assert retry_topics(0, 1_000_000).topics == (0, 1_000_000)


def test_a_consumer_has_topics_of_its_own_with_its_group_in_their_names() -> None:
    """correctness 12"""
    consumer = RetryingConsumer(TOPIC, print, "billing", retry=retry_topics(0.1, 10, 10))
    assert [topic.name for topic in consumer.sources] == [
        "shop.orders",
        *("shop.orders_billing_replay", "shop.orders_billing_retry1-100ms"),
        *("shop.orders_billing_retry2-10s", "shop.orders_billing_retry3-10s"),
    ]
    assert {topic.partitions for topic in consumer.sources} == {3}
    other = RetryingConsumer(TOPIC, print, "shipping", retry=retry_topics(0.1, 10, 10))
    assert {one.name for one in consumer.sources} & {one.name for one in other.sources} == {"shop.orders"}
    assert RetryingConsumer(TOPIC, print).sources == (TOPIC,)  # a lab names the group later


def test_no_two_groups_or_topics_share_a_name() -> None:
    """correctness 12: whatever Kafka allows in the name of a group."""
    groups = ["b", "b_c", "b-c", "b.c", "b c", "b/c", "ü", "x" * 300, "x" * 301]
    names = [own_topic(topic, group, "replay") for topic in ("a", "a_b", "a.b", "a-b") for group in groups]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 249 and set(name) <= set("abcxreply.-_0123456789def") for name in names)
    with pytest.raises(LabkitError, match="too long"):
        RetryingConsumer(Topic(TOPIC.cluster, "t" * 240, 1, int), print, "billing")


def test_no_two_names_of_own_topics_are_the_same_to_kafka() -> None:
    """correctness 12: it takes "." and "_" for the same, and refuses the second of two topics that differ by that."""
    parts = [part for length in (1, 2, 3) for part in itertools.product(("shop", "eu", "bills"), repeat=length)]
    groups = [".".join(part) for part in parts] + ["eu-bills", "eu bills"]
    whose: dict[str, tuple[str, str]] = {}
    for part in parts:
        for topic in {".".join(part), "_".join(part)}:  # beside each other these two cannot be
            for group in groups:
                name = own_topic(topic, group, "replay")
                assert whose.setdefault(name.replace(".", "_"), ("_".join(part), group)) == ("_".join(part), group)
                assert taken_apart(name) == (topic, group if " " not in group else name.split("_")[-2])


@pytest.mark.parametrize(
    ("topic", "group"),
    [
        *(("orders", "billing"), ("shop.orders", "billing"), ("shop_orders", "billing"), ("orders", "orders")),
        *(("shop.orders", "shop.billing"), ("labkit.ada.a.1.orders", "labkit.ada.a.1.billing")),
    ],
)
def test_usual_names_are_put_together_as_they_are(topic: str, group: str) -> None:
    assert own_topic(topic, group, "replay") == f"{topic}_{group}_replay"


def test_a_topic_of_a_group_tells_whose_it_is() -> None:
    for group in ("labkit.ada.bills", "shop.bills"):
        _, *own = RetryingConsumer(TOPIC, print, group, retry=retry_topics(0.1, 10)).sources
        own += [make(TOPIC, group) for make in (dead_letters_topic, lanes_topic, skips_topic)]
        assert [taken_apart(topic.name) for topic in own] == [("shop.orders", group)] * 6
    for other in ("shop.orders", "labkit.ada.bills_lanes", "a_labkit.ada.bills", "a_labkit.ada.bills_lanes_v2"):
        assert taken_apart(other) == ("", "")


def test_batches_are_refused_when_it_is_made() -> None:
    """Not by each pod that should run it, again and again."""
    for retry in (blocking(1), retry_topics(1), dead_letter()):
        with pytest.raises(LabkitError, match=r"one by one.*leave out batch"):
            RetryingConsumer(TOPIC, print, "g", retry=retry, batch=10)


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(LabkitError, match="is a policy, such as"):
        RetryingConsumer(TOPIC, print, "g", retry=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "broken",
    [
        *(None, b"", b"\xff\xfe", b"{", "[]", "3", "[" * 100_000, json.dumps({"topic": "t"})),
        json.dumps({"topic": "t", "partition": -1, "offset": 0, "timestamp": 0, "group": "g"}),
        json.dumps({"topic": "t", "partition": 0, "offset": 0, "timestamp": 0, "group": "g", "attempts": 10**40}),
        json.dumps({"topic": "t", "partition": 0, "offset": 0, "timestamp": 0, "group": "g", "attempts": "x"}),
        json.dumps({"topic": "t", "partition": 0, "offset": 0, "timestamp": 0, "group": "g", "failed": [0] * 51}),
        json.dumps({"topic": "t", "partition": 0, "offset": 0, "timestamp": 0, "group": "g", "due": 1e300}),
    ],
)
def test_a_header_that_does_not_hold_counts_as_none(broken: Any) -> None:
    """correctness 16"""
    assert parse(broken) is None


def test_a_header_that_holds() -> None:
    told = {"topic": "t", "partition": 1, "offset": 2, "timestamp": 3.5, "group": "g", "new": "field"}
    assert parse(json.dumps(told)) == RetryHistory("t", 1, 2, 3.5, "g")
