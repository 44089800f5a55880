"""What every test gets: labkit's state in a folder of its own, so that no test touches the user's running broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import processes_of, wait_until

from labkit.runtime.connect import composed

OUTSIDE = ("KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLIENT_CONFIG")


@pytest.fixture(scope="session", autouse=True)
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LABKIT_STATE of this session; no process of it may be left at the end. The cache stays the user's own."""
    if composed():
        pytest.exit("the broker of docker-compose.yml runs, and tests would use it: `docker compose stop` first", 1)
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        for name in OUTSIDE:
            patch.delenv(name, raising=False)
        patch.setenv("LABKIT_STATE", str(folder))
        yield folder
        wait_until(lambda: not processes_of(folder), 10, f"the end of every process: {processes_of(folder)}")
