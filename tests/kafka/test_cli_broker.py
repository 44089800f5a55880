"""The commands about Kafka as a shell sees them, with a broker that `labkit up` started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from processes import processes_of, wait_until

from labkit.cli.doctor import CHECKS
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.lag import committed_offsets
from labkit.kafka.topics import Topic
from labkit.runtime import shared_broker

LABKIT = [sys.executable, "-c", "from labkit.cli.main import app; app()"]
RUN = "labkit.ada.start-here.261124090000bbbb."


def labkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LABKIT_LEARNER": "ada", "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [*LABKIT, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def said(*arguments: str) -> str:
    done = labkit(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def answer(*arguments: str) -> Any:
    return json.loads(said(*arguments, "--json"))


@pytest.fixture
def cluster(own_state: Path) -> Cluster:
    """The broker of `labkit up`."""
    said("up")
    found = shared_broker.status()
    assert found is not None
    return Cluster(found.bootstrap)


def consume(topic: Topic[dict[str, int]], group: str, until: Any) -> None:
    """Be the group's member until the condition holds."""
    stop = threading.Event()
    member = threading.Thread(target=Consumer(topic, lambda _: None, group=group).run, args=(stop,))
    member.start()
    try:
        wait_until(until, 30)
    finally:
        stop.set()
        member.join()


@pytest.mark.long
def test_doctor_finds_this_machine_healthy(cluster: Cluster) -> None:
    told = answer("doctor")
    assert told["healthy"] is True
    found = {check["check"]: check for check in told["checks"]}
    assert list(found) == list(CHECKS)
    assert found["Kafka"]["text"] == f"answers at {cluster.bootstrap} (embedded)"
    assert not any(check["fix"] for check in found.values())


@pytest.mark.long
def test_up_status_down(own_state: Path) -> None:
    assert "`labkit down` ends it" in said("up")
    assert "`labkit down` ends it" in said("up"), "twice is no error"
    now = shared_broker.status()
    assert now is not None
    told = answer("status")
    assert told.pop("memory_mb") > 50
    assert told == {
        "running": True,
        "origin": "embedded",
        "bootstrap": now.bootstrap,
        "cluster_id": now.cluster_id,
        "learner": "ada",
        "pid": now.pid,
        "pinned": True,
        "users": 0,
        "restarts": 0,
        "folder": str(now.folder),
    }
    assert f"Kafka is at {now.bootstrap} (embedded, cluster {now.cluster_id}), as ada\n0 users, " in said("status")
    assert said("topics") == "No topics.\n"
    assert answer("topics") == []
    assert said("down") == "Stopped; its data is removed.\n"
    assert labkit("status").returncode == 1
    wait_until(lambda: not processes_of(own_state), 5)
    assert {path.name for path in own_state.iterdir()} == {"broker.lock"}


@pytest.mark.long
def test_topics_and_lag(cluster: Cluster) -> None:
    topic, empty = (Topic(cluster, f"{RUN}{name}", 2, dict[str, int]) for name in ("orders", "empty"))
    for one in (topic, empty):
        one.create()
    group = f"{RUN}shipping"
    for _ in range(2):
        for number in range(10):
            topic.send({"number": number}, key=str(number))
        topic.flush()
        if not committed_offsets(cluster, group):  # so the second ten stay
            consume(topic, group, lambda: sum(committed_offsets(cluster, group).values()) == 10)
    assert said("topics").splitlines() == [
        "learner  notebook    topic   partitions  records",
        "ada      start-here  empty            2        0",
        "ada      start-here  orders           2       20",
    ]
    assert [(one["short"], one["partitions"], one["records"]) for one in answer("topics")] == [
        ("empty", 2, 0),
        ("orders", 2, 20),
    ]
    assert said("lag", "shipping").startswith(
        "shipping of ada, notebook start-here, run 261124090000bbbb: 10 records behind\ntopic   partition  lag\norders"
    )
    assert said("lag").splitlines() == ["learner  notebook    group", "ada      start-here  shipping"]
    assert [(one["group"], one["short"], one["learner"]) for one in answer("lag")] == [(group, "shipping", "ada")]
    told = answer("lag", "shipping")
    assert (told["group"], told["lag"]) == (group, 10)
    assert [one["partition"] for one in told["partitions"]] == [0, 1]
    assert sum(one["committed"] for one in told["partitions"]) == sum(one["lag"] for one in told["partitions"]) == 10


@pytest.mark.long
def test_lag_of_a_group_that_has_committed_nothing_says_what_to_do(cluster: Cluster) -> None:
    topic = Topic(cluster, f"{RUN}empty", 1, dict[str, int])
    topic.create()
    group = f"{RUN}idle"

    def check() -> bool:
        return "handle a record first" in labkit("lag", "idle").stderr

    consume(topic, group, check)
