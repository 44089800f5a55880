"""What a pod says of itself: every figure that is known, and again what was not delivered."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import pytest
from processes import wait_until

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Measured, Step
from labkit.kafka.topics import Topic
from labkit.lab.pods import telemetry
from labkit.lab.pods.telemetry import PodReport, Telemetry


class Line:
    """In the place of a producer: keeps what is sent."""

    def __init__(self, *_: object, **__: object) -> None:
        self.reports: list[PodReport] = []

    def send(self, topic: str, value: bytes, key: str) -> None:
        self.reports.append(msgspec.json.decode(value, type=PodReport))

    def flush(self, timeout: float) -> None:
        pass


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
    made.close()


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


def test_what_was_not_delivered_is_told_again(monkeypatch: pytest.MonkeyPatch, spoken: Telemetry, line: Line) -> None:
    monkeypatch.setattr(telemetry, "AGAIN", 0.1)
    for _ in range(3):
        spoken(Step.HANDLED, None)
    spoken(Step.FAILED, None)
    wait_until(lambda: line.reports and line.reports[-1].handled == 3, 5, "the first report")
    count = len(line.reports)  # the broker was away, and nothing has changed since
    wait_until(lambda: len(line.reports) > count, 5, "the same again")
    assert (line.reports[-1].handled, line.reports[-1].failed) == (3, 1)
    spoken(Step.HANDLED, None)
    spoken.close()
    assert line.reports[-1].handled == 4
