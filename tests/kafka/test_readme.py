"""What the README says that a reader can type in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

from consuming import fresh_topic
from stores import store_topic

from labkit.kafka.cluster import Cluster
from labkit.patterns import AtomicKeyValueStore, ImportKey, KeyValueStore

README = Path(__file__).parents[2] / "README.md"


def test_the_program_in_the_readme_runs_as_it_stands(cluster: Cluster, tmp_path: Path) -> None:
    """Against a Kafka that has nothing yet, and once more against what it left there."""
    program, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    file = tmp_path / "program.py"
    file.write_text(program)
    env = {**os.environ, "KAFKA_BOOTSTRAP_SERVERS": cluster.bootstrap}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", str(file)], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (0, "Order(customer='ada', cents=2900)\n"), done.stderr


def test_the_lines_that_count_in_the_readme_count(cluster: Cluster) -> None:
    _, lines = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    commands, counts = fresh_topic(cluster, 2), store_topic(cluster, 2, int)
    stop = threading.Event()
    with KeyValueStore(counts) as store, store.subscribe(lambda key, old, new: stop.set()):
        names = {"AtomicKeyValueStore": AtomicKeyValueStore, "ImportKey": ImportKey, "stop": stop}
        exec(lines, {**names, "commands": replace(commands, value=str), "counts": counts})
        assert store.snapshot() == {"YYY-6": 1}
