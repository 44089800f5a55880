"""The verdicts can fail: with labkit broken on purpose, in the kernel and in every pod, a notebook must not pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
FIRST = "00_start_here.ipynb"
VIEWS = "01_consume_and_project.ipynb"
END_TO_END = "02_event_driven_end_to_end.ipynb"
STORE = "03_in_memory_key_value_store.ipynb"
RETRIES = "04_schedule_and_forget.ipynb"
TRANSACTIONS = "05_events_in_transactions.ipynb"
AGGREGATION = "06_event_aggregation.ipynb"
TOPOLOGIES = "07_topologies.ipynb"
SABOTAGE = Path(__file__).parent / "sabotage"


def run_notebook(name: str, sabotage: str, last: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one notebook up to its cell `last` under nbval, as `make test` does, in processes that import `sabotage`
    first."""
    book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    book.cells = book.cells[: 1 + next(number for number, cell in enumerate(book.cells) if cell.id == last)]
    nbformat.write(book, folder / name)
    env = {**os.environ, "LABKIT_PACE": "10", "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = os.pathsep.join([str(SABOTAGE / sabotage), str(ROOT)])  # of this checkout, wherever it is
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "-q", "--timeout=300"]
    command += ["-x", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=280", str(folder / name)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=380, check=False)


def long(*case: str) -> Any:
    """A case of the second tier."""
    return pytest.param(*case, marks=pytest.mark.long)


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("broker")
@pytest.mark.parametrize(
    ("notebook", "sabotage", "last", "sign"),
    [
        (FIRST, "early_commit", "verdict", r"invalid: .* lost [1-9]"),
        long(FIRST, "lossy_produce", "verdict", r"invalid: .* lost [1-9]"),
        long(VIEWS, "offsets_outside", "crash-verdict", r"invalid: view: .* (lost|wrong) [1-9]"),
        long(VIEWS, "lossy_produce", "crash-verdict", r"invalid: view: .* (lost|wrong) [1-9]"),
        long(VIEWS, "early_commit", "crash-verdict", r"invalid: MetaSite's table: .* wrong [1-9]"),
        long(VIEWS, "no_version_check", "verdict", r"invalid: view: .* (wrong|unexpected) [1-9]"),
        long(VIEWS, "snapshot_skipped", "cdc-verdict", r"invalid: topic rows: .* lost [1-9]"),
        long(VIEWS, "offsets_forgotten", "cdc-verdict", r"invalid: topic rows: .* duplicated [1-9]"),
        long(END_TO_END, "lossy_notices", "calm-verdict", r"invalid: one browser: .* wrong [1-9]"),
        long(END_TO_END, "doubling_notices", "calm-verdict", r"came twice: "),
        long(END_TO_END, "keyless_notices", "calm-verdict", r"invalid: one browser: .* lost [1-9]"),
        long(END_TO_END, "doubled_mirror", "copies-verdict", r"invalid: jobs out: .* wrong [1-9]"),
        long(STORE, "ignored_tombstones", "verdict", r"invalid: a new store: .* unexpected [1-9]"),
        long(STORE, "ready_too_early", "verdict", r"invalid: a new store: .* lost [1-9]"),
        long(STORE, "keyless_put", "verdict", r"the write to store countries was refused: "),
        long(RETRIES, "commit_before_publish", "verdict-topics", r"invalid: charged: .* lost [1-9]"),
        long(RETRIES, "early_retry", "verdict-topics", r"invalid: charged: .* early [1-9]"),
        long(RETRIES, "doubling_produce", "verdict-topics", r"invalid: announced: .* duplicated [1-9]"),
        long(RETRIES, "skip_fires_twice", "verdict-topics", r": a skip is for one record, once"),
        long(RETRIES, "group_missing", "verdict-topics", r"invalid: announced: .* duplicated [1-9]"),
        long(TRANSACTIONS, "offset_before_transaction", "exactly-once-verdict", r"invalid: Delivery: .* lost [1-9]"),
        long(TRANSACTIONS, "read_uncommitted", "exactly-once-verdict", r"invalid: Delivery: .* duplicated [1-9]"),
        long(TRANSACTIONS, "sent_before_commit", "exactly-once-verdict", r"invalid: Delivery: .* duplicated [1-9]"),
        long(TRANSACTIONS, "acks_one", "acks-verdict", r"invalid: checked out: .* lost [1-9]|'acks=all': \['order-"),
        long(AGGREGATION, "keyless_commands", "count-verdict", r"invalid: store: .* lost [1-9]"),
        long(AGGREGATION, "offset_before_transaction", "kill-verdict", r"invalid: store: .* wrong [1-9]"),
        long(AGGREGATION, "failed_attempts_stay", "kill-verdict", r"invalid: store: .* wrong [1-9]"),
        long(TOPOLOGIES, "timeout_is_failure", "up-verdict", r"invalid: by the mediator: .* wrong [1-9]"),
        long(TOPOLOGIES, "failures_unheard", "refused-verdict", r"invalid: by events: .* wrong [1-9]"),
        long(
            TOPOLOGIES, "offset_before_transaction", "kill-verdict", r"invalid: by the mediator: .* (lost|wrong) [1-9]"
        ),
    ],
)
def test_a_sabotaged_labkit_fails_the_verdict(
    notebook: str, sabotage: str, last: str, sign: str, tmp_path: Path
) -> None:
    assert (SABOTAGE / sabotage / "sitecustomize.py").exists()
    done = run_notebook(notebook, sabotage, last, tmp_path)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(sign, done.stdout), done.stdout[-3000:]
