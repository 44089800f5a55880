"""The history keeps what draws the same lines, and little more."""

from __future__ import annotations

from itertools import pairwise

from labkit.lab.history import Fault, History, Sample

TICK = 0.25


def record(history: History, values: list[float], label: str = "a") -> None:
    for number, value in enumerate(values):
        history.record([Sample(number * TICK, "lag", label, value)])


def test_a_value_that_stays_is_kept_every_two_seconds() -> None:
    history = History()
    record(history, [5.0] * 1001)
    assert len(history._samples) == 1000 * TICK / 2 + 1
    times = [sample.time for sample in history.samples]
    assert max(after - before for before, after in pairwise(times)) <= 2.0
    assert times[-1] == 1000 * TICK  # the newest is always there


def test_both_ends_of_a_change_are_kept() -> None:
    history = History()
    record(history, [0.0, 0.0, 0.0, 0.0, 7.0, 7.0, 7.0])
    points = [(sample.time / TICK, sample.value) for sample in history.samples]
    assert points == [(0, 0.0), (3, 0.0), (4, 7.0), (6, 7.0)]
    assert history.snapshot().changed == 4 * TICK


def test_a_series_that_falls_silent_keeps_its_last_value_and_the_order_of_time() -> None:
    history = History()
    history.record([Sample(0.0, "lag", "a", 1.0), Sample(0.0, "lag", "b", 1.0)])
    history.record([Sample(0.25, "lag", "a", 1.0), Sample(0.25, "lag", "b", 1.0)])
    for number in range(2, 20):
        history.record([Sample(number * TICK, "lag", "b", float(number))])
    assert [sample.time for sample in history.samples if sample.label == "a"] == [0.0, 0.25]
    times = [sample.time for sample in history.samples]
    assert times == sorted(times)
    assert [sample.time for sample in history.snapshot(since=4.0).samples] == [4.0, 4.25, 4.5, 4.75]


def test_a_recovery_ends_all_that_stands() -> None:
    history = History()
    for start in (1.0, 2.0):
        history.note("scale", "shop", f"scale at {start}", stands=True, since=start)
    history.note("scale", "other", "scale", stands=True, since=2.5)
    assert history.end("scale", "shop", 3.0) == Fault(2.0, 3.0, "scale", "shop", "scale at 2.0")
    assert [fault.target for fault in history.standing()] == ["other"]
    assert history.end("scale", "shop", 4.0) is None
