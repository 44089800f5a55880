"""The real broker: one embedded Kafka for the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.kafka.cluster import Cluster
from labkit.runtime.connect import Connection
from labkit.runtime.shared import shared_broker


@pytest.fixture(scope="session")
def connection(state_dir: Path) -> Iterator[Connection]:
    """What `connect()` returns where no other Kafka is named or running."""
    with shared_broker() as lease:
        yield Connection(lease.cluster, "embedded", lease.cluster_id, lease)
        lease.stop()  # rather than wait until it notices that nobody is left


@pytest.fixture(scope="session")
def cluster(connection: Connection) -> Cluster:
    """The session's embedded broker."""
    return connection.cluster
