"""What was handled again is told from what pods report, each event counted once."""

from __future__ import annotations

import itertools
import random

import pytest

from labkit.lab.telemetry import Handled, PodReport, Repeats, merge


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_offsets_are_counted_as_a_set_would(seed: int) -> None:
    chance = random.Random(seed)
    runs: list[tuple[int, int]] = []
    seen: set[int] = set()
    for _ in range(200):
        first = chance.randrange(300)
        offsets = set(range(first, first + chance.choice((1, 1, 2, 5, 40))))
        assert merge(runs, first, max(offsets)) == len(offsets & seen)
        seen |= offsets
        assert {offset for begin, end in runs for offset in range(begin, end + 1)} == seen
        assert all(before[1] + 1 < after[0] for before, after in itertools.pairwise(runs))


def report(pod: str, *events: Handled, process: int = 1, deployment: str = "shop") -> PodReport:
    return PodReport(deployment, pod, process, 9.0, events=list(events))


def test_a_record_that_two_pods_handle_is_told_once_for_each_repeat() -> None:
    repeats = Repeats()
    repeats.add(report("shop-0", Handled("orders/0", 0, 9, 1.0), Handled("orders/1", 0, 4, 1.0)))
    repeats.add(report("shop-1", Handled("orders/0", 5, 14, 2.0)))
    repeats.add(report("shop-0", Handled("orders/0", 5, 5, 3.0), process=2))
    repeats.add(report("mail-0", Handled("orders/0", 0, 9, 4.0), deployment="mail"))
    assert repeats.counts == {"shop": 6, "mail": 0}


def test_an_event_that_is_told_twice_is_no_repeat() -> None:
    repeats = Repeats()
    told = [Handled("orders/0", 0, 9, 1.0), Handled("orders/1", 0, 9, 1.0)]
    repeats.add(report("shop-0", *told))
    repeats.add(report("shop-0", Handled("orders/0", 20, 21, 3.0)))
    repeats.add(report("shop-0", *told, Handled("orders/0", 10, 11, 2.0)))  # the first ones were in doubt
    assert repeats.counts == {"shop": 0}
    repeats.add(report("shop-1", Handled("orders/0", 10, 10, 4.0)))
    assert repeats.counts == {"shop": 1}
