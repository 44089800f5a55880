"""The verdicts can fail: with labkit broken on purpose, in the kernel and in every pod, a notebook must not pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SABOTAGE = Path(__file__).parent / "sabotage"


def run_notebook(name: str, sabotage: str | None, state: Path) -> subprocess.CompletedProcess[str]:
    """Run one notebook under nbval, as `labkit test notebooks` does, in processes that import `sabotage` first."""
    env = {**os.environ, "LABKIT_STATE": str(state), "LABKIT_PACE": "10", "PYTHONWARNINGS": "ignore"}
    if sabotage is not None:
        env["PYTHONPATH"] = str(SABOTAGE / sabotage)
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "-q", "--timeout=150"]
    command += ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=90", f"notebooks/{name}"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("notebook", "sabotage", "sign"),
    [
        ("00_start_here.ipynb", "lossy_produce", r"invalid: .* lost [1-9]"),
        ("00_start_here.ipynb", "early_commit", r"invalid: .* lost [1-9]"),
    ],
)
def test_a_sabotaged_labkit_fails_the_verdict(notebook: str, sabotage: str, sign: str, tmp_path: Path) -> None:
    assert (SABOTAGE / sabotage / "sitecustomize.py").exists()
    done = run_notebook(notebook, sabotage, tmp_path / "state")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(sign, done.stdout), done.stdout[-3000:]
