"""One record's life is put together from what topics, pods and faults show, and claims nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from processes import wait_until

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.failures import FailedRecord, Retry, SetAside
from labkit.kafka.consumer.steps import Measured, Step
from labkit.kafka.records import Message, Record
from labkit.kafka.topics import Topic
from labkit.lab import telemetry
from labkit.lab.metrics import Fault
from labkit.lab.telemetry import Committed, Event, Failed, Handled, PodReport, Telemetry, ranges
from labkit.lab.trace import Row, Seen, life, related

T = 1_700_000_000.0
ORDERS, SHIPPED = "labkit.me.book.run.orders/2", "labkit.me.book.run.shipped/1"
ORDER = Seen(f"{ORDERS}/118", T, "c-1")


def shipped(at: float, pod: str, offset: int = 17) -> Seen:
    return Seen(f"{SHIPPED}/{offset}", T + at, "c-1", ORDER.place, pod)


def handled(at: float, first: int = 118, last: int = 118) -> Handled:
    return Handled(ORDERS, first, last, T + at)


def committed(at: float, position: int = 119) -> Committed:
    return Committed(ORDERS, position, T + at)


def report(
    at: float, pod: str, *events: Event, process: int = 1, holds: bool = True, state: str = "running"
) -> PodReport:
    assigned = [ORDERS] if holds else []
    return PodReport(pod.rpartition("-")[0], pod, process, T + at, state, assigned=assigned, events=list(events))


def fault(kind: str, target: str, start: float, end: float | None = None) -> Fault:
    return Fault(
        T + start, T + start if end is None else None if end < 0 else T + end, kind, target, f"{kind} {target}"
    )


def said(rows: Sequence[Row]) -> list[str]:
    return [" ".join((row.event, row.place, row.pod)).strip() for row in rows]


def test_the_life_of_the_example() -> None:
    rows = life(
        [ORDER, shipped(1, "shop-0"), shipped(7, "shop-1", 18)],
        [
            report(-1, "shop-0"),
            report(-1, "shop-1", holds=False, process=2),
            report(6.9, "shop-1", process=2),
            report(7.1, "shop-1", handled(7.1, 110, 130), process=2),
            report(7.2, "shop-1", committed(7.2, 131), process=2),
        ],
        [fault("kill", "shop-0", 1.1)],
    )
    assert said(rows) == [
        "produced orders/2/118",
        "handled orders/2/118 shop-0",
        "took effect shipped/1/17 shop-0",
        "kill orders/2/118 shop-0",
        "redelivered orders/2/118 shop-1",
        "took effect shipped/1/18 shop-1",
        "committed orders/2/118 shop-1",
    ]
    # As told by what was sent, rather than 0.2 s late.
    assert [round(row.time - T, 1) for row in rows] == [0, 1, 1, 1.1, 7, 7, 7.2]
    assert rows[1].detail == "shown by what it sent: it did not tell that the handler returned"
    assert rows[4].detail == "again: shop-0 had it before"


def test_a_pod_that_is_killed_without_a_word_is_not_said_to_have_handled() -> None:
    """It had the partition, so the crash may matter; nothing shows that it had the record."""
    rows = life(
        [ORDER], [report(-1, "shop-0"), report(7, "shop-1", handled(7), committed(7))], [fault("kill", "shop-0", 1)]
    )
    assert said(rows) == [
        "produced orders/2/118",
        "kill orders/2/118 shop-0",
        "handled orders/2/118 shop-1",
        "committed orders/2/118 shop-1",
    ]


def test_a_pod_that_failed_and_was_killed_makes_the_next_a_redelivery() -> None:
    failed = Failed(ORDER.place, 1, T + 1, "ValueError: no", 5.0)
    rows = life([ORDER], [report(1.2, "shop-0", failed), report(7, "shop-1", handled(7))], [fault("kill", "shop-0", 2)])
    assert said(rows)[1:] == [
        "failed orders/2/118 shop-0",
        "kill orders/2/118 shop-0",
        "redelivered orders/2/118 shop-1",
    ]
    assert rows[1].detail == "attempt 1, again in 5 s: ValueError: no"


def test_attempts_of_one_pod_are_one_delivery_and_what_a_failed_one_sent_is_its_own() -> None:
    failed = [Failed(ORDER.place, number, T + number, "ValueError: no", 1.0) for number in (1, 2)]
    reports = [
        report(-1, "shop-0"),
        report(2.1, "shop-0", *failed),
        report(3.2, "shop-0", handled(3.2), committed(3.2)),
    ]
    rows = life([ORDER, shipped(0.9, "shop-0"), shipped(3.1, "shop-0", 18)], reports, [])
    assert [(row.event, round(row.time - T, 1)) for row in rows] == [
        ("produced", 0),
        ("took effect", 0.9),
        ("failed", 1),
        ("failed", 2),
        ("handled", 3.1),
        ("took effect", 3.1),
        ("committed", 3.2),
    ]


def test_the_same_pod_after_its_restart_is_another_delivery() -> None:
    reports = [
        report(-1, "shop-0"),
        report(1, "shop-0", handled(1)),
        report(2, "shop-0", process=2),
        report(3, "shop-0", handled(3), committed(3), process=2),
    ]
    rows = life([ORDER, shipped(0.9, "shop-0"), shipped(2.9, "shop-0", 18)], reports, [fault("kill", "shop-0", 1.5)])
    kinds = [row.event for row in rows]
    assert kinds == ["produced", "handled", "took effect", "kill", "redelivered", "took effect", "committed"]


def test_a_report_that_had_to_be_repeated_is_no_redelivery() -> None:
    first = report(1, "shop-0", handled(1), committed(1))
    rows = life([ORDER], [first, report(6, "shop-0", handled(1), committed(1))], [])
    assert [row.event for row in rows] == ["produced", "handled", "committed"]


def test_a_late_result_of_a_frozen_pod_is_not_called_a_redelivery() -> None:
    reports = [
        report(-1, "shop-0"),
        report(7, "shop-1", handled(7), committed(7)),
        report(9, "shop-0", handled(9)),
    ]
    rows = life([ORDER], reports, [fault("freeze", "shop-0", 1, 8)])
    assert said(rows)[1:] == [
        "freeze orders/2/118 shop-0",
        "handled orders/2/118 shop-1",
        "committed orders/2/118 shop-1",
        "handled orders/2/118 shop-0",
    ]
    assert rows[-1].detail == "late: it was away when shop-1 had it"
    assert rows[1].detail.startswith("freeze shop-0, until ")


def test_only_faults_of_who_had_it_in_hand_and_of_kafka_are_told() -> None:
    reports = [
        report(-1, "shop-0"),
        report(-1, "shop-1", holds=False),
        report(1, "shop-0", handled(1), committed(2)),
        report(4, "mail-0", holds=False),
    ]
    faults = [
        fault("kill", "shop-1", 0.5),  # had another partition
        fault("kill", "mail-0", 0.5),
        fault("kill", "shop-0", -5),  # before it was sent
        fault("kill", "shop-0", 3),  # it was committed by then
        fault("slow", "shop-0", -2, -1),  # still stands: since before
        fault("kill", "Kafka", 0.2, 0.4),
        fault("freeze", "Kafka", 9, 10),
        fault("scale", "shop", 0.7, 0.8),
    ]
    rows = [row for row in life([ORDER], reports, faults) if row.event in ("kill", "slow", "kill", "freeze", "scale")]
    assert [(row.event, row.place, row.pod) for row in rows] == [
        ("slow", "orders/2/118", "shop-0"),
        ("kill", "", "Kafka"),
        ("scale", "orders/2/118", ""),
    ]
    assert rows[0].time == T
    assert "since 22:13:18 UTC, still stands" in rows[0].detail


def test_what_strikes_a_record_that_is_not_committed_yet_is_told() -> None:
    rows = life([ORDER], [report(-1, "shop-0"), report(1, "shop-0", handled(1))], [fault("kill", "shop-0", 60)])
    assert [row.event for row in rows] == ["produced", "handled", "kill"]


def test_a_commit_by_one_who_is_not_known_to_have_had_it_names_nobody() -> None:
    rows = life([ORDER], [report(-1, "shop-0"), report(5, "shop-1", committed(5, 200))], [])
    assert said(rows)[-1] == "committed orders/2/118"
    assert rows[-1].detail == "at the latest then: shop-1 committed all before orders/2/200"
    rows = life([ORDER], [report(5, "shop-1", committed(5, 118))], [])  # up to it, without it
    assert [row.event for row in rows] == ["produced"]


def test_what_belongs_to_a_record() -> None:
    other = Seen(f"{ORDERS}/119", T, "c-2")
    sibling = Seen(f"{SHIPPED}/3", T, "c-1")
    child = Seen(f"{SHIPPED}/4", T, "own", shipped(1, "shop-0").place, "mail-0")
    stranger = Seen(f"{SHIPPED}/5", T, None, other.place)
    plain = Seen(f"{SHIPPED}/6", T)
    everything = [ORDER, other, sibling, child, stranger, plain, shipped(1, "shop-0")]
    assert related(everything, {ORDER.place}) == [ORDER, sibling, child, shipped(1, "shop-0")]
    assert related(everything, {plain.place}) == [plain]


def test_ranges_are_merged() -> None:
    assert list(ranges([3, 1, 2, 7, 5, 6, 9, 2])) == [(1, 3), (5, 7), (9, 9)]
    assert list(ranges([])) == []


class Line:
    """In the place of a producer: keeps what is sent, and refuses what it is told to."""

    def __init__(self, *_: object, **__: object) -> None:
        self.reports: list[PodReport] = []
        self.refused, self.pending = 0, 0

    def send(self, topic: str, value: bytes, key: str) -> None:
        self.reports.append(msgspec.json.decode(value, type=PodReport))

    def unconfirmed(self, wait: float) -> int:
        return self.pending

    def flush(self, timeout: float) -> None:
        pass

    def events(self) -> list[Event]:
        return [event for report in list(self.reports) for event in report.events]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    line = Line()
    monkeypatch.setattr(telemetry, "Producer", lambda *_, **__: line)
    return line


@pytest.fixture
def spoken(line: Line) -> Iterator[Telemetry]:
    topic = Topic(Cluster("nowhere:1"), "telemetry", 1, PodReport)
    made = Telemetry(topic, "shop", "shop-0", 1)
    yield made
    made.close("stopped")


def a_record(offset: int) -> Record[Any]:
    record = cast(Record[Any], Record.__new__(Record))
    record.topic, record.partition, record.offset = "orders", 2, offset
    return record


def test_a_gauge_without_a_value_is_left_out_and_everything_else_is_told(spoken: Telemetry, line: Line) -> None:
    """JSON has no NaN: a report with one was never sent, nor any after it."""

    def gauges() -> dict[str, float]:
        return line.reports[-1].gauges if line.reports else {}

    spoken(Step.MEASURED, Measured({"requests": 1}, {"p50 ms": 1.0, "p99 ms": 2.0}))
    wait_until(lambda: gauges() == {"p50 ms": 1.0, "p99 ms": 2.0}, 5, "both figures")
    spoken(Step.MEASURED, Measured({"requests": 2}, {"p50 ms": math.nan, "p99 ms": 3.0, "rest": math.inf}))
    wait_until(lambda: gauges() == {"p99 ms": 3.0}, 5, "the one that is known")
    assert line.reports[-1].counts == {"requests": 2}
    spoken(Step.MEASURED, Measured({}, {"p50 ms": 4.0}))
    wait_until(lambda: gauges() == {"p50 ms": 4.0, "p99 ms": 3.0}, 5, "both again")
    for nonsense in (Measured({}, {"p50 ms": "soon"}), Measured({}, {"\ud800": 1.0})):  # type: ignore[dict-item]
        with pytest.raises(ValueError):  # noqa: PT011 - in the thread that measured it
            spoken(Step.MEASURED, nonsense)
    spoken(Step.MEASURED, Measured({"requests": 3}))
    wait_until(lambda: line.reports[-1].counts == {"requests": 3}, 5, "a report after that")


def test_a_pod_tells_once_what_it_did_in_the_order_in_which_it_did_it(spoken: Telemetry, line: Line) -> None:
    message = SimpleNamespace(topic=lambda: "orders", partition=lambda: 2, offset=lambda: 5)
    failed = FailedRecord(cast(Message, message), lambda failed: None)
    for again in (Retry(1.0), SetAside("elsewhere", None, None)):
        failed.fail(None, ValueError("no"))
        failed.decision = again
        spoken(Step.FAILED, failed)
    for offset in (7, 6, 9):
        spoken(Step.HANDLED, a_record(offset))
    spoken(Step.COMMITTED, {("orders", 2): 10})
    wait_until(lambda: line.events(), 5, "a report with events")
    spoken.close("stopped")
    events = line.events()
    assert [type(event) for event in events] == [Failed, Failed, Handled, Handled, Committed]
    assert [event.again_after for event in events if isinstance(event, Failed)] == [1.0, None]
    assert [(event.first, event.last) for event in events if isinstance(event, Handled)] == [(6, 7), (9, 9)]
    assert line.reports[-1].handled == 3
    assert [event.time for event in events] == sorted(event.time for event in events)


def test_more_than_one_report_may_carry_is_told_by_the_next_ones(spoken: Telemetry, line: Line) -> None:
    for offset in range(0, 5 * telemetry.EVENTS, 2):  # each a range of its own
        spoken(Step.HANDLED, a_record(offset))
    spoken.close("stopped")
    assert len(line.events()) == 2.5 * telemetry.EVENTS
    assert max(len(report.events) for report in line.reports) <= telemetry.EVENTS


def test_what_was_not_delivered_is_told_again_at_its_own_time(spoken: Telemetry, line: Line) -> None:
    line.pending = 1  # the broker is away
    spoken(Step.HANDLED, a_record(1))
    wait_until(lambda: line.events(), 5, "the first report")
    line.refused = 1
    wait_until(lambda: len(line.events()) == 2, 5, "the same again")
    first, again = line.events()
    assert first == again
    line.pending = 0  # delivered: not a third time
    spoken(Step.HANDLED, a_record(2))
    wait_until(lambda: len(line.events()) == 3, 5, "what came next")
    line.refused = 2
    count = len(line.reports)
    wait_until(lambda: len(line.reports) > count, 5, "a report")
    assert first not in line.events()[3:]
