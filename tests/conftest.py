"""No test leaves a process behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import processes_of, wait_until


@pytest.fixture(scope="session", autouse=True)
def state_dir() -> Iterator[Path]:
    """LABKIT_STATE of this process; nothing that was started there may be left at the end."""
    folder = Path(os.environ["LABKIT_STATE"])
    yield folder
    wait_until(lambda: not processes_of(folder), 10, f"the end of every process: {processes_of(folder)}")
