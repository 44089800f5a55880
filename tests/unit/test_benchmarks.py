"""The table of `make bench`: ratios, goals, and the forms it is printed in. What is measured is no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import command
from benchmarks.bench import Bench
from benchmarks.report import Goal, Machine, Moment, Row, amount, json_document, markdown_table, text_table

FOLDER = Path(command.__file__).parent
MACHINE = Machine(2, "Linux x86_64", {"Python": "3.11.7", "Kafka": "4.3.1"}, Moment(0.5, 30.0), Moment(1.75, 31.5))
REACHED = Row("consume", 950_000, "records/s", 1_000_000, Goal("≥", 0.9), "peer: by hand")
SLOW = Row("send", 899_999, "records/s", 1_000_000, Goal("≥", 0.9))
START = Row("start", 1.0, "s", goal=Goal("≤", 1.0))
LATE = Row("kill", 3.01, "s", goal=Goal("≤", 3.0))
PLAIN = Row("bare", 10.0, "records/s", 40.0)


def test_ratio_is_ours_by_the_peers() -> None:
    assert [row.ratio for row in (REACHED, PLAIN, START)] == [0.95, 0.25, None]


def test_a_goal_bounds_the_ratio_or_without_a_peer_the_figure() -> None:
    assert [row.missed for row in (REACHED, SLOW, START, LATE, PLAIN)] == [False, True, False, True, False]
    assert Row("fast", 9.0, "s", 10.0, Goal("≥", 0.9)).missed is False
    assert Row("lost", 1, "records", goal=Goal("≤", 0)).missed


def test_figures_have_three_digits() -> None:
    assert [amount(value, "s") for value in (1_234_567, 999.6, 12.345, 0.98765, 0)] == [
        *("1,230,000 s", "1,000 s", "12.3 s", "0.988 s", "0 s")
    ]


def test_table() -> None:
    table, machine = text_table([REACHED, LATE], MACHINE).split("\n\n")
    assert table.splitlines() == [
        "work                    peer               ours  ratio  goal",
        "consume  1,000,000 records/s  950,000 records/s   0.95  ≥ 0.9",
        "    peer: by hand",
        "kill                                     3.01 s         ≤ 3 ✗ missed",
    ]
    assert "load average 0.50 before, 1.75 after" in machine
    assert machine.splitlines()[1] == "2 cores, Linux x86_64 · Python 3.11.7 · Kafka 4.3.1"


def test_markdown_has_a_column_for_notes() -> None:
    lines = markdown_table([REACHED, LATE], MACHINE).splitlines()
    assert lines[0] == "| work | peer | ours | ratio | goal | note |"
    assert lines[2] == "| consume | 1,000,000 records/s | 950,000 records/s | 0.95 | ≥ 0.9 | peer: by hand |"
    assert lines[3] == "| kill |  | 3.01 s |  | ≤ 3 ✗ missed |  |"
    assert {line.count("|") for line in lines[:4]} == {7}


def test_json() -> None:
    document = json.loads(json_document([SLOW, PLAIN], MACHINE))
    assert [(row["work"], row["ours"], row["goal"], row["met"]) for row in document["rows"]] == [
        ("send", 899_999, "≥ 0.9", False),
        ("bare", 10.0, None, None),
    ]
    assert document["rows"][1]["ratio"] == 0.25
    assert document["machine"]["before"] == {"load": 0.5, "pace": 30.0}
    assert document["machine"]["versions"]["Kafka"] == "4.3.1"


def test_runs_take_turns_and_the_median_round_counts(tmp_path: Path) -> None:
    turns: list[str] = []
    figures = {"a": iter([0.0, 9.0, 30.0, 2.0]), "b": iter([10.0, 60.0, 1.0])}  # the machine was faster in the second

    def run(name: str) -> float:
        turns.append(name)
        return next(figures[name])

    found = Bench(rounds=3).alternate({"a": lambda: run("a"), "b": lambda: run("b")})
    assert "".join(turns) == "aababab", "the first run warms up"
    assert {name: one.rate for name, one in found.items()} == {"a": 9.0, "b": 10.0}


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["consume", "cosnume"], ["--rounds", "0"]])
def test_what_is_unknown_is_refused(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, str(FOLDER), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    if "cosnume" in arguments:
        assert f"there is no benchmark cosnume; there are {', '.join(command.BENCHMARKS)}" in done.stderr


@pytest.mark.parametrize(("form", "starts"), [("--json", "{"), ("--markdown", "| work |")])
def test_a_missed_goal_is_no_failure_but_a_broken_benchmark_is(
    form: str, starts: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_bench: Bench) -> list[Row]:
        raise RuntimeError("no broker")

    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setenv("LABKIT_STATE", "")  # so that it is put back
    monkeypatch.setattr(command, "BENCHMARKS", {"slow": lambda _bench: [SLOW], "broken": broken})
    assert command.main([form, "slow"]) == 0
    only = capsys.readouterr().out
    assert only.startswith(starts)
    assert command.main([form]) == 1
    both = capsys.readouterr()
    assert "send" in both.out, "the rows of the others stand"
    assert "RuntimeError: no broker" in both.err
