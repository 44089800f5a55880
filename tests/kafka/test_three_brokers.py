"""Three brokers of one lab: what the death of one costs, and what is said when too few are left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer as Client
from consuming import fresh_topic, put
from lab_helpers import Order, Shipped, orders, wait_ready
from processes import is_alive, processes_of, wait_until
from transacting import Committing, values

from labkit import Lab
from labkit.kafka.cluster import admin
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import DeliveryFailed, LabkitError
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.lab.faults import control_socket
from labkit.lab.faults.servers import kafka_away
from labkit.lab.load import Load
from labkit.runtime import private_broker as making
from labkit.runtime import server
from labkit.runtime.broker import HOST, free_ports
from labkit.runtime.home import state_dir as state_folder
from labkit.runtime.private_broker import PrivateCluster
from labkit.runtime.server import ServerState


@pytest.fixture(scope="module")
def one_lab() -> Iterator[Lab]:
    """It is closed with one broker dead and one frozen, and leaves nothing."""
    lab = Lab("three", cluster="private", brokers=3)
    yield lab
    servers = lab.connection.brokers
    lab.brokers[0].kill()
    lab.brokers[1].freeze()
    lab.close()
    assert not any(is_alive(server.pid) or server.folder.exists() for server in servers)


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    """All brokers are there, before a test and after it."""
    yield one_lab
    for broker in one_lab.brokers:
        broker.recover()
    wait_until(lambda: one_lab.cluster.describe().brokers == {1, 2, 3}, 30, "three brokers")


def coordinator(lab: Lab, group: str | None) -> str:
    """The broker that keeps a group's members and offsets."""
    assert group
    found = admin(lab.cluster).describe_consumer_groups([group])[group].result(30)
    return lab.brokers[found.coordinator.id - 1].name


