"""Handles of an earlier run: a topic, a load or a deployment that a cell kept is refused, and what to do is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from lab_helpers import Order, orders

from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.lab.load import Load
from labkit.lab.pods.deployment import Deployment
from labkit.runtime.which_kafka import Connection

pytestmark = pytest.mark.usefixtures("connection")

RUN_AGAIN = "belongs to an earlier run: run the notebook's cells again from the first"


@dataclass
class Handles:
    """What the cells of a notebook make."""

    topic: Topic[Order]
    load: Load[Order]
    shop: Deployment

    @classmethod
    def of(cls, lab: Lab) -> Handles:
        topic = lab.topic("orders", 1, Order)
        load = lab.load(topic, orders(3), rate=1000)
        load.wait()
        return cls(topic, load, lab.deploy("shop", Consumer(topic, lambda record: None), replicas=0))


@pytest.fixture
def earlier(connection: Connection) -> Handles:
    """Of a lab whose notebook is run again."""
    return Handles.of(Lab("handles"))


@pytest.fixture
def lab(earlier: Handles) -> Iterator[Lab]:
    lab = Lab("handles")
    yield lab
    lab._end(0)


# Each is given what cells made in this run, and a handle, which may be of this run or of an earlier one.
USES: dict[str, tuple[str, Callable[[Lab, Handles, Handles], object]]] = {
    "deploy": ("topic", lambda lab, now, kept: lab.deploy("shop", Consumer(kept.topic, print), replicas=0)),
    "add partitions": ("topic", lambda lab, now, kept: lab.add_partitions(kept.topic, 2)),
    "load": ("topic", lambda lab, now, kept: lab.load(kept.topic, orders(1))),
    "board, lag": ("shop", lambda lab, now, kept: lab.board(lag=kept.shop)),
    "board, retries": ("shop", lambda lab, now, kept: lab.board(lag=now.shop, retries=kept.shop)),
    "board, completed": ("topic", lambda lab, now, kept: lab.board(lag=now.shop, completed=kept.topic)),
    "verdict, sent": ("load", lambda lab, now, kept: lab.verdict(kept.load, now.topic, timeout=0)),
    "verdict, one of": ("load", lambda lab, now, kept: lab.verdict(iter([kept.load]), now.topic, timeout=0)),
    "verdict, done": ("topic", lambda lab, now, kept: lab.verdict(now.load, kept.topic, timeout=0)),
}


FIRST = {"deploy", "load", "board, lag", "verdict, done"}


@pytest.mark.parametrize(
    ("what", "use"),
    [pytest.param(*use, id=name, marks=() if name in FIRST else pytest.mark.long) for name, use in USES.items()],
)
def test_a_handle_of_an_earlier_run_is_refused(
    lab: Lab, earlier: Handles, what: str, use: Callable[[Lab, Handles, Handles], Any]
) -> None:
    now = Handles.of(lab)
    with pytest.raises(LabkitError) as told:
        use(lab, now, earlier)
    assert str(told.value) == f"{getattr(earlier, what)!r} {RUN_AGAIN}"
    assert lab.deployments == {"shop": now.shop}  # nothing was begun with it
    assert lab.loads == [now.load]
    use(lab, now, now)


def test_a_deployment_that_was_replaced_has_no_board(lab: Lab) -> None:
    now = Handles.of(lab)
    lab.board(lag=now.shop)
    after = lab.deploy("shop", Consumer(now.topic, print), replicas=0)
    with pytest.raises(LabkitError, match=RUN_AGAIN):
        lab.board(lag=now.shop)
    lab.board(lag=after)


def test_a_topic_of_another_lab_is_welcome(lab: Lab) -> None:
    with Lab("others") as other:
        theirs = Handles.of(other)
        lab.deploy("reader", Consumer(theirs.topic, print), replicas=0)
        lab.load(theirs.topic, orders(1)).wait()
