"""What the README says that a reader can type in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from labkit.kafka.cluster import Cluster

README = Path(__file__).parents[2] / "README.md"


def test_the_program_in_the_readme_runs_as_it_stands(cluster: Cluster, tmp_path: Path) -> None:
    """Against a Kafka that has nothing yet, and once more against what it left there."""
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    file = tmp_path / "program.py"
    file.write_text(program)
    env = {**os.environ, "KAFKA_BOOTSTRAP_SERVERS": cluster.bootstrap}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", str(file)], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (0, "Order(customer='ada', cents=2900)\n"), done.stderr
