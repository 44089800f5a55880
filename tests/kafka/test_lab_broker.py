"""Faults of the broker: a deployment lives through each, and only a lab with a Kafka of its own may inject them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from lab_helpers import Order, Shipped, ordered, orders, wait_ready
from processes import wait_until

import labkit.lab.load as load_module
from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.kafka.records import Record
from labkit.lab.history import Fault
from labkit.lab.load import Load
from labkit.lab.pods.deployment import Deployment
from labkit.runtime.home import state_dir
from labkit.runtime.server import ServerState
from labkit.runtime.shared_broker import status
from labkit.runtime.which_kafka import Connection


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab("fragile", cluster="private")
    yield lab
    lab.close()


class Shop:
    """Orders that are shipped by two pods."""

    def __init__(self, lab: Lab) -> None:
        self.orders, self.shipped = lab.topic("orders", 4, Order), lab.topic("shipped", 4, Shipped)
        shipped = self.shipped

        def ship(record: Record[Order]) -> None:
            time.sleep(0.005)
            shipped.send(Shipped(record.value.id), key=record.key)

        self.pods: Deployment = lab.deploy("shop", Consumer(self.orders, ship), replicas=2)
        wait_ready(self.pods)
        self.load: Load[Order] = lab.load(self.orders, orders(600), rate=100)
        wait_until(lambda: min(pod.handled for pod in self.pods.pods) > 20, 20, "both at work")


def of_kafka(lab: Lab) -> list[Fault]:
    """Its faults only: while it is away, pods may lose their partitions, which are faults as well."""
    return [one for one in lab.faults if one.target == "Kafka"]


def killed(lab: Lab) -> None:
    lab.broker.kill()
    assert repr(lab.settle()) == "unknown: Kafka is down: lab.broker.recover() mends it"
    assert "Kafka down" in lab._status([lab.deployments["shop"]])
    lab.broker.recover()


def frozen(lab: Lab) -> None:
    lab.broker.freeze()
    assert repr(lab.settle()) == "unknown: Kafka is frozen: lab.broker.recover() mends it"
    with pytest.raises(ClusterUnreachable, match="no Kafka answers"):  # long enough: others are held up as well
        lab.connection.cluster.describe(3.0)
    lab.broker.recover()


def away_for_long(lab: Lab) -> None:
    lab.broker.kill()
    time.sleep(35)  # the outage itself: longer than a record that somebody waits for
    lab.broker.recover()


def restarted(lab: Lab) -> None:
    lab.broker.restart()


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "kinds"),
    [(killed, ["kill"]), (frozen, ["freeze"]), (restarted, ["restart"]), (away_for_long, ["kill"])],
    ids=("killed", "frozen", "restarted", "away for long"),
)
def test_a_deployment_lives_through(lab: Lab, fault: Callable[[Lab], None], kinds: list[str]) -> None:
    shop = Shop(lab)
    fault(lab)
    assert lab.broker.state is ServerState.RUNNING
    verdict = lab.verdict(shop.load, shop.shipped)
    assert verdict.check().startswith("600 sent · 600 took effect · lost 0 · duplicated 0 · out of order 0")
    windows = of_kafka(lab)
    assert [one.kind for one in windows] == kinds
    assert all(one.end is not None and one.end > one.start for one in windows)
    said = "\n".join(f"{line.pod}: {line.text}" for line in shop.pods.log)
    assert shop.pods.restarts == 0, said


@pytest.mark.long
def test_a_load_outlasts_a_kafka_that_is_away_but_not_for_ever(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_module.PATIENCE >= 300  # longer than somebody reads, and than a busy machine takes for a restart
    with monkeypatch.context() as patch:
        patch.setattr(load_module, "PATIENCE", 6.0)  # longer than this machine may stand still
        impatient = lab.load(lab.topic("impatient", 1, Order), orders(100_000), rate=100)
        wait_until(lambda: impatient.count, 20, "its start")  # which reads PATIENCE
    patient = lab.load(lab.topic("patient", 1, Order), orders(600), rate=100)
    wait_until(lambda: patient.count > 20, 20, "both at work")
    lab.broker.kill()
    wait_until(lambda: impatient.done, 20, "the end of the one that gives up")
    assert "DeliveryFailed" in (impatient.error or "")
    assert not patient.done
    lab.broker.recover()
    patient.wait()
    assert patient.count == 600


@pytest.mark.long
def test_killed_while_frozen(lab: Lab) -> None:
    lab.broker.freeze()
    lab.broker.kill()
    assert [(one.kind, one.end is None) for one in ordered(lab)] == [("freeze", False), ("kill", True)]
    lab.broker.recover()
    assert not any(one.end is None for one in lab.faults)


@pytest.mark.long
def test_a_death_that_nobody_ordered_is_a_fault(lab: Lab) -> None:
    shop = Shop(lab)
    os.kill(lab.connection.broker.pid, signal.SIGKILL)  # type: ignore[union-attr]
    # The questions that the sampler has just begun are waited for: up to 30 s.
    wait_until(lambda: [one.text for one in of_kafka(lab)] == ["Kafka died"], 60, "the fault")
    lab.broker.recover()
    assert of_kafka(lab)[0].end is not None
    assert lab.verdict(shop.load, shop.shipped).result == "valid"


@pytest.mark.long
def test_a_shared_broker_that_died_explains_what_came_again(own_state: Path) -> None:
    with Lab("shaken") as lab:
        shop = Shop(lab)
        found = status()
        assert found
        os.kill(found.pid, signal.SIGKILL)
        wait_until(lambda: [one.text for one in of_kafka(lab)] == ["Kafka died"], 60, "the fault")
        verdict = lab.verdict(shop.load, shop.shipped)
        assert verdict.result == "valid", str(verdict)


@pytest.mark.long
def test_closed_it_leaves_no_client_that_goes_on_trying() -> None:
    def once() -> None:
        with Lab("fragile", cluster="private") as lab:
            topic = lab.topic("orders", 1, Order)
            topic.send(Order(1))
            topic.flush()
            pods = lab.deploy("shop", Consumer(topic, print))
            lab.wait_ready(pods)  # its one record may be done before its report of being ready is read
            assert lab.settle(30)

    once()
    before = psutil.Process().num_threads()
    for _ in range(2):
        once()
    wait_until(lambda: psutil.Process().num_threads() <= before, 10, "as many threads as before")


@pytest.mark.long
def test_the_buttons_do_the_same(lab: Lab) -> None:
    shop = Shop(lab)
    board = lab.board(lag=shop.pods, completed=shop.shipped)
    board.start()
    buttons = {button.widget.description: button.widget for button in board._buttons}
    assert list(buttons) == ["Kill Kafka", "Freeze Kafka", "Restart Kafka", "Recover Kafka"]
    assert [one.disabled for one in buttons.values()] == [False, False, False, True]
    buttons["Kill Kafka"].click()
    wait_until(lambda: lab.broker.state is ServerState.DOWN)
    wait_until(
        lambda: buttons["Kill Kafka"].tooltip == "It is down: recover it first.", what="a dead broker cannot be killed"
    )
    assert buttons["Kill Kafka"].disabled
    assert buttons["Restart Kafka"].disabled
    assert not buttons["Recover Kafka"].disabled
    buttons["Recover Kafka"].click()
    wait_until(lambda: lab.broker.state is ServerState.RUNNING, 60, "its restart")
    wait_until(lambda: not buttons["Freeze Kafka"].disabled, 20, "a running broker can be frozen")
    buttons["Freeze Kafka"].click()
    wait_until(lambda: lab.broker.state is ServerState.FROZEN, 20, "its freeze")
    wait_until(lambda: not buttons["Recover Kafka"].disabled, 20, "a frozen broker can be mended")
    assert buttons["Freeze Kafka"].disabled
    buttons["Recover Kafka"].click()
    wait_until(lambda: lab.broker.state is ServerState.RUNNING, 20, "its end")
    assert [one.kind for one in of_kafka(lab)] == ["kill", "freeze"]
    assert lab.verdict(shop.load, shop.shipped).result == "valid"


@pytest.mark.long
@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_lab_whose_kafka_is_away_closes_and_leaves_nothing(fault: str) -> None:
    lab = Lab("fragile", cluster="private")
    Shop(lab)
    getattr(lab.broker, fault)()
    lab.close()
    assert not list(state_dir().glob("private-*"))
    assert not [path for path in (state_dir() / "runs").glob("*.json") if lab.run.id in path.name]


def test_a_kafka_of_others_is_not_broken(connection: Connection) -> None:
    with Lab("polite") as lab:
        for fault in (lab.broker.kill, lab.broker.freeze, lab.broker.restart, lab.broker.recover):
            with pytest.raises(LabkitError, match=r"this Kafka is shared.*Lab\('polite', cluster='private'\)"):
                fault()
        assert ordered(lab) == []
        pods = lab.deploy("shop", Consumer(lab.topic("orders", 1, Order), print))
        board = lab.board(lag=pods)
        board.start()
        for button in board._buttons:
            assert button.widget.disabled
            assert "cluster='private'" in button.widget.tooltip


def test_a_cluster_of_another_kind_is_refused() -> None:
    with pytest.raises(LabkitError, match="cluster is 'shared' or 'private', not 'mine'"):
        Lab("odd", cluster="mine")  # type: ignore[arg-type]
