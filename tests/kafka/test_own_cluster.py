"""A cluster that labkit has not set up: what `labkit doctor` says of it, and that a lab works there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_helpers import Order, Shipped, orders, values, wait_ready
from processes import wait_until
from stock import OLD, stock_broker
from typer.testing import CliRunner

from labkit import Lab
from labkit.cli import doctor
from labkit.cli.main import app
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.runtime.connect import Connection
from labkit.runtime.jars import KAFKA

OWN = ("release", "settings", "topics", "groups", "transact.")


def diagnosed(monkeypatch: pytest.MonkeyPatch) -> dict[str, doctor.Finding]:
    """What the doctor finds in the cluster that the environment names."""
    monkeypatch.setattr(doctor, "CHECKS", {})
    said = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    return {one["check"]: doctor.Finding(**one) for one in said["checks"]}


def test_the_embedded_kafka_as_an_own_cluster(
    connection: Connection, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", cluster.bootstrap)
    monkeypatch.setenv("LABKIT_LEARNER", "Ada Ö.")
    found = diagnosed(monkeypatch)
    assert [*found] == [*OWN]
    assert not [one for one in found.values() if one.fix]
    assert found["release"].text.startswith("Kafka 4.1 or newer")
    assert "auto.create.topics.enable=false" in found["settings"].text
    assert "group.initial.rebalance.delay.ms=0" in found["settings"].text
    assert "under labkit.ada.; replication 1, min.insync.replicas 1" in found["topics"].text
    assert "__transaction_state has replication 1, min.insync.replicas 1; " in found["transact."].text
    assert not [name for name in (*cluster.topics(), *cluster.groups()) if name.startswith("labkit.ada.")]


def test_without_an_own_cluster_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diagnosed(monkeypatch) == {}


@pytest.fixture(scope="module", params=[KAFKA, OLD])
def stock(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Cluster]]:
    with stock_broker(tmp_path_factory.mktemp("stock") / "broker", request.param) as cluster:
        yield request.param, cluster


@pytest.mark.long
def test_a_stock_kafka_is_healthy_and_a_lab_works_there(
    stock: tuple[str, Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    version, cluster = stock
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", cluster.bootstrap)
    found = diagnosed(monkeypatch)
    assert not [one for one in found.values() if one.fix]
    assert found["release"].text.startswith(f"Kafka {'3.9' if version == OLD else '4.1 or newer'}")
    assert "auto.create.topics.enable=true: " in found["settings"].text
    assert "group.initial.rebalance.delay.ms=3000: " in found["settings"].text
    ships_all("stock")


def ships_all(name: str) -> None:
    """A lab handles all orders, by both guarantees, though a pod is killed, and leaves nothing behind."""
    with Lab(name) as lab:
        source, shipped, once = (
            lab.topic("orders", 2, Order),
            lab.topic("shipped", 2, Shipped),
            lab.topic("once", 2, Shipped),
        )
        shop = lab.deploy("shop", Consumer(source, lambda record: shipped.send(Shipped(record.value.id))), replicas=2)
        exact = lab.deploy(
            "exact",
            Consumer(source, lambda record: once.send(Shipped(record.value.id)), guarantee="exactly once"),
            replicas=2,
        )
        wait_ready(shop)
        wait_ready(exact)
        load = lab.load(source, orders(200), rate=200)
        wait_until(lambda: values(once), 30, "a first transaction")
        exact.pods[0].kill()
        verdict = lab.verdict(load, once, exactly_once=True)
        assert verdict.result == "valid", verdict
        assert sorted(value.id for value in values(once)) == list(range(200))
        assert {value.id for value in values(shipped)} == set(range(200))
        prefix, cluster = lab.run.prefix, lab.cluster
    assert not [name for name in (*cluster.topics(), *cluster.groups()) if name.startswith(prefix)]


@pytest.mark.long
def test_a_single_broker_on_settings_for_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka's defaults, where nobody has adapted them."""
    with stock_broker(tmp_path / "broker", KAFKA, "") as cluster:
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", cluster.bootstrap)
        found = diagnosed(monkeypatch)
        assert [name for name, one in found.items() if one.fix] == ["groups", "transact."]
        assert "__consumer_offsets has replication 3" in found["groups"].text
        assert "set offsets.topic.replication.factor" in found["groups"].fix
        assert "replication 3, min.insync.replicas 2; there are 1 brokers" in found["transact."].text
        assert "transaction.state.log.min.isr to no more than 1" in found["transact."].fix
