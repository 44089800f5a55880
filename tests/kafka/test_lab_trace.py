"""`lab.trace`: one record's life, told by topics and faults; and the log in which the same can be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from lab_helpers import Order, Shipped, orders, said, wait_ready
from processes import wait_until

from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import LabkitError
from labkit.kafka.records import Record
from labkit.lab.pods.deployment import Deployment, pane
from labkit.patterns.own_topics import own_topic
from labkit.runtime.which_kafka import Connection

pytestmark = pytest.mark.usefixtures("connection")


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("trace")
    yield lab
    lab._end(0)


def events(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    return list(zip(table["event"], table["place"], table["pod"], strict=True))


def told(lab: Lab, order: int | str, event: str) -> pd.DataFrame:
    """The trace, once it has an event; without "the machine slept": a virtual one may be halted in any test."""
    wait_until(lambda: event in set(lab.trace(order)["event"]), 30, f"{event} in the trace")
    return lab.trace(order).query("pod != 'machine'")


class Shop:
    """Two pods ship orders; who first has order 17 is stuck between what it sends and its end."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.orders, self.shipped = lab.topic("orders", 1, Order), lab.topic("shipped", 1, Shipped)
        shipped, begun = self.shipped, folder / "begun"

        def ship(record: Record[Order]) -> None:
            shipped.deliver([(Shipped(record.value.id), record.key, None)])  # at once
            if record.value.id == 17 and not begun.exists():
                begun.touch()
                print("stuck")
                time.sleep(60)

        self.pods: Deployment = lab.deploy("shop", Consumer(self.orders, ship), replicas=2)
        wait_ready(self.pods)
        lab.load(self.orders, [Order(17), *orders(3)]).wait()
        wait_until(begun.exists, 20, "the handler that gets stuck")
        self.stuck = next(pod for pod in self.pods.pods if said(self.pods, "stuck", pod.name))
        self.other = next(pod for pod in self.pods.pods if pod is not self.stuck)


@pytest.fixture
def shop(lab: Lab, tmp_path: Path) -> Shop:
    return Shop(lab, tmp_path)


@pytest.mark.long
def test_through_a_crash_and_a_redelivery(lab: Lab, shop: Shop) -> None:
    first = shop.stuck.name
    before = [
        ("produced", "orders/0/0", ""),
        ("handled", "orders/0/0", first),
        ("took effect", "shipped/0/0", first),
    ]
    assert events(told(lab, 17, "took effect")) == before  # it works while things still run
    shop.stuck.kill()
    table = told(lab, 17, "redelivered")
    by = table["pod"].iloc[-1]  # the other one, or the first one's next process
    assert events(table) == [
        *before,
        ("kill", "", first),
        ("redelivered", "orders/0/0", by),
        ("took effect", "shipped/0/1", by),
    ]
    details = dict(zip(table["event"], table["detail"], strict=True))
    assert details["kill"] == f"kill pod {shop.stuck.index}"
    assert details["redelivered"] == f"again: {first} had it before"
    assert details["took effect"] == "caused by orders/0/0"
    assert list(table.columns) == ["time", "seconds", "event", "place", "pod", "detail"]
    assert table["seconds"].iloc[0] == 0
    assert table["seconds"].is_monotonic_increasing
    assert abs(table["time"].iloc[0].timestamp() - time.time()) < 60
    assert events(told(lab, "17", "redelivered")) == events(table)
    behind = told(lab, 2, "took effect")  # it was in the partition that went over, and nobody had handled it
    assert list(behind["event"]) == ["produced", "kill", "handled", "took effect"]
    assert set(behind["pod"][2:]) == {by}


@pytest.mark.long
def test_through_a_freeze_and_a_takeover(lab: Lab, shop: Shop) -> None:
    first, second = shop.stuck.name, shop.other.name
    shop.stuck.freeze()
    table = told(lab, 17, "redelivered")
    assert events(table) == [
        ("produced", "orders/0/0", ""),
        ("handled", "orders/0/0", first),
        ("took effect", "shipped/0/0", first),
        ("freeze", "", first),
        ("redelivered", "orders/0/0", second),
        ("took effect", "shipped/0/1", second),
    ]
    assert table["detail"][3] == f"freeze pod {shop.stuck.index}, still stands"


def test_an_id_that_was_never_sent(lab: Lab) -> None:
    with pytest.raises(LabkitError, match=r"no record with id 17 was ever sent. Looked in .*: none"):
        lab.trace(17)
    source = lab.topic("orders", 1, Order)
    lab.topic("words", 1, str).send("hello")  # has no id: passed over
    source.send(Order(1))
    source.flush()
    with pytest.raises(LabkitError, match=r"no record with id 17 was ever sent. Looked in .* lab: orders, words$"):
        lab.trace(17)
    with pytest.raises(LabkitError, match="no record with number 1 "):
        lab.trace(1, by="number")
    assert list(lab.trace(1)["event"]) == ["produced"]
    assert list(lab.trace("nobody", by="customer")["event"]) == ["produced"]


@pytest.mark.long
def test_the_log_tells_of_faults_and_of_the_lives_of_pods(lab: Lab) -> None:
    shop = lab.deploy("shop", Consumer(lab.topic("orders", 2, Order), lambda record: print(record.offset)), replicas=2)
    wait_until(lambda: said(shop, "got orders/", "shop-0") and said(shop, "got orders/", "shop-1"), 20, "partitions")
    shop.pods[1].freeze()
    shop.pods[1].recover()
    shop.pods[0].kill()
    wait_until(lambda: said(shop, "killed by SIGKILL; starts again in 0.1 s", "shop-0"), 20, "its end")
    wait_ready(shop)

    def line(pod: str, text: str) -> Callable[[], int]:
        return lambda: next((n for n, one in enumerate(shop.log) if one.pod == pod and one.text.startswith(text)), -1)

    order = [
        line("shop-0", "pod 0 started as process "),
        line("shop-0", "got orders/"),
        line("shop-0", "fault: kill pod 0"),
        line("shop-0", "killed by SIGKILL"),
    ]
    places = [at() for at in order]
    assert places == sorted(places)
    assert min(places) >= 0
    assert 0 <= line("shop-1", "fault: freeze pod 1")() < line("shop-1", "freeze pod 1: ended after 0.")()
    assert len([one for one in shop.log if one.text.startswith("pod 0 started as process ")]) == 2


def test_the_pane_says_where_the_earlier_lines_are(lab: Lab) -> None:
    shop = lab.deploy("shop", Consumer(lab.topic("orders", 1, Order), print), replicas=0)
    for number in range(500):
        shop.note("shop-0", f"line {number}")
    log = shop.log  # 500 lines, and two more if the machine was halted meanwhile
    lines = pane([shop])
    assert len(lines) == 200
    assert lines[0] == f"{len(log) - 199} earlier lines: lab.logs('shop', {len(log)})"
    clock, rest = lines[1].split(" ", 1)
    time.strptime(clock, "%H:%M:%S")
    assert rest == f"{log[-199].pod} | {log[-199].text}"
    assert lines[-1].endswith(log[-1].text)


def test_the_pane_calls_topics_by_their_short_names(lab: Lab) -> None:
    """Of a retry topic the full name is 120 characters; `lab.logs` tells it."""
    orders = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(orders, print), replicas=0)
    own = own_topic(orders.name, lab.run.name("shop"), "retry1-8s")
    shop.note("shop-0", f"{own}/0/17 failed, attempt 2: no")
    assert pane([shop])[-1].endswith(" shop-0 | orders_shop_retry1-8s/0/17 failed, attempt 2: no")
    assert shop.log[-1].text.startswith(own)
