"""What the tests of labs share: the records, and waiting for what pods do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from processes import wait_until
from typer.testing import CliRunner

from labkit import Lab
from labkit.cli import doctor
from labkit.cli.main import app
from labkit.kafka.consumer import Consumer
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.lab.history import Fault
from labkit.lab.pods.deployment import Deployment
from labkit.lab.pods.pod import PodState


class Order(msgspec.Struct):
    id: int
    customer: str = "nobody"


class Shipped(msgspec.Struct):
    id: int


def orders(count: int, first: int = 0) -> Iterator[Order]:
    return (Order(number, f"customer {number % 10}") for number in range(first, first + count))


def values(topic: Topic[Any]) -> list[Any]:
    """All values of a topic."""
    with Reader(topic) as reader:
        return [record.value for record in reader.read_to_end()]


def said(deployment: Deployment, text: str, pod: str | None = None) -> bool:
    """Whether a pod printed it."""
    return any(text in line.text for line in deployment.log if pod in (None, line.pod))


def wait_said(deployment: Deployment, text: str, pod: str | None = None, timeout: float = 20.0) -> None:
    """Wait until a pod printed `text`."""
    wait_until(lambda: said(deployment, text, pod), timeout, f"{text!r} in the log")


def wait_ready(deployment: Deployment, timeout: float = 20.0) -> None:
    """Wait until all pods run and share what they consume."""
    wait_until(deployment.ready, timeout, f"{deployment!r} to be ready")


def wait_running(deployment: Deployment, timeout: float = 20.0) -> None:
    """Wait until all pods run; the partitions of one that was killed are free only when its session is over."""
    running = lambda: {pod.state for pod in deployment.pods} <= {PodState.RUNNING, PodState.SLOW}  # noqa: E731
    wait_until(running, timeout, f"{deployment!r} to run")


def ordered(lab: Lab) -> list[Fault]:
    """The faults of a lab, without "the machine slept": a virtual one may be halted in the middle of any test."""
    return [fault for fault in lab.faults if fault.target != "machine"]


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


def diagnosed(monkeypatch: pytest.MonkeyPatch) -> dict[str, doctor.Finding]:
    """What the doctor finds in the cluster that the environment names."""
    monkeypatch.setattr(doctor, "CHECKS", {})
    said = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    return {one["check"]: doctor.Finding(**one) for one in said["checks"]}
