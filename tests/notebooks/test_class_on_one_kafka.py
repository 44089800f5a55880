"""Three learners on one Kafka, beside the trainer's table: one is killed and reset, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import nbformat
import pytest
from jupyter_core.utils import ensure_event_loop
from kernels import ROOT, kernel, pid_of, run
from processes import processes_of, wait_until

from labkit.kafka import Cluster
from labkit.lab.classroom import REFRESH, Row, look
from labkit.runtime import shared_broker

pytestmark = pytest.mark.long
NOTEBOOKS = {"start-here": "00_start_here.ipynb", "schedule-and-forget": "04_schedule_and_forget.ipynb"}
COMMAND = [sys.executable, "-c", "from labkit.cli.main import app; app()"]


@pytest.fixture
def kafka(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The class's Kafka, with nothing in it. Nobody's kernel may end it, as each has a LABKIT_STATE of its own."""
    monkeypatch.setenv("LABKIT_STATE", str(tmp_path / "kafka"))
    with shared_broker.shared_broker() as lease:
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", lease.cluster.bootstrap)
        monkeypatch.setenv("LABKIT_PACE", "2")  # three at once
        yield lease.cluster
        lease.stop()


def labkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


def cells(notebook: str, last: str = "") -> Sequence[str]:
    """A notebook's code, up to the cell `last`."""
    found = {
        cell.id: cell.source
        for cell in nbformat.read(ROOT / "notebooks" / notebook, 4).cells
        if cell.cell_type == "code"
    }
    codes = list(found.values())
    return codes[: list(found).index(last) + 1] if last else codes


def works(learner: str, folder: Path) -> list[str]:
    """A learner runs both notebooks, each in a kernel, and closes its lab. Returns the verdicts."""
    verdicts = []
    for notebook in NOTEBOOKS.values():
        with kernel(folder / learner, LABKIT_LEARNER=learner, LABKIT_COMPARISON=str(folder / learner)) as (_, client):
            for code in cells(notebook):  # a verdict that is not valid raises
                verdicts += re.findall(r".* took effect .*", run(client, code))
    return verdicts


def is_killed_and_comes_again(learner: str, folder: Path, kafka: Cluster) -> list[str]:
    with kernel(folder / learner, LABKIT_LEARNER=learner) as (manager, client):
        for code in cells(NOTEBOOKS["start-here"], last="break"):  # orders arrive, and a pod was killed
            run(client, code)
        assert "stays: " in labkit("clean", "--learner", learner, "--yes").stdout
        os.kill(pid_of(manager), signal.SIGKILL)
        wait_until(lambda: not processes_of(folder / learner), 30, "the end of the pods with their kernel")
        assert topics_of(kafka, f"labkit.{learner}.")
        wait_until(lambda: labkit("clean", "--learner", learner, "--yes").returncode == 0, 30, "the end of its session")
        assert not topics_of(kafka, f"labkit.{learner}.")
    return works(learner, folder)


def topics_of(kafka: Cluster, prefix: str) -> set[str]:
    return {name for name in kafka.topics() if name.startswith(prefix)}


@pytest.mark.timeout(1200)
def test_three_learners_beside_the_trainers_table(kafka: Cluster, tmp_path: Path) -> None:
    seen: set[tuple[str, str, str]] = set()  # what the table has said: of whom, in which notebook

    def watch(rows: Sequence[Row]) -> None:
        for row in rows:
            here = (row.learner, row.notebook)
            seen.update({(*here, "has pods")} if row.pods else ())
            seen.update({(*here, row.verdict.result)} if row.verdict else ())

    def in_a_thread(work: Callable[[], list[str]]) -> list[str]:
        with contextlib.closing(ensure_event_loop()):  # the thread's, which its kernels use
            return work()

    learners = {
        "ada": partial(works, "ada", tmp_path),
        "grace": partial(works, "grace", tmp_path),
        "linus": partial(is_killed_and_comes_again, "linus", tmp_path, kafka),
    }
    with ThreadPoolExecutor(len(learners)) as pool:
        under_way = {name: pool.submit(in_a_thread, work) for name, work in learners.items()}
        while wait(under_way.values(), timeout=REFRESH).not_done:
            watch(look(kafka))
    verdicts = {name: one.result() for name, one in under_way.items()}
    assert verdicts["ada"]
    assert len({len(found) for found in verdicts.values()}) == 1, verdicts
    assert seen == {(name, book, what) for name in learners for book in NOTEBOOKS for what in ("has pods", "valid")}

    assert topics_of(kafka, "labkit.") == {f"labkit.{name}.class" for name in learners}  # each has closed its lab
    assert labkit("clean", "--all", "--yes").returncode == 0
    assert not topics_of(kafka, "labkit.")
    assert not kafka.groups()
    assert "Nobody is there." in labkit("class", "--once").stdout
