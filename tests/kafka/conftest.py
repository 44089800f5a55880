"""The real broker: one embedded Kafka for the session."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from processes import processes_of, wait_until

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.producer import producer
from labkit.runtime import shared_broker
from labkit.runtime.postgres import Postgres
from labkit.runtime.which_kafka import Connection


@pytest.fixture(scope="session")
def connection(state_dir: Path) -> Iterator[Connection]:
    """What `connect()` returns where no other Kafka is named or running."""
    with shared_broker.shared_broker() as lease:
        yield Connection(lease.cluster, "embedded", lease.cluster_id, lease)
        lease.stop()  # rather than wait until it notices that nobody is left


@pytest.fixture(scope="session")
def cluster(connection: Connection) -> Cluster:
    """The session's embedded broker."""
    return connection.cluster


@pytest.fixture(scope="session")
def postgres(state_dir: Path) -> Iterator[Postgres]:
    """One PostgreSQL for the tests; who kills it starts it again, and tables have names of their own."""
    with Postgres() as server:
        yield server


@pytest.fixture
def dsn(postgres: Postgres) -> str:
    """A database of the test's own."""
    name = f"test_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        connection.execute(f"create database {name}")
    return postgres.dsn.replace("dbname=postgres", f"dbname={name}")


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder, and so a broker, of the test's own: none yet, and one that may be broken."""
    folder = tmp_path / "own"
    monkeypatch.setenv("LABKIT_STATE", str(folder))
    yield folder
    shared_broker.stop()
    wait_until(lambda: not processes_of(folder), 5, "the end of every process")


@pytest.fixture(autouse=True)
def nothing_refused_is_left(cluster: Cluster) -> Iterator[None]:
    """A test's refused records are its own: the process's one producer would tell the next test of them."""
    yield
    with suppress(DeliveryFailed):
        producer(cluster).flush(10)
