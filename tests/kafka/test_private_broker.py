"""A broker of one owner: what its faults do, and that nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]
from consuming import Member, fresh_group, fresh_topic, put
from processes import is_alive, processes_of, wait_until
from transacting import Committing

from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.kafka.reader import Reader
from labkit.runtime import private_broker
from labkit.runtime.postgres import Postgres
from labkit.runtime.private_broker import EACH_MB, PrivateBroker
from labkit.runtime.server import SPARE_MB, Server, ServerState
from labkit.runtime.valkey import Valkey


@pytest.fixture
def broker() -> Iterator[PrivateBroker]:
    with PrivateBroker() as broker:
        yield broker


@pytest.mark.long
@pytest.mark.parametrize("server", [PrivateBroker, Postgres, Valkey])
def test_a_server_works_in_a_folder_of_any_name(monkeypatch: pytest.MonkeyPatch, server: type[Server]) -> None:
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)  # PostgreSQL may be somebody else, in the folder for temporary ones
        folder = Path(above) / "ä, %41\\n o:x"
        folder.mkdir(mode=0o755)
        monkeypatch.setenv("LABKIT_STATE", str(folder))
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with server() as made:
            assert made.state is ServerState.RUNNING
            assert made.folder.parent == folder
        assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs somebody else for PostgreSQL")
def test_memory_that_gets_short_is_told_before(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Large(Postgres):
        needs = 10**9  # more than there is

    with Postgres():
        assert not capsys.readouterr().out
    with Large():
        assert "Memory gets short" in capsys.readouterr().out


def test_memory_that_another_kernels_clusters_hold_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine that has room for two clusters, and for the pods that use them."""
    held: list[PrivateBroker] = []

    def memory() -> SimpleNamespace:
        used = sum(psutil.Process(one.pid).memory_info().rss for one in held)
        return SimpleNamespace(available=(2 * EACH_MB + SPARE_MB) * 1_000_000 - used)

    def stop() -> None:
        raise LabkitError("far enough")

    monkeypatch.setattr(psutil, "virtual_memory", memory)
    with ExitStack() as first:
        held += [first.enter_context(PrivateBroker()), first.enter_context(PrivateBroker())]
        assert not capsys.readouterr().out
        monkeypatch.setattr(private_broker, "prepare", stop)
        with pytest.raises(LabkitError, match="far enough"):
            Lab("second-kernel", cluster="private")
        assert "Memory gets short" in capsys.readouterr().out


def test_a_folder_that_postgres_may_not_enter_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(LabkitError, match=f"may not enter {tmp_path}: set TMPDIR"):
        Postgres()


@pytest.mark.long
def test_killed_it_stays_down_and_comes_back_with_all_that_was_confirmed(broker: PrivateBroker) -> None:
    topic = fresh_topic(broker.cluster, 2)
    put(topic, *range(1000))
    before = broker.pid
    broker.kill()
    assert broker.state is ServerState.DOWN
    assert not is_alive(before)
    with pytest.raises(ClusterUnreachable):
        broker.cluster.describe(1)
    broker.restart()
    assert broker.state is ServerState.RUNNING
    with Reader(topic) as reader:
        assert sorted(record.value for record in reader.read_to_end()) == list(range(1000))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_killed_again_before_it_is_let_back_in_it_comes_back(broker: PrivateBroker) -> None:
    """Its controller then misses nobody: it has nothing to wait for."""
    topic = fresh_topic(broker.cluster)
    put(topic, 1)
    broker.kill()
    restarting = threading.Thread(target=broker.restart, daemon=True)  # it raises when the broker ends
    before = broker.pid
    restarting.start()
    wait_until(lambda: broker.pid != before, what="the second start")
    os.kill(broker.pid, signal.SIGKILL)
    restarting.join(60)
    broker.restart()
    with Reader(topic) as reader:
        assert [record.value for record in reader.read_to_end()] == [1]


@pytest.mark.long
def test_killed_amid_commits_it_writes_their_markers_when_it_is_back(broker: PrivateBroker) -> None:
    """Else whoever reads committed records waits for ever, and so does a group for its offsets."""
    topic = fresh_topic(broker.cluster, 40)
    with Committing(topic) as committing:
        broker.kill()
    broker.restart()
    committing.join()
    with Reader(topic) as reader:
        assert reader.read_to_end()


