"""What a benchmark found, and how it is printed."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

HEAD = ("work", "peer", "ours", "ratio", "goal")
MISSED = "✗"


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio, or on our own figure where there is no peer."""

    sign: Literal["≥", "≤"]
    bound: float

    def met(self, value: float) -> bool:
        return value >= self.bound if self.sign == "≥" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One line of the table. A peer's figure is one of which more is better (records a second)."""

    work: str
    ours: float
    unit: str
    peer: float | None = None
    goal: Goal | None = None
    note: str = ""
    """Who the peer is, and what else one must know to judge the figures."""

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.ours / self.peer

    @property
    def missed(self) -> bool:
        """Whether there is a goal that was not reached."""
        return self.goal is not None and not self.goal.met(self.ours if self.ratio is None else self.ratio)

    def cells(self) -> tuple[str, ...]:
        """What the table shows: see HEAD."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        goal = "" if self.goal is None else f"{self.goal}{f' {MISSED} missed' if self.missed else ''}"
        peer = "" if self.peer is None else amount(self.peer, self.unit)
        return self.work, peer, amount(self.ours, self.unit), ratio, goal

    def plain(self) -> dict[str, Any]:
        """As JSON has it. `met` is null without a goal."""
        goal = None if self.goal is None else str(self.goal)
        met = None if self.goal is None else not self.missed
        return {
            "work": self.work,
            "peer": self.peer,
            "ours": self.ours,
            "unit": self.unit,
            "ratio": self.ratio,
            "goal": goal,
            "met": met,
            "note": self.note,
        }


def amount(value: float, unit: str) -> str:
    """A figure with three digits that count: 1,234,567 → `1,230,000`, 0.98765 → `0.988`."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f} {unit}" if abs(rounded) >= 100 else f"{rounded:g} {unit}"


@dataclass(frozen=True)
class Moment:
    """How busy the machine was, and how fast: absolute figures mean little without."""

    load: float
    """Load average of the last minute."""
    pace: float
    """Milliseconds of CPU that one fixed piece of Python takes: what shares the core makes it slower."""

    @classmethod
    def now(cls) -> Moment:
        tries = []
        for _ in range(5):
            began = time.thread_time()
            sum(range(2_000_000))
            tries.append(time.thread_time() - began)
        return cls(round(os.getloadavg()[0], 2), round(min(tries) * 1000, 1))


@dataclass(frozen=True)
class Machine:
    """Where and with what was measured."""

    cores: int
    system: str
    versions: dict[str, str]
    before: Moment
    after: Moment

    def lines(self) -> list[str]:
        """For people."""
        busy = f"load average {self.before.load:.2f} before, {self.after.load:.2f} after (the benchmarks' own included)"
        pace = f"a fixed loop of Python: {self.before.pace:g} ms before, {self.after.pace:g} ms after"
        tools = (f"{name} {version}" for name, version in self.versions.items())
        return [f"{busy} · {pace}", " · ".join([f"{self.cores} cores, {self.system}", *tools])]


def measured(before: Moment) -> Machine:
    """This machine, after the benchmarks that began at `before`."""
    system = f"{platform.system()} {platform.machine()}"
    return Machine(os.cpu_count() or 1, system, versions(), before, Moment.now())


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    import confluent_kafka

    from labkit.runtime.jars import KAFKA
    from labkit.runtime.java import find_java

    return {
        "Python": platform.python_version(),
        "confluent-kafka": str(confluent_kafka.version()),
        "librdkafka": str(confluent_kafka.libversion()[0]),
        "Kafka": KAFKA,
        "Java": str(find_java().version),
    }


def text_table(rows: Sequence[Row], machine: Machine) -> str:
    """For a terminal: figures to the right, what must be known of a row below it."""
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    shown = []
    for number, cells in enumerate(lines):
        work, *figures = (
            cell.ljust(width) if column in (0, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        shown.append("  ".join([work, *figures]).rstrip())
        if number and (note := rows[number - 1].note):
            shown.append(f"    {note}")
    return "\n".join([*shown, "", *machine.lines()])


def markdown_table(rows: Sequence[Row], machine: Machine) -> str:
    """For `docs/benchmarks.md`."""
    lines = [(*HEAD, "note"), ("---", "--:", "--:", "--:", "---", "---"), *((*row.cells(), row.note) for row in rows)]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", "  \n".join(machine.lines())])


def json_document(rows: Sequence[Row], machine: Machine) -> str:
    """For programs: `rows`, and the `machine` they were measured on."""
    document = {"rows": [row.plain() for row in rows], "machine": asdict(machine)}
    return json.dumps(document, indent=2, ensure_ascii=False)
