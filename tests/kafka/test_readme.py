"""What the README and docs/patterns.md say that a reader can type in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from consuming import fresh_topic
from stores import store_topic

from labkit.kafka.cluster import Cluster
from labkit.patterns import AtomicKeyValueStore, ImportKey, KeyValueStore

ROOT = Path(__file__).parents[2]


def programs(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


FIRST_LINES, *PATTERNS = programs("docs/patterns.md")


def check(program: str, cluster: Cluster, folder: Path, times: int = 2) -> None:
    """It prints what it says, against a Kafka that has nothing yet, and once more against what it left there."""
    says = re.findall(r"print\(.*\)  # (.*\n)", program)
    assert len(says) == program.count("print(") > 0
    env = {**os.environ, "KAFKA_BOOTSTRAP_SERVERS": cluster.bootstrap}
    for _ in range(times):
        command = [sys.executable, "-W", "error", "-c", program]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, "".join(says)), done.stderr


def test_the_program_in_the_readme_runs_as_it_stands(cluster: Cluster, tmp_path: Path) -> None:
    program, _ = programs("README.md")
    check(program, cluster, tmp_path)


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.long)], ids=["once", "twice"])
@pytest.mark.parametrize("lines", PATTERNS, ids=[f"pattern {number}" for number, _ in enumerate(PATTERNS, 1)])
def test_the_lines_of_each_pattern_run_as_they_stand(lines: str, cluster: Cluster, tmp_path: Path, times: int) -> None:
    check(FIRST_LINES + lines, cluster, tmp_path, times)


def test_the_lines_that_count_in_the_readme_count(cluster: Cluster) -> None:
    _, lines = programs("README.md")
    commands, counts = fresh_topic(cluster, 2), store_topic(cluster, 2, int)
    stop = threading.Event()
    with KeyValueStore(counts) as store, store.subscribe(lambda key, old, new: stop.set()):
        names = {"AtomicKeyValueStore": AtomicKeyValueStore, "ImportKey": ImportKey, "stop": stop}
        exec(lines, {**names, "commands": replace(commands, value=str), "counts": counts})
        assert store.snapshot() == {"YYY-6": 1}
