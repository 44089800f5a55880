"""Every benchmark runs, on next to nothing: its figures mean nothing, but it is not broken when one wants them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from benchmarks import waiting
from benchmarks.bench import Bench
from benchmarks.command import BENCHMARKS

from labkit.runtime.home import STATE

pytestmark = pytest.mark.long
WAITS = waiting.WAITS[:100]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STATE, os.environ[STATE])  # so that it is what it was when the benchmarks are over
        for module, sizes in {
            "aggregating": {"CASES": {10: 300_000}},
            "consuming": {"RECORDS": 20_000},
            "importing": {"CONTACTS": 2_000, "PAGES": 3, "JOBS": 4, "RATE": 20, "EVERY": 0.1},
            "pictures": {"SECONDS": 1.0},
            "retrying": {"RATE": 50, "SECONDS": 1, "DELAY": 0.3, "WAITING": 50, "OUTAGE": 0.5, "SKIPS": 2},
            "sending": {"RECORDS": 2_000},
            "servers": {"RECORDS": 200},
            "stalls": {"KILLS": 1, "CALM": 0.5, "SLOW": 0.2, "TIMES": 2},
            "stores": {"GETS": 1_000, "ENTRIES": 1_000, "PUTS": 32, "AT_ONCE": 100, "CHANGES": 10},
            "transacting": {"RECORDS": 20_000, "RATE": 200, "SECONDS": 2},
            "views": {"RECORDS": 2_000, "SITES": 500, "SECONDS": 1.0, "UPDATES": 100},
            "waiting": {"RECORDS": len(WAITS), "WAITS": WAITS},
        }.items():
            for name, size in sizes.items():
                patch.setattr(f"benchmarks.{module}.{name}", size)
        with Bench(rounds=1) as bench:
            yield bench


@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_runs(bench: Bench, name: str) -> None:
    rows = list(BENCHMARKS[name](bench))
    assert rows
    assert not [row for row in rows if row.unit == "records" and row.missed], "records were lost, or retried early"
