"""Groups that do not take a member (correctness 37): it ends and says what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer as Client
from consuming import Member, fresh_group, fresh_topic
from lab_helpers import wait_said
from processes import wait_until

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.runtime.broker import Broker, prepare
from labkit.runtime.child import Child
from labkit.runtime.which_kafka import Connection


@contextmanager
def other_member(topic: Topic[Any], group: str, strategy: str) -> Iterator[None]:
    """Somebody else's client, in the group and with all partitions."""
    client = Client(topic.cluster.config({"group.id": group, "partition.assignment.strategy": strategy}))
    client.subscribe([topic.name])
    wait_until(lambda: client.poll(0.05) is None and client.assignment(), 20, "the other member's partitions")
    try:
        yield
    finally:
        client.close()


def refusal(topic: Topic[Any], group: str) -> str:
    """What a consumer says that ends as its group does not take it."""
    with Member(Consumer(topic, lambda record: None, group)) as member:
        error = member.ends(10)
    assert isinstance(error, LabkitError)
    assert f"the consumer of {group} cannot join its group" in str(error)
    return str(error)


def test_a_member_that_shares_partitions_out_in_another_way(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    with other_member(topic, group, "range"):
        assert "partition.assignment.strategy" in refusal(topic, group)


def test_pods_that_a_group_does_not_take_are_not_ready_and_say_why(connection: Connection) -> None:
    lab = Lab("not-joined")
    try:
        topic = lab.topic("orders", 2, int)
        shop = Consumer(topic, print, fresh_group())
        with other_member(topic, shop.group, "range"):
            deployed = lab.deploy("shop", shop)
            wait_said(deployed, "cannot join its group")
            with pytest.raises(LabkitError, match=r"partition\.assignment\.strategy"):
                lab.wait_ready(deployed, timeout=0)
        lab.wait_ready(deployed)
    finally:
        lab._end(0)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("group.max.size=1", "group.max.size"),
        pytest.param("group.min.session.timeout.ms=10000", "group.min.session.timeout.ms", marks=pytest.mark.long),
    ],
)
def test_what_a_broker_does_not_allow(tmp_path: Path, setting: str, word: str) -> None:
    kafka, folder = prepare(), tmp_path / "broker"
    broker = Broker.create(folder, kafka, extra=f"{setting}\n")
    with Child(kafka.command(folder), cwd=folder, output=broker.log) as child:
        broker.wait_until_ready(lambda: child.poll() is None)
        topic, group = fresh_topic(broker.cluster), fresh_group()
        with other_member(topic, group, "cooperative-sticky"):
            assert word in refusal(topic, group)
