"""What the tests of labs share: the records, and waiting for what pods do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from processes import wait_until

from labkit import Lab
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
