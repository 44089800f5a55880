"""A broker that outlives the notebooks of one test process: a new one for each would be most of their work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.runtime import shared_broker


@pytest.fixture(scope="session")
def broker(state_dir: Path) -> Iterator[None]:
    """The embedded Kafka that notebooks with this process's LABKIT_STATE share."""
    with shared_broker.shared_broker() as lease:
        yield
        lease.stop()
