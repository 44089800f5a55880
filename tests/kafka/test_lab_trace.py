"""`lab.trace`: one record's life, told by topics, pods and faults; and the log in which the same can be read."""

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
from labkit.kafka.consumer.failures import FailedRecord, Retry
from labkit.kafka.errors import LabkitError
from labkit.kafka.records import Record
from labkit.lab.deployment import Deployment, pane
from labkit.patterns.trails import own_topic
from labkit.runtime.connect import Connection

pytestmark = pytest.mark.usefixtures("connection")


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("trace")
    yield lab
    lab._end(0)


def events(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    return list(zip(table["event"], table["place"], table["pod"], strict=True))


def told(lab: Lab, order: int, event: str, times: int = 1) -> pd.DataFrame:
    """The trace, once it has an event: pods tell what they did 0.2 s later."""
    wait_until(lambda: (lab.trace(order)["event"] == event).sum() >= times, 30, f"{event} in the trace")
    return lab.trace(order)


class Shop:
    """Two pods ship orders; who first has order 17 is stuck between what it sends and its end, until `go` is there."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.orders, self.shipped = lab.topic("orders", 1, Order), lab.topic("shipped", 1, Shipped)
        shipped, begun, self.go = self.shipped, folder / "begun", folder / "go"
        go = self.go

        def ship(record: Record[Order]) -> None:
            shipped.deliver([(Shipped(record.value.id), record.key, None)])  # at once
            if record.value.id == 17 and not begun.exists():
                begun.touch()
                print("stuck")
                while not go.exists():
                    time.sleep(0.01)

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
    table = told(lab, 17, "took effect")  # it works while things still run
    assert events(table) == [
        ("produced", "orders/0/0", ""),
        ("handled", "orders/0/0", first),
        ("took effect", "shipped/0/0", first),
    ]
    assert table["detail"][1] == "shown by what it sent: it did not tell that the handler returned"
    shop.stuck.kill()
    table = told(lab, 17, "committed")
    by = table[table["event"] == "redelivered"]["pod"].iloc[0]  # the other one, or the first one's next process
    assert events(table) == [
        ("produced", "orders/0/0", ""),
        ("handled", "orders/0/0", first),
        ("took effect", "shipped/0/0", first),
        ("kill", "orders/0/0", first),
        ("redelivered", "orders/0/0", by),
        ("took effect", "shipped/0/1", by),
        ("committed", "orders/0/0", by),
    ]
    details = dict(zip(table["event"], table["detail"], strict=True))
    assert details["produced"].startswith("by a load or the notebook, correlation-id ")
    assert details["kill"] == f"kill pod {shop.stuck.index}"
    assert details["redelivered"] == f"again: {first} had it before"
    assert details["took effect"] == "caused by orders/0/0"
    assert list(table.columns) == ["time", "seconds", "event", "place", "pod", "detail"]
    assert table["seconds"].iloc[0] == 0
    assert table["seconds"].is_monotonic_increasing
    assert abs(table["time"].iloc[0].timestamp() - time.time()) < 60
    assert lab.trace("17").equals(lab.trace(17))
    behind = told(lab, 2, "committed")  # it was in the partition that went over, and nobody had handled it
    assert list(behind["event"]) == ["produced", "kill", "handled", "took effect", "committed"]
    assert set(behind["pod"][2:]) == {by}


@pytest.mark.long
def test_through_a_freeze_and_a_takeover(lab: Lab, shop: Shop) -> None:
    first, second = shop.stuck.name, shop.other.name
    shop.stuck.freeze()
    table = told(lab, 17, "committed")
    assert events(table) == [
        ("produced", "orders/0/0", ""),
        ("handled", "orders/0/0", first),
        ("took effect", "shipped/0/0", first),
        ("freeze", "orders/0/0", first),
        ("redelivered", "orders/0/0", second),
        ("took effect", "shipped/0/1", second),
        ("committed", "orders/0/0", second),
    ]
    assert table["detail"][3] == f"freeze pod {shop.stuck.index}, still stands"
    shop.stuck.recover()
    shop.go.touch()
    wait_until(
        lambda: lab.trace(17)["detail"].str.contains("returned .* s later").any(), 20, "the late end of a handler"
    )
    after = lab.trace(17)
    assert events(after) == events(table)  # its result is late: it handled once, and committed nothing
    assert "until" in after["detail"][3]


@pytest.mark.long
def test_through_a_back_off(lab: Lab, tmp_path: Path) -> None:
    source, target = lab.topic("orders", 1, Order), lab.topic("shipped", 1, Shipped)
    tries = tmp_path / "tries"

    def ship(record: Record[Order]) -> None:
        with tries.open("a") as file:
            file.write("x")
        if len(tries.read_text()) <= 2:
            raise ConnectionError(f"try {len(tries.read_text())}")
        target.send(Shipped(record.value.id))

    def soon(failed: FailedRecord) -> Retry:
        return Retry(0.01)  # both attempts within one report

    lab.deploy("shop", Consumer(source, ship, on_failure=soon))
    lab.load(source, orders(1)).wait()
    table = told(lab, 0, "committed")
    assert events(table) == [
        ("produced", "orders/0/0", ""),
        ("failed", "orders/0/0", "shop-0"),
        ("failed", "orders/0/0", "shop-0"),
        ("handled", "orders/0/0", "shop-0"),
        ("took effect", "shipped/0/0", "shop-0"),
        ("committed", "orders/0/0", "shop-0"),
    ]
    assert list(table["detail"][1:4]) == [
        "attempt 1, again in 0.01 s: ConnectionError: try 1",
        "attempt 2, again in 0.01 s: ConnectionError: try 2",
        "",
    ]


@pytest.mark.long
def test_a_handler_that_sends_nothing_in_key_order(lab: Lab) -> None:
    """Then only the pods know; and what is handled out of the order of offsets is told all the same."""
    source = lab.topic("orders", 2, Order)

    def wait(record: Record[Order]) -> None:
        time.sleep(record.value.id % 7 / 1000)

    lab.deploy("shop", Consumer(source, wait, order="key", workers=8), replicas=2)
    lab.load(source, orders(400), rate=2000).wait()
    assert lab.settle(30)
    told(lab, 399, "committed")
    for number in range(0, 400, 50):
        table = told(lab, number, "committed")
        assert list(table["event"]) == ["produced", "handled", "committed"]
        assert table["pod"][1] == table["pod"][2] != ""


@pytest.mark.long
def test_two_deployments_handle_a_record_each_once(lab: Lab) -> None:
    source = lab.topic("orders", 1, Order)
    for name in ("shop", "mailer"):
        lab.deploy(name, Consumer(source, lambda record: None))
    lab.load(source, orders(1)).wait()
    table = told(lab, 0, "committed", times=2)
    assert sorted(events(table)[1:]) == [
        ("committed", "orders/0/0", "mailer-0"),
        ("committed", "orders/0/0", "shop-0"),
        ("handled", "orders/0/0", "mailer-0"),
        ("handled", "orders/0/0", "shop-0"),
    ]


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
