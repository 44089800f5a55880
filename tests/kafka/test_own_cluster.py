"""A cluster that labkit has not set up: what `labkit doctor` says of it, and that a lab works there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_helpers import diagnosed, ships_all
from stock import OLD, stock_broker

from labkit.kafka.cluster import Cluster
from labkit.runtime.jars import KAFKA
from labkit.runtime.which_kafka import Connection

OWN = ("release", "settings", "topics", "groups", "transact.")


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
    assert "under labkit.ada-o.; replication 1, min.insync.replicas 1" in found["topics"].text
    assert "__transaction_state has replication 1, min.insync.replicas 1; " in found["transact."].text
    assert not [name for name in (*cluster.topics(), *cluster.groups()) if name.startswith("labkit.ada-o.")]


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


@pytest.mark.long
def test_a_single_broker_on_settings_for_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka's defaults, where nobody has adapted them."""
    with stock_broker(tmp_path / "broker", KAFKA, "") as cluster:
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", cluster.bootstrap)
        found = diagnosed(monkeypatch)
        assert [name for name, one in found.items() if one.fix] == ["groups", "transact."]
        assert "__consumer_offsets has replication 3" in found["groups"].text
        assert "set offsets.topic.replication.factor" in found["groups"].fix
        assert "replication 3, min.insync.replicas 2; brokers: 1" in found["transact."].text
        assert "transaction.state.log.min.isr to no more than 1" in found["transact."].fix