@pytest.mark.long
def test_frozen_it_says_nothing_until_it_is_thawed(broker: PrivateBroker) -> None:
    with pytest.raises(LabkitError, match="nothing to thaw"):
        broker.thaw()
    broker.freeze()
    assert broker.state is ServerState.FROZEN
    with pytest.raises(ClusterUnreachable):
        broker.cluster.describe(1)
    broker.thaw()
    assert broker.cluster.describe().cluster_id == broker.cluster_id


@pytest.mark.long
def test_restarted_in_good_order_or_from_frozen_it_keeps_port_and_data(broker: PrivateBroker) -> None:
    topic = fresh_topic(broker.cluster)
    put(topic, 1)
    broker.restart()
    put(topic, 2)
    broker.freeze()
    broker.restart()
    with Reader(topic) as reader:
        assert [record.value for record in reader.read_to_end()] == [1, 2]


@pytest.mark.long
def test_a_death_that_nobody_ordered_is_seen(broker: PrivateBroker) -> None:
    os.kill(broker.pid, signal.SIGKILL)
    wait_until(lambda: broker.state is ServerState.DOWN)
    broker.restart()
    assert broker.cluster.describe().brokers == {1}


@pytest.mark.long
def test_one_commit_at_a_time_is_on_its_way(broker: PrivateBroker) -> None:
    """Two could overtake each other when the client sends them again: the older one would be stored last."""
    topic = fresh_topic(broker.cluster)
    put(topic, *range(2000))
    consumer = Consumer(topic, lambda record: time.sleep(0.005), fresh_group(), commit_interval=0.1)
    with Member(consumer) as member:
        member.journal.wait_for(Step.COMMITTED)
        broker.freeze()
        member.journal.wait_for(Step.HANDLED, len(member.journal.of(Step.HANDLED)) + 200)  # ten intervals
        broker.thaw()
        member.journal.wait_for(Step.COMMITTED, len(member.journal.of(Step.COMMITTED)) + 3)
        # Before the stop, whose own commit need not wait for one that is on its way.
        steps = [step for step, _ in list(member.journal.steps) if step in (Step.FLUSHED, Step.COMMITTED)]
    assert (Step.FLUSHED, Step.FLUSHED) not in pairwise(steps)


@pytest.mark.long
def test_halted_for_a_moment_it_stays_the_leader(broker: PrivateBroker) -> None:
    """A broker that is fenced whenever the machine halts makes the machine busier: all partitions change leaders."""
    topic = fresh_topic(broker.cluster, 8)
    for number in range(3):
        broker.freeze()
        time.sleep(0.8)  # the halt itself
        broker.thaw()
        put(topic, number)
        time.sleep(0.2)  # the controller looks for sessions that are over from time to time
    client = AdminClient(broker.cluster.config({}))
    [answer] = client.list_offsets({TopicPartition(topic.name, 0): OffsetSpec.latest()}).values()  # type: ignore[no-untyped-call]
    assert answer.result().leader_epoch == 0


def test_closed_it_leaves_nothing(state_dir: Path) -> None:
    broker = PrivateBroker()
    folder, pid = broker.log.parent, broker.pid
    broker.freeze()
    broker.close()
    broker.close()
    assert not folder.exists()
    assert not is_alive(pid)
    with pytest.raises(LabkitError, match="closed"):
        broker.restart()


@pytest.mark.long
def test_it_dies_with_its_owner_and_the_next_one_clears_up(state_dir: Path) -> None:
    code = """
        import time
        from labkit.runtime.private_broker import PrivateBroker
        broker = PrivateBroker()
        broker.freeze()
        print(broker.log.parent, broker.pid, flush=True)
        time.sleep(600)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout
        folder, pid = owner.stdout.readline().split()
        with PrivateBroker() as other:  # beside a living one: nobody's data is touched
            assert Path(folder, "data").exists()
            assert other.log.parent != Path(folder)
            owner.kill()
            wait_until(lambda: not is_alive(int(pid)), 5, "the end of a frozen broker whose owner was killed")
    with PrivateBroker():
        assert not Path(folder).exists()
    assert not [one for one in processes_of(state_dir) if folder in " ".join(one.cmdline())]


@pytest.mark.long
def test_a_port_that_is_taken_meanwhile_is_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    from labkit.runtime import broker as making

    with PrivateBroker() as first:
        taken = int(first.cluster.bootstrap.rpartition(":")[2])
        choices = iter([(taken, making.free_ports()[1])])
        free = making.free_ports
        monkeypatch.setattr(making, "free_ports", lambda: next(choices, None) or free())
        with PrivateBroker() as second:
            assert second.cluster.describe().cluster_id == second.cluster_id != first.cluster_id
