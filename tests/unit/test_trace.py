"""One record's life is put together from what topics and faults show, and claims nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.lab.history import Fault
from labkit.lab.verdict.trace import Row, Seen, life, related

T = 1_700_000_000.0
ORDERS, SHIPPED = "labkit.me.book.run.orders/2", "labkit.me.book.run.shipped/1"
ORDER = Seen(f"{ORDERS}/118", T, "c-1")


def shipped(at: float, pod: str, offset: int = 17) -> Seen:
    return Seen(f"{SHIPPED}/{offset}", T + at, "c-1", ORDER.place, pod)


def fault(kind: str, target: str, start: float, end: float | None = None) -> Fault:
    """An instant without an `end`; a negative one: it still stands."""
    until = start if end is None else end
    return Fault(T + start, None if end is not None and end < 0 else T + until, kind, target, f"{kind} {target}")


def said(rows: Sequence[Row]) -> list[str]:
    return [" ".join(filter(None, (row.event, row.place, row.pod))) for row in rows]


def test_the_life_of_the_example() -> None:
    rows = life([shipped(7, "shop-1", 18), ORDER, shipped(1, "shop-0")], [fault("kill", "shop-0", 1.1)])
    assert said(rows) == [
        "produced orders/2/118",
        "handled orders/2/118 shop-0",
        "took effect shipped/1/17 shop-0",
        "kill shop-0",
        "redelivered orders/2/118 shop-1",
        "took effect shipped/1/18 shop-1",
    ]
    assert [round(row.time - T, 1) for row in rows] == [0, 1, 1, 1.1, 7, 7]
    assert rows[0].detail == "by a load or the notebook, correlation-id c-1"
    assert rows[4].detail == "again: shop-0 had it before"


def test_all_that_one_handling_sent_is_one_delivery_and_each_deployment_has_its_own() -> None:
    rows = life([ORDER, shipped(1, "shop-0"), shipped(1, "shop-0", 18), shipped(2, "mail-0", 19)], [])
    kinds = [(row.event, row.pod) for row in rows if row.event != "took effect"]
    assert kinds == [("produced", ""), ("handled", "shop-0"), ("handled", "mail-0")]


def test_the_same_pod_after_its_restart_is_another_delivery() -> None:
    for kind, target in (("kill", "shop-0"), ("death", "shop-0"), ("redeploy", "shop")):
        rows = life([ORDER, shipped(0.9, "shop-0"), shipped(2.9, "shop-0", 18)], [fault(kind, target, 1.5)])
        kinds = [row.event for row in rows]
        assert kinds == ["produced", "handled", "took effect", kind, "redelivered", "took effect"]
    rows = life([ORDER, shipped(0.9, "shop-0"), shipped(2.9, "shop-0", 18)], [fault("kill", "shop-1", 1.5)])
    assert "redelivered" not in [row.event for row in rows]


def test_a_late_result_of_a_frozen_pod_is_not_called_a_redelivery() -> None:
    freeze = fault("freeze", "shop-0", 1, 8)
    rows = life([ORDER, shipped(7, "shop-1"), shipped(9, "shop-0", 18)], [freeze])
    assert said(rows)[1:] == [
        "freeze shop-0",
        "handled orders/2/118 shop-1",
        "took effect shipped/1/17 shop-1",
        "handled orders/2/118 shop-0",
        "took effect shipped/1/18 shop-0",
    ]
    assert rows[4].detail == "late: it was away when shop-1 had it"
    assert rows[1].detail == "freeze shop-0, for 7.0 s"
    # It had sent something before: its late end is no second delivery either.
    rows = life([ORDER, shipped(0.5, "shop-0"), shipped(7, "shop-1", 18), shipped(9, "shop-0", 19)], [freeze])
    handled = [(row.event, row.pod) for row in rows if row.event in ("handled", "redelivered")]
    assert handled == [("handled", "shop-0"), ("redelivered", "shop-1")]


def test_faults_that_stood_meanwhile_are_told() -> None:
    faults = [
        fault("kill", "shop-0", -5),  # before it was sent
        fault("slow", "shop-0", -2, -1),  # still stands: since before
        fault("kill", "Kafka", 0.2, 0.4),
        fault("kill", "shop-0", 3),
    ]
    kinds = [row.event for row in life([ORDER, shipped(1, "shop-0")], faults)]
    assert kinds == ["slow", "produced", "kill", "handled", "took effect"]
    rows = life([ORDER], faults)  # nothing shows that it is done: what came later may be why
    assert said(rows) == ["slow shop-0", "produced orders/2/118", "kill Kafka", "kill shop-0"]
    assert rows[0].detail == "slow shop-0, still stands"


def test_what_a_retry_topic_brought_names_its_cause() -> None:
    """The lab has no such topic; its records bear the correlation id."""
    again = Seen(f"{SHIPPED}/4", T + 2, "c-1", "labkit.me.book.run.orders_shop_retry1-8s/0/3", "shop-0")
    assert said(life([ORDER, again], [])) == [
        "produced orders/2/118",
        "handled orders_shop_retry1-8s/0/3 shop-0",
        "took effect shipped/1/4 shop-0",
    ]


def test_what_belongs_to_a_record() -> None:
    other = Seen(f"{ORDERS}/119", T, "c-2")
    sibling = Seen(f"{SHIPPED}/3", T, "c-1")
    child = Seen(f"{SHIPPED}/4", T, "own", shipped(1, "shop-0").place, "mail-0")
    stranger = Seen(f"{SHIPPED}/5", T, None, other.place)
    plain = Seen(f"{SHIPPED}/6", T)
    everything = [ORDER, other, sibling, child, stranger, plain, shipped(1, "shop-0")]
    assert related(everything, {ORDER.place}) == [ORDER, sibling, child, shipped(1, "shop-0")]
    assert related(everything, {plain.place}) == [plain]
