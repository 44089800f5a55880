"""Exactly once when Kafka says no, or a request or its answer is lost: at each request of a transaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka import Producer as Other
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AclOperation, ResourceType  # type: ignore[attr-defined]
from consuming import Member, Process, committed, fresh_group, fresh_topic, put
from processes import wait_until
from secured import allow, broker_with_acls, forbid
from transacting import Sending, exactly_once, values

import labkit.kafka.consumer.transactional_client as client_module
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import DeliveryFailed, LabkitError
from labkit.kafka.topics import Topic
from labkit.runtime.private_broker import PrivateBroker
from labkit.runtime.proxy import Proxy

# -- a connection that breaks: (request, what happens to it)

REQUESTS = ["InitProducerId", "AddOffsetsToTxn", "TxnOffsetCommit", "AddPartitionsToTxn", "Produce", "EndTxn"]
FAULTS = ["is lost", "has its answer lost", "is never answered"]
BREAKS = [pytest.param(name, fault, id=f"{name} {fault}") for name in REQUESTS for fault in FAULTS]


@pytest.fixture(scope="module")
def broker(state_dir: object) -> Iterator[PrivateBroker]:
    with PrivateBroker() as broker:
        yield broker


@pytest.fixture
def proxy(broker: PrivateBroker) -> Iterator[Proxy]:
    yield broker.proxy
    broker.proxy.recover()


@pytest.mark.long  # test_transactions_faults.py has a commit without an answer
@pytest.mark.parametrize(("name", "fault"), BREAKS)
def test_a_request_that_gets_lost_on_its_way_loses_and_doubles_nothing(
    broker: PrivateBroker, proxy: Proxy, name: str, fault: str
) -> None:
    """correctness 21, 39: the process goes on, or it ends and its successor does, as a deployment starts it."""
    topic, output, group = fresh_topic(broker.cluster), fresh_topic(broker.cluster), fresh_group()
    put(topic, *range(10))
    begin = proxy.cut if fault == "is lost" else proxy.hold
    if name == "InitProducerId":
        begin(name)
    through, options = replace(topic, cluster=proxy.cluster), {"output": output.name, "slot": "one"}
    with Process(through, group, patience=1.0, **options) as process:
        if name != "InitProducerId":
            wait_until(lambda: committed(topic, group) == {0: 10}, 30, "the first transaction")
            begin(name)
        put(topic, *range(10, 20))
        proxy.wait()
        if fault == "is never answered":  # nobody waits for ever: the slot is given to another process
            succeed(topic, output, group, 20)
        if fault == "has its answer lost":
            proxy.cut()
        proxy.recover()
        put(topic, 20)
        wait_until(lambda: process.popen.poll() is not None or committed(topic, group) == {0: 21}, 60, "its end or all")
    succeed(topic, output, group, 21)
    assert values(output) == list(range(21))


def succeed(topic: Topic[Any], output: Topic[Any], group: str, records: int) -> None:
    """Start a process anew in the slot: it has so many records committed in the end."""
    with Member(exactly_once(topic, Sending(output), group)) as member:
        member.wait_committed({0: records})


# -- errors that Kafka answers

STEPS = [Step.HANDLING, Step.HANDLED, Step.COMMITTING, Step.OFFSETS_SENT, Step.FLUSHED, Step.COMMITTED]


@pytest.mark.parametrize(
    "step",
    [pytest.param(one, id=one.value, marks=() if one is Step.FLUSHED else pytest.mark.long) for one in STEPS],
)
def test_who_is_fenced_at_a_step_ends_and_loses_and_doubles_nothing(cluster: Cluster, step: Step) -> None:
    """correctness 21: it says that its slot was taken over, and its successor goes on."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    taken: list[Step] = []

    def told(now: Step, subject: Any) -> None:
        if now is step and not taken:
            Other(cluster.config({"transactional.id": f"{group}.one"})).init_transactions(20)
            taken.append(now)

    member = Member(exactly_once(topic, Sending(output), group, on_step=told))
    member.__enter__()
    member.journal.wait(lambda: taken, what="the other one")
    put(topic, 10)
    error = member.ends(40)
    assert isinstance(error, LabkitError)
    assert "slot one" in str(error)
    succeed(topic, output, group, 11)
    assert values(output) == list(range(11))


@pytest.mark.long
@pytest.mark.parametrize("step", [Step.OFFSETS_SENT, Step.FLUSHED])
def test_a_transaction_that_lasts_too_long_loses_and_doubles_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, step: Step
) -> None:
    """correctness 21: the broker has aborted it. (A frozen process is another test.)"""
    monkeypatch.setattr(client_module, "TIMEOUT", 1.0)
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    late: list[list[TopicPartition]] = []

    def told(now: Step, subject: Any) -> None:
        if now is step and not late:
            with closing(Client(cluster.config({"group.id": group}))) as asker:  # is answered when nothing is pending
                late.append(asker.committed([TopicPartition(topic.name, 0)], timeout=30))

    member = Member(exactly_once(topic, Sending(output), group, on_step=told))
    member.__enter__()
    error = member.ends(40)
    assert late[0][0].offset < 0
    assert isinstance(error, LabkitError)
    assert "slot one" in str(error)
    succeed(topic, output, group, 10)
    assert values(output) == list(range(10))


@pytest.mark.long
def test_a_topic_of_outputs_that_is_deleted_ends_it_before_anything_is_committed(cluster: Cluster) -> None:
    """correctness 19, 21: into the one that is made in its place goes everything."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    deleted: list[Step] = []

    def told(now: Step, subject: Any) -> None:
        if now is Step.OFFSETS_SENT and not deleted:
            cluster.delete_topics([output.name])
            deleted.append(now)

    member = Member(exactly_once(topic, Sending(output), group, on_step=told))
    member.__enter__()
    error = member.ends(60)
    assert isinstance(error, DeliveryFailed)
    assert output.name in str(error)
    assert committed(topic, group) == {}
    output.create()
    succeed(topic, output, group, 10)
    assert values(output) == list(range(10))


@pytest.mark.long
def test_what_a_principal_may_not_do_ends_it_with_the_reason(tmp_path: Path) -> None:
    """correctness 21: no transaction is tried again and again; with the permission, all goes on."""
    with broker_with_acls(tmp_path / "broker") as cluster:
        topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
        put(topic, *range(10))
        refused = [
            (ResourceType.TRANSACTIONAL_ID, f"{group}.one", f"{group}"),
            (ResourceType.TOPIC, output.name, output.name),
            (ResourceType.GROUP, group, group),
        ]
        for kind, name, named in refused:
            entries = allow(cluster, kind, name, AclOperation.DESCRIBE, exactly=True)
            member = Member(exactly_once(topic, Sending(output), group))
            member.__enter__()
            error = member.ends(30)
            assert isinstance(error, LabkitError)
            assert named in str(error)
            assert "authoriz" in str(error).lower()
            forbid(cluster, entries)
        assert committed(topic, group) == {}
        succeed(topic, output, group, 10)
        assert values(output) == list(range(10))