class Shop:
    """Orders that are shipped exactly once by one pod."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.source, self.shipped = lab.topic(f"{name}-orders", 3, Order), lab.topic(f"{name}-shipped", 3, Shipped)
        shipped = self.shipped

        def ship(record: Record[Order]) -> None:
            shipped.send(Shipped(record.value.id), key=record.key)

        self.pods = lab.deploy(name, Consumer(self.source, ship, guarantee="exactly once"))
        wait_ready(self.pods, 60)

    def load(self, lab: Lab) -> Load[Order]:
        """Some orders are confirmed when this returns, and others are not."""
        load = lab.load(self.source, orders(300), rate=100)
        wait_until(lambda: load.count > 50, 30, "records before the fault")
        return load

    def check(self, lab: Lab, load: Load[Order]) -> None:
        verdict = lab.verdict(load, self.shipped, exactly_once=True, timeout=120)
        assert verdict.check().startswith("300 sent · 300 took effect · lost 0 · duplicated 0"), verdict


def in_sync(topic: Topic[Any]) -> int:
    """How many replicas of its first partition are in sync."""
    return len(topic.cluster.partitions(topic.name)[0].in_sync)


@pytest.mark.long
def test_a_leader_that_is_killed_costs_seconds_and_no_record(lab: Lab) -> None:
    """Exactly once goes on; and what must have three replicas is refused with the reason."""
    strict = lab.topic("strict", 1, Order, config={"min.insync.replicas": "3"})
    shop = Shop(lab, "shop")
    source, keeper = shop.source, coordinator(lab, shop.pods.group)
    lab.board(lag=shop.pods, panels=lab.replicas(source))
    load = shop.load(lab)
    wait_until(lambda: lab.figure("shop-orders in sync", "shop-orders/0") == 3, 30, "all to be seen in sync")
    killed = next(one for one in (lab.leader(source, number) for number in range(3)) if one.name != keeper)
    killed.kill()
    shop.check(lab, load)
    wait_until(lambda: lab.figure("shop-orders in sync", "shop-orders/0") == 2, 30, "the dead one to be missed")
    assert lab.figure("shop-orders led", killed.name) == 0
    assert killed not in [lab.leader(source, number) for number in range(3)]
    wait_until(lambda: in_sync(strict) == 2, 20, "the dead one to be missed there too")
    with pytest.raises(
        DeliveryFailed, match=r"strict/0 has 2 of 3 replicas in sync, and its min\.insync\.replicas is 3"
    ):
        strict.deliver([(Order(1), None, None)], timeout=1)
    assert killed.recover() == f"{killed.name} is up again"
    wait_until(lambda: in_sync(strict) == 3, 30, "all to be in sync again")
    strict.deliver([(Order(2), None, None)])
    assert Order(2) in values(strict)


@pytest.mark.long
def test_who_keeps_the_group_is_killed(lab: Lab) -> None:
    """The client can lose a call for ever then (librdkafka issue 5511): its pod ends, and its successor goes on."""
    shop = Shop(lab, "kept")
    keeper, load = coordinator(lab, shop.pods.group), shop.load(lab)
    lab.targets[keeper].do("kill", {})
    shop.check(lab, load)


@pytest.mark.long
def test_without_a_majority_kafka_is_away(lab: Lab) -> None:
    one, two, three = lab.brokers
    assert [*lab.targets][-3:] == ["Kafka 1", "Kafka 2", "Kafka 3"]
    one.freeze()
    assert kafka_away(lab.brokers) is None  # the others go on without it
    assert lab._status([]) == "Kafka 1 frozen"
    assert control_socket.ask(lab.run.folder, control_socket.Order("Kafka 2", "freeze")) is not None
    assert two.state is ServerState.FROZEN
    assert repr(lab.settle()) == (
        "unknown: Kafka 1 is frozen, Kafka 2 is frozen, which leaves no majority of 3 brokers: recover() them in "
        "lab.brokers"
    )
    one.recover()
    two.recover()
    assert three.state is ServerState.RUNNING
    assert lab.cluster.topic_config(lab._telemetry.name)["min.insync.replicas"] == "2"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cluster": "private", "brokers": 2}, "a lab has 1 broker, or 3 .*, not 2"),
        ({"cluster": "private", "brokers": "3"}, "a lab has 1 broker, or 3 .*, not '3'"),
        ({"brokers": 3}, r"Lab\('odd', cluster='private', brokers=3\)"),
    ],
)
def test_brokers_that_no_lab_has_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(LabkitError, match=said):
        Lab("odd", **asked)


def test_memory_that_gets_short_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise LabkitError("far enough")

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_400_000_000))
    monkeypatch.setattr(making, "prepare", stop)
    with pytest.raises(LabkitError, match="far enough"):
        Lab("poor", cluster="private", brokers=3)
    assert "1,400 MB are available, and 990 MB are needed for 3 brokers. Close other labs" in capsys.readouterr().out


@pytest.mark.long
def test_what_one_broker_has_and_three_have_not_is_refused(lab: Lab) -> None:
    with pytest.raises(LabkitError, match=r"take one of lab\.brokers, or lab\.leader\(topic, partition\)"):
        _ = lab.broker
    with pytest.raises(LabkitError, match="a lab with 3 brokers has no proxy"):
        _ = lab.proxy
    with pytest.raises(LabkitError, match="few has partitions 0 to 1, not 2"):
        lab.leader(lab.topic("few", 2), 2)
    with Lab("single") as single:
        topic = single.topic("few", 2)
        assert single.leader(topic, 1) is single.broker
        with pytest.raises(LabkitError, match="brokers=3"):
            single.replicas(topic)


@pytest.mark.long
def test_what_the_leader_alone_has_confirmed_is_lost_with_it(lab: Lab) -> None:
    """Without acks of all; with them nothing was confirmed meanwhile."""
    topic = lab.topic("receipts", 1, Order)
    wait_until(lambda: in_sync(topic) == 3, 30, "all to be in sync")
    careful, confirmed = lab.load(topic, orders(300), rate=100), list[str]()
    wait_until(lambda: careful.count > 50, 30, "records before the kill")

    def hear(error: object, message: Any) -> None:
        if error is None:
            confirmed.append(message.key().decode())

    client = Client(lab.cluster.config({"acks": 1}))
    client.list_topics(topic.name, timeout=10)
    leader = lab.leader(topic)
    followers = [one for one in lab.brokers if one is not leader]
    for one in followers:
        one.freeze()
    for order in orders(50, 1000):  # the first ones answer what the followers had asked for before
        client.produce(topic.name, encode(order), str(order.id), on_delivery=hear)
        client.flush(1)
    leader.kill()
    for one in followers:
        one.recover()
    careful.wait(60)
    there = {str(order.id) for order in values(topic)}
    assert len(confirmed) > 10
    assert set(confirmed) - there
    assert {one.id for one in careful.sent} <= there
    client.flush(10)


@pytest.mark.long
def test_a_leader_that_is_frozen_and_thawed_loses_nothing(lab: Lab) -> None:
    topic = lab.topic("paused", 1, Order)
    load = lab.load(topic, orders(300), rate=100)
    wait_until(lambda: load.count > 50, 30, "records before the freeze")
    leader = lab.leader(topic)
    leader.freeze()
    wait_until(lambda: lab.leader(topic) is not leader, 60, "another leader")
    leader.recover()
    assert lab.verdict(load, topic).check().startswith("300 sent · 300 took effect · lost 0 · duplicated 0")


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_amid_commits_nobody_waits_for_ever(lab: Lab, count: int) -> None:
    """A broker of its own needs a controller that misses it first; these have each other."""
    topic = fresh_topic(lab.cluster, 12)
    with Committing(topic, 4) as committing:
        for broker in lab.brokers[:count]:
            broker.kill()
    for broker in lab.brokers:
        broker.recover()
    committing.join()
    assert values(topic)


@pytest.mark.long
def test_all_killed_they_come_back_with_all_that_was_confirmed(lab: Lab) -> None:
    """The first one to be started again has nobody to talk to, and is not waited for."""
    topic = fresh_topic(lab.cluster, 3)
    put(topic, *range(1000))
    for broker in lab.brokers:
        broker.kill()
    assert [broker.recover() for broker in lab.brokers] == [
        "Kafka 1 starts; it answers when a majority is there",
        "Kafka 2 is up again",
        "Kafka 3 is up again",
    ]
    assert sorted(values(topic)) == list(range(1000))


@pytest.mark.long
def test_a_port_that_is_taken_meanwhile_is_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(state_folder().glob("private-*"))
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        number, *others = taken.getsockname()[1], *free_ports(5)
        choices = iter([(*others[:3], number, *others[3:])])
        monkeypatch.setattr(making, "free_ports", lambda count: next(choices, None) or free_ports(count))
        with PrivateCluster() as cluster:
            assert cluster.cluster.describe().brokers == {1, 2, 3}
            assert number not in cluster.ports
    assert set(state_folder().glob("private-*")) <= before


@pytest.mark.long
def test_they_die_with_their_owner(state_dir: Path) -> None:
    code = """
        import time
        from labkit.runtime.private_broker import PrivateCluster
        cluster = PrivateCluster()
        cluster.brokers[0].freeze()
        print(*(broker.pid for broker in cluster.brokers), flush=True)
        time.sleep(600)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 3
        owner.kill()
        wait_until(lambda: not any(map(is_alive, pids)), 5, "the end of the brokers whose owner was killed")
    assert not [one for one in processes_of(state_dir) if one.pid in pids]


@pytest.mark.long
def test_a_death_that_nobody_ordered_is_a_fault_of_that_broker(lab: Lab) -> None:
    before = len(lab.faults)
    os.kill(lab.connection.brokers[2].pid, signal.SIGKILL)
    wait_until(lambda: [one.text for one in lab.faults[before:]] == ["Kafka 3 died"], 60, "the fault")
    assert kafka_away(lab.brokers) is None


def test_an_interrupt_while_they_start_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them goes on waiting for an answer."""
    before, lived, looking = set(state_folder().glob("private-*")), list[bool](), threading.Barrier(4)

    def never_ready(_: str, __: Path, ___: object, alive: Callable[[], bool], ____: float) -> None:
        looking.wait(60)
        looks = 0  # that it ends in any case
        while alive() and looks < 1000:
            looks += 1
            time.sleep(0.01)
        lived.append(alive())
        raise LabkitError("it does not answer")

    def interrupt(_: object) -> None:
        looking.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "wait_until_ready", never_ready)
    monkeypatch.setattr(making, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PrivateCluster()
    assert lived == [False] * 3
    assert set(state_folder().glob("private-*")) <= before
