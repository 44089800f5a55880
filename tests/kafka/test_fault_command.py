"""`labkit fault`: a terminal breaks what a notebook runs, by the same methods as its buttons."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from lab_helpers import Order, wait_ready
from processes import wait_until
from typer.testing import CliRunner

from labkit import Lab
from labkit.cli.main import app
from labkit.kafka.consumer import Consumer
from labkit.lab.pods.pod import PodState
from labkit.runtime.server import ServerState
from labkit.runtime.which_kafka import Connection
from labkit.services.faults import Misbehaviour, ServiceFaults


@pytest.fixture(autouse=True)
def _i_am_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_LEARNER", "ada")


@pytest.fixture
def lab(connection: Connection, _i_am_ada: None) -> Iterator[Lab]:
    lab = Lab("broken")
    yield lab
    lab._end(0)


def labkit(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["fault", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def told(*arguments: str) -> Any:
    return json.loads(labkit(*arguments, "--json"))


class Noted:
    """A service that notes what it is told."""

    understands = ("errors", "status", "delay")
    told: Mapping[str, object] = {}

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        self.told = told


def test_a_pod_and_a_service_are_broken_and_mended_from_a_terminal(lab: Lab) -> None:
    """In a process of its own, as a learner does it."""
    faults = ServiceFaults(lab.topic("service-faults", 1, Misbehaviour, compacted=True))
    faults.wait_ready()
    lab.service("events", faults)
    lab.at_end(faults.close)
    pod = lab.deploy("shop", Consumer(lab.topic("orders", 1, Order), print)).pods[0]
    wait_ready(lab.deployments["shop"])
    done = subprocess.run(
        [sys.executable, "-c", "from labkit.cli.main import app; app()", "fault", "shop-0", "freeze"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"notebook broken, run {lab.run.id}: freeze shop-0: it is frozen\n", done.stderr
    assert pod.state is PodState.FROZEN
    rows = {row["target"]: row for row in told()}
    assert list(rows) == ["shop-0", "Kafka", "events"]
    shop = rows["shop-0"]
    assert (shop["state"], shop["can"], shop["stands"]) == ("frozen", ["kill", "recover"], ["freeze pod 0"])
    assert (rows["Kafka"]["can"], shop["notebook"], shop["learner"]) == ([], "broken", "ada")
    assert "freeze pod 0" in labkit()
    assert "cannot restart shop-0: it is frozen: recover it first" in labkit("shop-0", "restart", code=1)
    assert labkit("broken/shop-0", "recover").endswith(": shop-0 goes on\n")
    assert labkit("shop-0", "recover").endswith(": nothing to mend: shop-0 is running\n")
    labkit("shop-0", "slow", "--by", "0.2")
    assert pod.state is PodState.SLOW
    labkit("shop-0", "kill")
    labkit("events", "fail", "--share", "0.5", "--seconds", "600")
    wait_until(lambda: faults.of("events").errors == 0.5, 20, "the fault")
    assert told("events", "recover")["said"] == "ended: fail events 50%"
    kinds = [fault.kind for fault in lab.faults if fault.target in ("shop-0", "events")]
    assert kinds == ["freeze", "slow", "kill", "fail"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["Kafka", "kill"], "this Kafka is shared with other notebooks"),
        (["Kafka", "slow"], "'slow' cannot be done to Kafka; what can: kill, freeze, restart, recover"),
        (["Kafka", "_own"], "'_own' cannot be done to Kafka"),
        (["Kafka"], "say what is to be done to Kafka; what can: kill, freeze, restart, recover"),
        (["Kafka", "freeze", "--seconds", "3"], "freeze takes no seconds for Kafka; it takes: nothing"),
        (["shop-7", "kill"], "has 'shop-7'; they have: broken/Kafka"),
        (["others/Kafka", "kill"], "has 'others/Kafka'; they have: broken/Kafka"),
    ],
)
def test_what_cannot_be_done_is_told(lab: Lab, arguments: list[str], said: str) -> None:
    assert said in labkit(*arguments, code=1)
    assert lab.faults == []


def test_without_a_lab_there_is_nothing_to_break(own_state: Path) -> None:
    assert "no lab of ada is running: run a notebook's cells, from the first on" in labkit("shop-0", "kill", code=1)


@pytest.mark.long
def test_kafka_is_killed_and_mended_while_it_is_dead() -> None:
    with Lab("fragile", cluster="private") as lab:
        assert stat.S_IMODE(lab.folder.stat().st_mode) == 0o700, "for this user alone"
        labkit("Kafka", "kill")
        assert lab.broker.state is ServerState.DOWN
        stands = {one["target"]: one["stands"] for one in told() if one["run"] == lab.run.id}
        assert stands == {"Kafka": ["kill Kafka"], "connection": []}
        assert labkit("Kafka", "recover").endswith(": Kafka is up again\n")
        assert lab.broker.state is ServerState.RUNNING
        assert [fault.text for fault in lab.faults if fault.target == "Kafka"] == ["kill Kafka"]
    labkit("fragile/Kafka", "kill", code=1)


def test_of_several_labs_the_newest_is_meant_and_one_may_be_named(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lab("first") as first, Lab("second") as second:
        monkeypatch.setenv("LABKIT_LEARNER", "bob")
        with Lab("third") as third:
            labs = {"ada": [first, second], "bob": [third]}
            switches = {one: Noted() for one in (first, second, third)}
            for one, switch in switches.items():
                one.service("till", switch)
            for learner, own in labs.items():
                monkeypatch.setenv("LABKIT_LEARNER", learner)
                # Runs of one second are told apart by what was drawn, not by their age.
                newest = max(own, key=lambda one: one.run.id)
                assert told("till", "slow", "--by", "2")["run"] == newest.run.id
                assert switches[newest].told == {"delay": 2.0}
                assert told(f"{own[0].notebook}/till", "fail")["notebook"] == own[0].notebook
                assert switches[own[0]].told["errors"] == 1
                assert {row["run"] for row in told()} == {one.run.id for one in own}
        assert switches[third].told == {"delay": 2.0, "errors": 1.0, "status": 503}


def test_a_second_server_of_its_kind_has_a_name_of_its_own(lab: Lab) -> None:
    first, second = lab.postgres(), lab.postgres()
    labkit("PostgreSQL-2", "kill")
    assert (first.state, second.state) == (ServerState.RUNNING, ServerState.DOWN)
    assert first.standing() == []
