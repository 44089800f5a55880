"""No test leaves a process behind, and notebooks do not all run at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import processes_of, wait_until

BETWEEN = 16  # files of tests, which take about as long as two notebooks


@pytest.hookimpl(trylast=True)  # after pytest has grouped them by what they share
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let notebooks start two at a time, the longest first, with files of tests between them.

    A notebook starts a dozen pods and kills Kafka: of three at once on two cores, one was so slow that the others'
    limits were over. Most tests wait for something, and run well beside two.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    notebooks = sorted((path for path in files if path.suffix == ".ipynb"), key=lambda path: -len(files[path]))
    others = [path for path in files if path.suffix != ".ipynb"]
    order: list[Path] = []
    while notebooks:
        order += [*notebooks[:2], *others[:BETWEEN]]
        notebooks, others = notebooks[2:], others[BETWEEN:]
    items[:] = [item for path in (*order, *others) for item in files[path]]


@pytest.fixture(scope="session", autouse=True)
def state_dir() -> Iterator[Path]:
    """LABKIT_STATE of this process; nothing that was started there may be left at the end."""
    folder = Path(os.environ["LABKIT_STATE"])
    yield folder
    wait_until(lambda: not processes_of(folder), 10, f"the end of every process: {processes_of(folder)}")
