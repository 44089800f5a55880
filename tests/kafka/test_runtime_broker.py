"""The real broker under its supervisor: started once, shared, back after a crash, gone with its last user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from processes import is_alive, processes_of, wait_until

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.kafka.lag import end_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.topics import Topic
from labkit.runtime import broker as broker_module
from labkit.runtime import shared_broker, which_kafka
from labkit.runtime.broker import Broker, Kafka, NoAotCache, PortTaken, free_ports, mark_of, prepare
from labkit.runtime.child import Child
from labkit.runtime.supervisor import DISCARD_SECONDS
from labkit.runtime.which_kafka import Connection, connect, running

USER = """
import sys
from labkit.runtime.which_kafka import connect
with connect() as connection:
    print(connection.cluster_id, connection.cluster.bootstrap, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def user(own_state: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts another process that connects, tells which cluster it got, and stays until its stdin closes."""
    users = []

    def start() -> subprocess.Popen[str]:
        users.append(
            subprocess.Popen([sys.executable, "-c", USER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        return users[-1]

    yield start
    for process in users:
        process.kill()
        process.communicate()


def status() -> shared_broker.Status:
    found = shared_broker.status()
    assert found is not None
    return found


def is_open(bootstrap: str) -> bool:
    host, port = bootstrap.split(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def fill(cluster: Cluster, records: int) -> Topic[dict[str, int]]:
    """A topic with that many confirmed records."""
    topic = Topic(cluster, "filled", 4, dict[str, int])
    topic.create()
    for number in range(records):
        topic.send({"number": number}, key=str(number))
    topic.flush()
    return topic


def count(topic: Topic[dict[str, int]]) -> int:
    return sum(end_offsets(topic.cluster, [topic.name]).values())


def assert_all_gone(folder: Path, before: shared_broker.Status, seconds: float) -> None:
    wait_until(lambda: not processes_of(folder), seconds, "the end of every process")
    assert not is_alive(before.pid)
    wait_until(lambda: not is_open(before.bootstrap), 10)  # the last of a dead JVM's threads may still hold it
    assert not before.folder.exists()
    assert shared_broker.status() is None
    assert {path.name for path in folder.iterdir()} == {"broker.lock"}


@pytest.mark.long
@pytest.mark.parametrize("locale", ["C", pytest.param("C.UTF-8", marks=pytest.mark.long)])
def test_a_state_folder_of_any_name_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locale: str) -> None:
    """Java reads settings as Latin-1 with escapes, Kafka splits folders at commas, and a class path ends at a colon."""
    folder = tmp_path / "ä, %41\\n o:x"
    monkeypatch.setenv("LABKIT_STATE", str(folder))
    monkeypatch.setenv("LC_ALL", locale)
    with shared_broker.shared_broker() as lease:
        assert count(fill(lease.cluster, 10)) == 10
        now = status()
        assert now.folder.parent == folder
        assert (now.folder / "data" / "filled-0").is_dir()
        lease.stop()
    assert_all_gone(folder, now, 10)


def test_a_cache_folder_that_java_cannot_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "a:b"))
    with pytest.raises(LabkitError, match=r"Java cannot use .*/a:b, .*Set LABKIT_CACHE"):
        prepare()


# --- One broker -------------------------------------------------------------------------------------------------


def test_connection_is_to_the_embedded_broker(connection: Connection, state_dir: Path) -> None:
    assert connection.origin == "embedded"
    assert connection.cluster.describe(5).cluster_id == connection.cluster_id
    now = status()
    assert (now.running, now.pinned, now.restarts) == (True, False, now.restarts)
    assert now.users >= 1
    assert now.bootstrap == connection.cluster.bootstrap
    assert now.folder.parent == state_dir
    assert 50 < now.memory_mb < 2000
    assert is_alive(now.pid)


@pytest.mark.long  # test_producer.py sends to one that nobody made
def test_topics_are_made_on_purpose_only(cluster: Cluster) -> None:
    own = Producer(cluster, timeout=1)  # the process's shared one would remember the failure
    own.send("never-created", b"{}")
    with pytest.raises(LabkitError):
        own.flush(3)
    assert "never-created" not in cluster.topics()


def test_data_of_two_brokers_is_told_apart(tmp_path: Path) -> None:
    kafka = prepare()
    metas = [(Broker.create(tmp_path / name, kafka).folder / "data/meta.properties").read_text() for name in "ab"]
    assert metas[0] != metas[1]
    assert kafka.template.exists()
    assert not (kafka.template / "meta.properties").exists()


# --- The AOT cache ----------------------------------------------------------------------------------------------


def run_with(kafka: Kafka, folder: Path, flags: list[str]) -> None:
    """Start a broker with these JVM flags and wait until it answers."""
    made = Broker.create(folder, kafka)
    with Child(kafka.command(made.folder, flags), cwd=made.folder, output=made.log) as child:
        made.wait_until_ready(lambda: child.poll() is None)


def needs_aot(kafka: Kafka) -> None:
    if kafka.java.version < 25:
        pytest.skip(f"Java {kafka.java.version} has no AOT cache")


@pytest.mark.long
def test_aot_cache_is_accepted(tmp_path: Path) -> None:
    kafka = prepare()
    needs_aot(kafka)
    run_with(kafka, tmp_path / "b", ["-XX:AOTMode=on", f"-XX:AOTCache={kafka.aot_cache}"])


@pytest.mark.long
def test_aot_cache_of_other_flags_is_refused_by_java(tmp_path: Path) -> None:
    """Which shows that the test above can fail."""
    kafka = prepare()
    needs_aot(kafka)
    with pytest.raises(LabkitError, match="ended at once"):
        run_with(
            kafka,
            tmp_path / "b",
            ["-XX:AOTMode=on", f"-XX:AOTCache={kafka.aot_cache}", "-XX:+UseCompactObjectHeaders"],
        )


@pytest.mark.long
def test_broker_starts_with_a_corrupt_aot_cache(tmp_path: Path) -> None:
    kafka = prepare()
    needs_aot(kafka)
    corrupt = tmp_path / "corrupt.aot"
    corrupt.write_bytes(kafka.aot_cache.read_bytes()[:1_000_000])
    run_with(kafka, tmp_path / "b", [f"-XX:AOTCache={corrupt}"])


@pytest.mark.long
def test_broker_starts_when_no_aot_cache_can_be_built(
    tmp_path: Path, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jars = prepare().jars[0].parent
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(jars, tmp_path / "cache" / "jars" / jars.name, copy_function=shutil.copy2)

    errors: list[Exception] = [TimeoutError("slow today"), NoAotCache("out of luck"), NoAotCache("again")]

    def fail(_self: Kafka) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(Kafka, "build_aot_cache", fail)
    with shared_broker.shared_broker() as lease:
        assert lease.cluster.describe(5).brokers == {1}
    kafka = prepare()  # the first error says nothing of the next time
    needs_aot(kafka)
    assert kafka.aot_failed.read_text() == "out of luck"
    prepare()
    assert len(errors) == 1
    yesterday = time.time() - broker_module.DAY - 1
    os.utime(kafka.aot_failed, (yesterday, yesterday))
    prepare()
    assert not errors
    assert not kafka.aot_cache.exists()
    assert kafka.aot_failed.read_text() == "again"


# --- Ports ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_taken_port_is_noticed(tmp_path: Path) -> None:
    kafka = prepare()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        made = Broker.create(tmp_path / "b", kafka, (taken.getsockname()[1], free_ports()[0]))
        with Child(kafka.command(made.folder), cwd=made.folder, output=made.log) as child, pytest.raises(PortTaken):
            made.wait_until_ready(lambda: child.poll() is None)


@pytest.mark.long
def test_another_port_is_tried(own_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        offered = [(taken.getsockname()[1], free_ports()[0])]
        monkeypatch.setattr(broker_module, "free_ports", lambda: offered.pop() if offered else free_ports())
        with shared_broker.shared_broker() as lease:
            assert not offered
            assert lease.cluster.describe(5).cluster_id == lease.cluster_id
            assert len(list(own_state.glob("broker-*/"))) == 1


def test_broker_that_ends_at_once_shows_its_log(own_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = broker_module.PROPERTIES.replace("process.roles=broker,controller", "process.roles=baker")
    monkeypatch.setattr(broker_module, "PROPERTIES", broken)
    with pytest.raises(LabkitError, match=r"(?s)ended at once\. Its log says:.*baker"):
        shared_broker.shared_broker()


# --- Sharing ----------------------------------------------------------------------------------------------------


def test_two_processes_that_start_at_once_share_one(user: Callable[[], subprocess.Popen[str]]) -> None:
    processes = [user(), user()]
    answers = {process.stdout.readline() for process in processes if process.stdout}
    assert len(answers) == 1
    assert answers.pop().strip()
    assert status().users == 2


@pytest.mark.long
def test_a_user_who_returns_at_once_finds_the_same_broker(own_state: Path) -> None:
    with shared_broker.shared_broker() as lease:
        before, pid = lease.cluster_id, status().pid
    with shared_broker.shared_broker() as lease:
        assert lease.cluster_id == before
        assert status().pid == pid


@pytest.mark.long
def test_everything_goes_with_the_last_user(own_state: Path) -> None:
    assert shared_broker.LINGER + DISCARD_SECONDS < 5  # correctness 30
    with shared_broker.shared_broker():
        before = status()
    assert_all_gone(own_state, before, 20)


@pytest.mark.long
def test_everything_goes_with_a_killed_user(own_state: Path, user: Callable[[], subprocess.Popen[str]]) -> None:
    process = user()
    assert process.stdout is not None
    process.stdout.readline()
    before = status()
    process.kill()
    assert_all_gone(own_state, before, 20)


@pytest.mark.long
def test_pinned_broker_stays_until_it_is_stopped(
    own_state: Path, user: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_broker, "LINGER", 0.0)
    lease = shared_broker.shared_broker()
    lease.pin()
    lease.close()
    before = status()
    assert (before.pinned, before.users) == (True, 0)
    again = shared_broker.attach()
    assert again is not None
    again.close()
    now = status()
    assert now == replace(before, memory_mb=now.memory_mb)
    assert shared_broker.stop()
    assert_all_gone(own_state, before, 10)
    assert not shared_broker.stop()


def test_nothing_runs_and_nothing_is_started(own_state: Path) -> None:
    assert shared_broker.status() is None
    assert shared_broker.attach() is None
    assert not processes_of(own_state)


# --- Crashes ----------------------------------------------------------------------------------------------------


def test_killed_broker_is_back_with_all_that_was_confirmed(own_state: Path) -> None:
    with shared_broker.shared_broker() as lease:
        topic = fill(lease.cluster, 20_000)
        before = status()
        os.kill(before.pid, signal.SIGKILL)
        wait_until(lambda: status().restarts == 1, 20)
        topic.send({"number": -1})
        topic.flush(30)  # how long it takes, `make bench` measures
        assert count(topic) == 20_001
        after = status()
        assert after.pid != before.pid
        assert (after.bootstrap, after.cluster_id) == (before.bootstrap, before.cluster_id)


@pytest.mark.long
def test_killed_supervisor_takes_the_broker_along(own_state: Path) -> None:
    with shared_broker.shared_broker() as lease:
        before = status()
        os.kill(psutil.Process(before.pid).ppid(), signal.SIGKILL)
        if sys.platform == "linux":
            wait_until(lambda: not is_alive(before.pid), 2)
        with pytest.raises(LabkitError):
            lease.pin()
        with shared_broker.shared_broker() as new:
            assert new.cluster.describe(5).cluster_id == new.cluster_id != before.cluster_id
            assert not is_alive(before.pid)
            assert not before.folder.exists()


@pytest.mark.long
def test_pinned_data_survives_a_killed_supervisor(own_state: Path) -> None:
    with shared_broker.shared_broker() as lease:
        lease.pin()
        topic = fill(lease.cluster, 1000)
        before = status()
        os.kill(psutil.Process(before.pid).ppid(), signal.SIGKILL)
        wait_until(lambda: not is_alive(before.pid), 2)
    kept = status()
    assert (kept.running, kept.pinned, kept.cluster_id) == (False, True, before.cluster_id)
    with shared_broker.shared_broker() as lease:
        assert lease.cluster_id == before.cluster_id
        assert count(replace(topic, cluster=lease.cluster)) == 1000
        assert status().pinned


@pytest.mark.long
def test_stop_removes_pinned_data_of_a_broker_that_no_longer_runs(own_state: Path) -> None:
    with shared_broker.shared_broker() as lease:
        lease.pin()
        before = status()
        os.kill(psutil.Process(before.pid).ppid(), signal.SIGKILL)
    assert shared_broker.stop()
    assert_all_gone(own_state, before, 2)


@pytest.fixture
def frozen(own_state: Path) -> Iterator[tuple[shared_broker.Lease, int]]:
    """A broker with users whose supervisor is stopped, as by a debugger or a machine that swaps; its pid."""
    with shared_broker.shared_broker() as lease:
        supervisor = psutil.Process(status().pid).ppid()
        os.kill(supervisor, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(supervisor).status() == psutil.STATUS_STOPPED)
        yield lease, supervisor
        if is_alive(supervisor):
            os.kill(supervisor, signal.SIGCONT)


@pytest.mark.long
def test_a_frozen_supervisor_disturbs_nobody(frozen: tuple[shared_broker.Lease, int]) -> None:
    lease, _ = frozen
    topic = fill(lease.cluster, 100)
    with shared_broker.shared_broker() as again:
        assert again.cluster_id == lease.cluster_id
        assert count(topic) == 100
        assert (status().running, status().restarts, status().users) == (True, 0, 2)


@pytest.mark.long
def test_one_that_takes_no_users_and_does_not_end_is_named(
    frozen: tuple[shared_broker.Lease, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, supervisor = frozen
    (lease.folder / "ready").unlink()  # as it does when it ends
    monkeypatch.setattr(shared_broker, "STOP_SECONDS", 0.3)
    with pytest.raises(LabkitError, match=rf"supervisor {supervisor} .*is it stopped.*labkit down"):
        shared_broker.shared_broker()
    assert (lease.folder / "data").is_dir()


@pytest.mark.long
def test_stop_ends_a_silent_supervisor(frozen: tuple[shared_broker.Lease, int], own_state: Path) -> None:
    lease, supervisor = frozen
    assert shared_broker.stop()
    wait_until(lambda: not processes_of(own_state), 2)
    assert not is_alive(supervisor)
    assert not lease.folder.exists()


@pytest.mark.long
def test_stop_ends_a_supervisor_that_answers_but_does_not_go(own_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_broker, "STOP_SECONDS", 0.001)  # it needs more
    with shared_broker.shared_broker():
        before = status()
    assert shared_broker.stop()
    assert_all_gone(own_state, before, 2)


@pytest.mark.long
def test_a_supervisor_that_is_ending_is_waited_for(own_state: Path) -> None:
    with shared_broker.shared_broker() as lease:
        lease.pin()
        topic = fill(lease.cluster, 100)
        os.kill(psutil.Process(status().pid).ppid(), signal.SIGTERM)
        wait_until(lambda: not status().running, 5)
    with shared_broker.shared_broker() as again:
        assert again.cluster_id == lease.cluster_id
        assert count(replace(topic, cluster=again.cluster)) == 100


@pytest.mark.parametrize("told", ["", "[]", "{}", '{"port', None])
def test_what_a_dead_supervisor_left_is_swept(own_state: Path, told: str | None) -> None:
    """The broker too, which the kernel of Linux does itself. A stranger who names its folder is let be."""
    folder = own_state / "broker-0123"
    folder.mkdir(parents=True)
    port, controller_port = free_ports()
    facts = {"cluster_id": "x", "port": port, "controller_port": controller_port}
    (folder / "broker.json").write_text(json.dumps(facts) if told is None else told)
    (folder / "ready").touch()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with Child([*sleep, mark_of(folder)]) as leftover, Child([*sleep, str(folder)]) as stranger:
        (folder / "supervisor").write_text(json.dumps({"supervisor": stranger.pid, "pid": stranger.pid, "restarts": 0}))
        assert shared_broker.status() is None
        assert shared_broker.stop()
        assert not folder.exists()
        assert stranger.poll() is None
        if told is None:
            assert leftover.wait(5) == -signal.SIGKILL


@pytest.mark.long
def test_running_finds_and_never_starts(own_state: Path) -> None:
    assert running() is None
    assert not processes_of(own_state)
    with shared_broker.shared_broker() as lease:
        found = running()
        assert found is not None
        with found:
            assert (found.origin, found.cluster_id) == ("embedded", lease.cluster_id)


def test_state_below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_STATE", str(tmp_path / "file" / "x"))
    with pytest.raises(LabkitError, match="LABKIT_STATE"):
        connect()


# --- Which Kafka ------------------------------------------------------------------------------------------------


def test_named_cluster_comes_first(
    cluster: Cluster, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which_kafka, "COMPOSE", cluster)
    monkeypatch.setattr(which_kafka, "COMPOSE_CLUSTER_ID", connection.cluster_id)
    (tmp_path / "client.properties").write_text("client.id=somebody\n")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", cluster.bootstrap)
    monkeypatch.setenv("KAFKA_CLIENT_CONFIG", str(tmp_path / "client.properties"))
    with connect() as found:
        assert (found.origin, found.cluster_id) == ("external", connection.cluster_id)
        assert found.cluster.security == (("client.id", "somebody"),)
        assert found.lease is None


def test_named_cluster_that_is_silent_is_an_error_although_others_answer(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(which_kafka, "PATIENCE", 1.0)
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ClusterUnreachable, match="KAFKA_BOOTSTRAP_SERVERS"):
            connect()


def test_composed_cluster_comes_second(
    cluster: Cluster, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which_kafka, "COMPOSE", cluster)
    monkeypatch.setattr(which_kafka, "COMPOSE_CLUSTER_ID", connection.cluster_id)
    for found in (connect(), running()):
        assert found is not None
        with found:
            assert (found.origin, found.cluster) == ("compose", cluster)


def test_foreign_cluster_at_the_composed_ones_port_is_not_taken(
    cluster: Cluster, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which_kafka, "COMPOSE", cluster)
    with connect() as found:
        assert (found.origin, found.cluster_id) == ("embedded", connection.cluster_id)
