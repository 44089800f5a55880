"""Load, settle, verdict and history of a lab: what they say is what is so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab_helpers import Order, Shipped, orders, wait_ready
from processes import wait_until

from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.effects import Effect, Sent
from labkit.kafka.errors import DeliveryFailed, LabkitError
from labkit.kafka.lag import lag
from labkit.kafka.producer import Producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.lab.verdict.evidence import effects
from labkit.lab.verdict.settling import Settled
from labkit.lab.verdict.verdict import NotValid
from labkit.runtime.which_kafka import Connection

pytestmark = pytest.mark.usefixtures("connection")


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("verdict")
    yield lab
    lab._end(0)


class Shop:
    """Orders that are shipped."""

    def __init__(self, lab: Lab, replicas: int = 1, takes: float = 0.0, until: Path | None = None) -> None:
        """Shipping takes so many seconds, or until a file is there."""
        self.orders = orders = lab.topic("orders", 2, Order)
        self.shipped = shipped = lab.topic("shipped", 2, Shipped)

        def ship(record: Record[Order]) -> None:
            time.sleep(takes)
            while until is not None and not until.exists():
                time.sleep(0.01)
            shipped.send(Shipped(record.value.id), key=record.key)

        del orders
        self.pods = lab.deploy("shop", Consumer(self.orders, ship), replicas)
        if replicas:
            wait_ready(self.pods)


@pytest.mark.long
def test_all_is_well(lab: Lab) -> None:
    shop = Shop(lab, 2)
    load = lab.load(shop.orders, orders(300), rate=300)
    verdict = lab.verdict(load, shop.shipped)
    assert verdict.check() == (
        "300 sent · 300 took effect · lost 0 · duplicated 0 · out of order 0 · unexpected 0"
        " · any extra is a redelivery after a fault, or was sent again"
    )
    assert repr(lab.settle()) == "settled: no lag, nothing waits"


@pytest.mark.long
def test_a_load_cell_that_runs_again_sends_the_same_orders_again(lab: Lab) -> None:
    shop = Shop(lab)
    board = lab.board(lag=shop.pods, completed=shop.shipped)
    lab.load(shop.orders, orders(200), rate=400).wait()
    lab.settle()
    again = lab.load(shop.orders, orders(200), rate=400)
    verdict = lab.verdict(again, shop.shipped)
    assert verdict.check().startswith("200 sent · 200 took effect · lost 0")
    assert len(verdict.of("sent again")) == 200
    assert "200 sent again" in verdict.explain()
    # The board counts orders, not records.
    wait_until(lambda: [row.now for row in board.table().itertuples() if row.metric == "completed"] == [200])
    assert [row.now for row in board.table().itertuples() if row.metric == "sent"] == [200]


@pytest.mark.long
def test_orders_of_another_load_are_no_surprise(lab: Lab) -> None:
    shop = Shop(lab)
    lab.load(shop.orders, orders(100), rate=400).wait()
    fewer = lab.load(shop.orders, orders(40, first=80), rate=400)
    verdict = lab.verdict(fewer, shop.shipped)
    assert verdict.check().startswith("40 sent · 40 took effect · 80 of other loads not looked at · lost 0")
    assert len(verdict.of("sent again")) == 20


@pytest.mark.long
def test_a_crash_loses_nothing_and_every_extra_has_its_fault(lab: Lab) -> None:
    shop = Shop(lab, 2, takes=0.01)
    load = lab.load(shop.orders, orders(400), rate=150)
    lab.when(lambda: shop.pods.pods[0].handled > 20, shop.pods.pods[0].kill)
    verdict = lab.verdict(load, shop.shipped)
    verdict.check()
    assert {extra.fault.kind for extra in verdict.of("redelivered") if extra.fault} <= {"kill"}
    assert shop.pods.restarts == 1


@pytest.mark.long
def test_an_eviction_that_nobody_ordered_explains_its_extras(lab: Lab) -> None:
    shop = Shop(lab, 2, takes=0.02)
    load = lab.load(shop.orders, orders(1000), rate=100)
    wait_until(lambda: min(pod.handled for pod in shop.pods.pods) > 20, 20, "both at work")
    stopped_pod, other = shop.pods.pods
    child = stopped_pod.child
    assert child
    os.kill(child.pid, signal.SIGSTOP)
    stopped = time.time()
    wait_until(lambda: other.report and len(other.report.assigned) == 2, 20, "its partition at the other pod")
    os.kill(child.pid, signal.SIGCONT)
    wait_until(lambda: any(fault.kind == "eviction" for fault in lab.faults), 10, "the eviction")
    # The first one: on a machine that stands still for seconds itself, more may follow, of either pod.
    fault = next(fault for fault in lab.faults if fault.target == "shop-0")
    assert (fault.kind, fault.text) == ("eviction", "shop-0 lost its partitions")
    assert fault.start <= stopped + 0.5
    lab.verdict(load, shop.shipped).check()


@pytest.mark.long
def test_records_that_do_not_decode_are_not_called_lost(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop(lab)
    load = lab.load(shop.orders, orders(3), rate=1000)
    board = lab.board(lag=shop.pods, completed=shop.shipped)
    board.close()
    assert lab.verdict(load, shop.shipped).result == "valid"
    sender = Producer(lab.cluster)
    sender.send(shop.shipped.name, b"not json", partition=0)
    sender.flush()
    verdict = lab.verdict(load, shop.shipped, timeout=0)
    assert verdict.result == "unknown"
    assert (verdict.reason or "").startswith("1 record of shipped does not decode: shipped/0/")
    capsys.readouterr()
    assert len(lab.records(shop.shipped)) == 3
    assert "Not shown: 1 record of shipped does not decode: shipped/0/" in capsys.readouterr().out
    wait_until(
        lambda: "1 record of shipped does not decode" in lab._status([lab.deployments["shop"]]), 20, "the status line"
    )


def test_a_load_that_is_done_holds_no_threads(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    lab.load(topic, orders(1)).wait()
    before = psutil.Process().num_threads()
    for number in range(5):
        lab.load(topic, orders(1, number)).wait()
    wait_until(lambda: psutil.Process().num_threads() <= before + 1, 5, "the end of their threads")


@pytest.mark.long
def test_a_frozen_pod_is_no_reason_to_wait(lab: Lab) -> None:
    shop = Shop(lab)
    shop.pods.pods[0].freeze()
    load = lab.load(shop.orders, orders(5), rate=1000)
    settled = lab.settle(600)  # longer than a test may take
    assert repr(settled) == "unknown: shop-0 is frozen: recover it first"
    verdict = lab.verdict(load, shop.shipped, timeout=0)
    assert verdict.result == "unknown"
    assert verdict.of("lost") == []  # nothing is claimed
    with pytest.raises(NotValid, match="unknown: shop-0 is frozen"):
        verdict.check()
    shop.pods.pods[0].recover()
    assert lab.verdict(load, shop.shipped).check().startswith("5 sent · 5 took effect")


@pytest.mark.long
def test_work_in_hand_is_unknown_with_its_reason(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop(lab, takes=60)
    load = lab.load(shop.orders, orders(4), rate=1000)
    load.wait()
    verdict = lab.verdict(load, shop.shipped, timeout=0.3)
    assert str(verdict).startswith("unknown: shop is 4 records behind · 4 sent · 0 took effect so far")
    assert repr(lab.settle(0.3)) == "unknown: after 0.3 s: shop is 4 records behind"
    load = lab.load(shop.orders, orders(1000, 100), rate=5)
    assert lab.settle(0.3).reason == "after 0.3 s: the load on orders still sends"
    load.stop()
    capsys.readouterr()
    lab.verdict(load, shop.shipped, timeout=0)
    shop.pods.note("shop-0", "hello")
    lab.logs("shop")
    assert "shop-0: hello" in capsys.readouterr().out
    with pytest.raises(LabkitError, match="no deployment 'shop1' in this lab: there is shop"):
        lab.logs("shop1")


@pytest.mark.long
def test_what_comes_to_rest_while_the_verdict_reads_is_not_lost(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_read = tmp_path / "has read"
    shop = Shop(lab, until=has_read)
    load = lab.load(shop.orders, orders(10), rate=1000)
    load.wait()

    def read_and_dawdle(topic: Topic[object], identify: Callable[[object], str]) -> tuple[list[Effect], str | None]:
        seen = effects(topic, identify)
        has_read.touch()
        wait_until(lambda: lab.unsettled() is None, 20, "the rest")
        return seen

    with monkeypatch.context() as patch:
        patch.setattr("labkit.lab.verdict.evidence.effects", read_and_dawdle)
        verdict = lab.verdict(load, shop.shipped, timeout=0)
    assert verdict.result == "unknown"
    assert "shop is" in (verdict.reason or "")
    assert lab.verdict(load, shop.shipped, timeout=0).check().startswith("10 sent · 10 took effect · lost 0")


@pytest.mark.long
def test_a_content_is_read_once_the_lab_has_settled(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    may_ship, settle = tmp_path / "may ship", lab.settle
    shop = Shop(lab, until=may_ship)
    lab.load(shop.orders, orders(5), rate=1000).wait()
    truth = {str(number): number for number in range(5)}

    def content() -> dict[str, int]:
        with Reader(shop.shipped) as reader:
            return {str(record.value.id): record.value.id for record in reader.read_to_end()}

    found = lab.verdict(truth, content, name="shipped", timeout=0.3)
    assert str(found).startswith("unknown: shipped: shop is 5 records behind · 5 sent · 0 took effect so far")

    def ship_and_settle(timeout: float) -> Settled:
        may_ship.touch()
        return settle(timeout)

    monkeypatch.setattr(lab, "settle", ship_and_settle)
    found = lab.verdict(truth, content())  # read before anything was shipped: nothing is lost for that
    assert found.result == "unknown"
    assert "(shop is 5 records behind): give a function that reads it" in (found.reason or "")
    assert lab.verdict(truth, content, name="shipped").check() == (
        "shipped: 5 sent · 5 took effect · lost 0 · wrong 0 · unexpected 0"
    )
    assert lab.verdict(truth | {"4": 5}, content()).of("wrong")[0].explanation == "4 instead of 5"


def test_a_ledger_is_as_good_as_a_topic(lab: Lab) -> None:
    told = [Sent("a", None, 0), Sent("b", None, 1), Sent("c", None, 2)]
    made = [Effect(name, None, f"ledger/{number}", 1e9 + number) for number, name in enumerate("aac")]
    assert lab.verdict(told, made, exactly_once=True, rejected=["b"]).of("duplicated")[0].place == "ledger/1"
    found = lab.verdict(told, lambda: made[1:], early=list, rejected=lambda: ["b"])
    first, below = found.check().splitlines()
    assert first.startswith("3 sent · 2 took effect · lost 0 · duplicated 0 · early 0 · unexpected 0 · rejected 1 · ")
    assert below == "  rejected: b"


@pytest.mark.parametrize(
    ("sent", "done", "told"),
    [
        (["a"], [], "what was sent is loads, .*, not 'a'"),
        ([Sent("a", None, 0)], ["a"], "what took effect is a topic, .*, not 'a'"),
        ({"a": 1}, [], "give `done` as a mapping"),
    ],
)
def test_what_cannot_be_compared_is_refused(lab: Lab, sent: Any, done: Any, told: str) -> None:
    with pytest.raises(LabkitError, match=told):
        lab.verdict(sent, done)


@pytest.mark.long
def test_what_is_planned_has_to_happen_first(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(lab)
    allowed = False
    lab.when(lambda: allowed, shop.pods.pods[0].kill)
    with monkeypatch.context() as patch:
        patch.setattr("labkit.lab.verdict.settling.QUIET", 60.0)  # what nothing can bring about any more is dropped
        assert "planned (kill) waits for its condition" in lab.settle(0.3).reason
    allowed = True
    assert lab.settle(20)
    wait_until(lambda: shop.pods.restarts == 1, 20, "the crash to be noticed")

    def wrong() -> None:
        raise KeyError("x")

    lab.when(lambda: True, wrong)
    wait_until(lambda: "failed" in (lab.unsettled() or ""), 20)
    assert lab.settle(60).reason == "planned (wrong) failed: KeyError: 'x'"


@pytest.mark.long
def test_a_load_keeps_its_rate(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    begun = looked = time.monotonic()
    load = lab.load(topic, orders(300), rate=200)
    while not (load.count or load.done):  # up to 1 s until the client is ready
        begun, looked = looked, time.monotonic()  # before a look that saw none
        time.sleep(0.01)
    load.wait(10)
    assert time.monotonic() - begun > 1.4  # told: 1.5
    assert load.done
    assert load.count == 300
    assert repr(load) == "Load: 300 sent to orders, done"
    sent = load.sent
    assert [one.id for one in sent] == [str(number) for number in range(300)]
    assert all(one.confirmed for one in sent)


@pytest.mark.long
def test_a_lossy_producer_is_found_out(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    send, dropped = Producer.send, []

    def lossy(
        self: Producer,
        topic: str,
        value: bytes | None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        partition: int = -1,
    ) -> None:
        if topic.endswith("orders") and key in ("7", "42"):
            dropped.append(key)
            return
        send(self, topic, value, key, headers, partition)

    monkeypatch.setattr(Producer, "send", lossy)
    shop = Shop(lab)
    verdict = lab.verdict(lab.load(shop.orders, orders(100), rate=1000), shop.shipped)
    assert dropped == ["7", "42"]
    with pytest.raises(NotValid, match=r"invalid: 100 sent · 98 took effect · lost 2 [^\n]*\n  lost: 7, 42"):
        verdict.check()


@pytest.mark.long
def test_a_broker_that_refuses_is_an_error_of_the_load(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    lab.cluster.delete_topics([topic.name])
    other = lab.topic("others", 1, Order)
    fine = lab.load(other, orders(300), rate=100)
    load = lab.load(topic, orders(10), rate=1000)
    wait_until(lambda: load.done, 20, "the load's end")
    assert "DeliveryFailed: " in (load.error or "")
    assert topic.name in (load.error or "")
    assert "failed: DeliveryFailed" in repr(load)
    assert load.count == 0
    with pytest.raises(DeliveryFailed):
        load.wait()
    assert "the load on orders failed: DeliveryFailed" in lab.settle(600).reason  # longer than a test may take
    fine.wait()  # none of its business
    assert fine.count == 300


@pytest.mark.long
def test_a_load_that_failed_is_made_good_by_running_its_cell_again(lab: Lab) -> None:
    shop = Shop(lab)

    def broken() -> Iterator[Order]:
        yield Order(1)
        raise ValueError("no more orders")

    lab.load(shop.orders, broken(), rate=1000)
    wait_until(lambda: "no more orders" in (lab.unsettled() or ""), 5)
    again = lab.load(shop.orders, orders(5), rate=1000)
    verdict = lab.verdict(again, shop.shipped, timeout=20)
    assert verdict.check().startswith("5 sent · 5 took effect · lost 0")


@pytest.mark.long
def test_a_load_cell_that_runs_again_is_valid_and_says_resent(lab: Lab) -> None:
    shop = Shop(lab)
    for _ in range(2):
        load = lab.load(shop.orders, orders(50), rate=1000)
        load.wait()
    verdict = lab.verdict(load, shop.shipped)
    assert verdict.check().startswith("50 sent · 50 took effect · lost 0")
    assert len(verdict.of("sent again")) == 50


def test_values_without_the_id_are_named(lab: Lab) -> None:
    shop = Shop(lab)
    load = lab.load(shop.orders, [{"number": 1}], rate=1000)  # type: ignore[list-item]
    wait_until(lambda: load.done, 5)
    assert "{'number': 1} has no field 'id': name its id by" in (load.error or "")
    load = lab.load(shop.orders, orders(1), rate=1000, by="customer")
    load.wait()
    lab.settle()
    with pytest.raises(LabkitError, match=r"Shipped\(id=0\) has no field 'customer'"):
        lab.verdict(load, shop.shipped, by="customer", timeout=0)


@pytest.mark.long
def test_a_tombstone_is_no_effect(lab: Lab) -> None:
    shop = Shop(lab)
    lab.board(lag=shop.pods, completed=shop.shipped).close()
    load = lab.load(shop.orders, orders(3), rate=1000)
    load.wait()
    shop.shipped.send(None, key="1")
    shop.shipped.flush()
    assert lab.verdict(load, shop.shipped).check().startswith("3 sent · 3 took effect")
    completed = "metric == 'completed' and label == 'shipped' and value == 3"
    wait_until(lambda: len(lab.history().query(completed)), 20, "the count of three")


@pytest.mark.long
def test_the_history_is_tidy_and_its_lag_is_the_real_one(lab: Lab) -> None:
    shop = Shop(lab, 0)
    lab.board(lag=shop.pods, completed=shop.shipped).close()
    lab.load(shop.orders, orders(40), rate=1000).wait()

    def seen() -> dict[str, float]:
        frame = lab.history().query("metric == 'lag'")
        return dict(frame.groupby("label")["value"].last().items()) if len(frame) else {}  # type: ignore[arg-type]

    wait_until(lambda: sum(seen().values()) == 40, 20, "the lag")
    assert shop.pods.group
    real = lag(lab.cluster, shop.pods.group, [shop.orders.name])
    assert seen() == {f"orders/{number}": count for (_, number), count in real.items()}
    shop.pods.scale(2)
    lab.settle()
    wait_until(lambda: sum(seen().values()) == 0, 20, "no lag")
    wait_until(lambda: lab.history().query("metric == 'completed'")["value"].max() == 40, 20, "what took effect")
    wait_until(lambda: lab.history().query("metric == 'pods'")["value"].iloc[-1] == 2, 20, "both pods")
    frame = lab.history()
    assert list(frame.columns) == ["time", "seconds", "metric", "label", "value"]
    assert {str(kind) for kind in frame.dtypes[["seconds", "value"]]} == {"float64"}
    assert str(frame["time"].dtype).startswith("datetime64")
    assert not frame.isna().any().any()
    wanted = {"lag", "waiting", "redelivered", "failed", "sent", "completed", "pods", "rate"}
    assert wanted <= set(frame["metric"])
    newest = {metric: rows["value"].iloc[-1] for metric, rows in frame.groupby("metric")}
    assert (newest["sent"], newest["completed"], newest["redelivered"], newest["pods"]) == (40, 40, 0, 2)


def test_a_topic_of_an_impossible_type_is_refused(lab: Lab) -> None:
    with pytest.raises(LabkitError, match="values of topic orders cannot be of type"):
        lab.topic("orders", 1, Order | Shipped)  # type: ignore[arg-type]
    with pytest.raises(LabkitError, match="1 to 1000 partitions, not '4'"):
        lab.topic("orders", "4", Order)  # type: ignore[arg-type]


def test_a_topic_of_the_lab_knows_its_short_name(lab: Lab) -> None:
    topic: Topic[Order] = lab.topic("orders", 1, Order)
    assert topic.short == "orders"
    assert topic.name == lab.run.prefix + "orders"
    assert topic.name in lab.cluster.topics()


@pytest.mark.long
def test_a_verdict_says_what_of_other_loads_it_does_not_look_at(lab: Lab) -> None:
    """As when a cell with new orders was run twice, and its name stands for the second lot."""
    shop = Shop(lab)
    first = lab.load(shop.orders, orders(20), rate=1000)
    second = lab.load(shop.orders, orders(30, 20), rate=1000)
    assert (
        lab.verdict(second, shop.shipped)
        .check()
        .startswith("30 sent · 30 took effect · 20 of other loads not looked at · ")
    )
    assert lab.verdict([first, second], shop.shipped).check().startswith("50 sent · 50 took effect · lost 0")


@pytest.mark.long
def test_what_earlier_loads_sent_is_known_though_a_cell_made_its_type_anew(lab: Lab) -> None:
    """A class in a cell that runs again is another class, and the topic the same."""
    shop = Shop(lab)
    lab.load(shop.orders, orders(20), rate=1000)

    @dataclass
    class Anew:
        id: int

    again = lab.topic("orders", shop.orders.partitions, Anew)
    second = lab.load(again, (Anew(number) for number in range(20, 50)), rate=1000)
    found = lab.verdict(second, shop.shipped)
    assert found.check().startswith("30 sent · 30 took effect · 20 of other loads not looked at · lost 0")
