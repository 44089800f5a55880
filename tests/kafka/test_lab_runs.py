"""Runs of labs: what they leave, what is collected, and by whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from consuming import Member, put
from lab_helpers import Order, orders, values, wait_ready
from processes import is_alive, wait_until

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.kafka.topics import Topic
from labkit.lab import runs
from labkit.lab.lab import _close_all
from labkit.lab.pods.deployment import Deployment
from labkit.patterns.dead_letters import dead_letters_topic
from labkit.patterns.own_topics import own_topic
from labkit.patterns.retries import RetryingConsumer, retry_topics
from labkit.runtime.which_kafka import Connection

pytestmark = pytest.mark.usefixtures("connection")

NOTEBOOK = """
import sys
from labkit import Lab
from labkit.kafka import Consumer

lab = Lab("killed")
topic = lab.topic("orders", 2, dict)
shop = lab.deploy("shop", Consumer(topic, lambda record: None), replicas=2)
while not shop.ready():
    pass
shop.pods[0].freeze()
print(lab.run.prefix, *(pod.child.pid for pod in shop.pods), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("runs")
    yield lab
    lab._end(0)


def left(cluster: Cluster, prefix: str) -> list[str]:
    """Topics and groups of a run, those that its groups have beside other people's topics among them."""
    return sorted(name for name in (*cluster.topics(), *cluster.groups()) if prefix in name)


def record(lab: Lab, state_dir: Path) -> Path:
    return state_dir / "runs" / f"{lab.run.id}.json"


@pytest.mark.long
def test_close_leaves_nothing(lab: Lab, cluster: Cluster, state_dir: Path) -> None:
    topic = lab.topic("orders", 2, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None), replicas=3)
    load = lab.load(topic, orders(1000), rate=100)
    board = lab.board(lag=shop)
    wait_ready(shop)
    shop.pods[0].freeze()
    shop.pods[1].kill()
    pids = [pod.child.pid for pod in shop.pods if pod.child]
    assert len(left(cluster, lab.run.prefix)) == 3  # two topics and a group
    (folder := lab.folder).joinpath("view.db").write_text("rows")
    assert lab.folder == folder
    lab.close()
    assert not folder.exists()
    assert left(cluster, lab.run.prefix) == []
    assert not [pid for pid in pids if is_alive(pid)]
    assert not record(lab, state_dir).exists()
    wait_until(lambda: load.done, 5)
    assert board is not None
    lab.close()
    assert repr(lab) == f"Lab runs (run {lab.run.id}): closed"
    for act in (
        lambda: lab.topic("more"),
        lambda: lab.deploy("shop", Consumer(topic, print)),
        lambda: lab.load(topic, orders(1)),
        lambda: lab.board(lag=shop),
        lambda: lab.when(lambda: True, print),
    ):
        with pytest.raises(
            LabkitError, match=r"lab is closed: run the notebook again from the cell with Lab\('runs'\)"
        ):
            act()
    assert "closed: run the notebook again from the cell with" in lab._repr_html_()
    with pytest.raises(LabkitError, match="shop has ended, or was told to: use what"):
        shop.scale(3)


@pytest.mark.long
@pytest.mark.parametrize("step", [Deployment.scale_down, Deployment.drain, runs.Run.end])
def test_an_interrupted_close_is_finished_by_the_next(
    lab: Lab,
    cluster: Cluster,
    state_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: Callable[..., object],
) -> None:
    topic = lab.topic("orders", 2, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None), replicas=2)
    wait_ready(shop)
    pids = [pod.child.pid for pod in shop.pods if pod.child]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    owner = runs.Run if step is runs.Run.end else Deployment
    with monkeypatch.context() as patch:
        patch.setattr(owner, step.__name__, interrupted)
        with pytest.raises(KeyboardInterrupt):
            lab.close()
    with pytest.raises(LabkitError, match="this lab is closed"):
        lab.topic("more")
    lab.close()
    assert not [pid for pid in pids if is_alive(pid)]
    assert left(cluster, lab.run.prefix) == []
    assert not record(lab, state_dir).exists()
    lab.close()


def test_at_exit_every_lab_is_closed_though_one_fails(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab("first") as first, Lab("last") as last:
        broken = first._sampler.close

        def fail() -> None:
            broken()
            raise RuntimeError("no")

        with monkeypatch.context() as patch:
            patch.setattr(first._sampler, "close", fail)
            with pytest.raises(RuntimeError, match="no"):
                _close_all()
        assert [one._closed for one in (lab, first, last)] == [True, False, True]


@pytest.mark.long
def test_closing_while_a_deployment_is_replaced_leaves_no_pod(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    lab.load(topic, orders(1)).wait()
    old = lab.deploy("shop", Consumer(topic, lambda record: time.sleep(60)))
    wait_until(lambda: old.ready(), 20)
    assert old.pods[0].child
    pid = old.pods[0].child.pid
    with ThreadPoolExecutor(1) as thread:  # as what `lab.when` does
        replaced = thread.submit(lab.deploy, "shop", Consumer(topic, lambda record: None))
        wait_until(lambda: old.pods == [], 20, "it to be replaced")
        lab._end(0)
        with pytest.raises(LabkitError, match="this lab is closed"):
            replaced.result(20)
    assert not is_alive(pid)
    assert [pod.child for pod in lab.deployments["shop"].pods] == [None]


def test_what_is_deployed_while_a_lab_closes_never_starts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before its topics are made, the lab was open."""
    consumer = Consumer(lab.topic("orders", 1, Order), lambda record: None)
    prepare = Consumer.prepare

    def prepare_and_close(self: Consumer) -> Consumer:
        prepared = prepare(self)
        lab._end(0)
        return prepared

    monkeypatch.setattr(Consumer, "prepare", prepare_and_close)
    with pytest.raises(LabkitError, match="this lab is closed"):
        lab.deploy("shop", consumer)
    assert not lab.deployments["shop"]._thread.is_alive()
    assert [pod.child for pod in lab.deployments["shop"].pods] == [None]


def test_a_lab_of_the_same_name_closes_the_one_before(lab: Lab, cluster: Cluster) -> None:
    shop = lab.deploy("shop", Consumer(lab.topic("orders", 1, Order), lambda record: None))
    wait_ready(shop)
    assert shop.pods[0].child
    pid, prefix = shop.pods[0].child.pid, lab.run.prefix
    with Lab("runs") as after:
        assert not is_alive(pid)
        assert left(cluster, prefix) == []
        assert after.run.prefix != prefix
        with pytest.raises(LabkitError, match="closed"):
            lab.topic("orders")
        with Lab("other") as other:  # does not
            other.topic("orders")
            after.topic("orders")


@pytest.mark.long
def test_a_lab_nobody_holds_goes_on(connection: Connection) -> None:
    """Its pods work, so it is no garbage. The next of its name ends it."""
    shop = Lab("forgotten").deploy("shop", Consumer(_somewhere(connection.cluster), lambda record: None))
    wait_ready(shop)
    assert shop.pods[0].child
    pid = shop.pods[0].child.pid
    Lab("forgotten").close()
    assert not is_alive(pid)


def _somewhere(cluster: Cluster) -> Topic[Order]:
    topic = Topic(cluster, f"test.somewhere.{time.time_ns()}", 1, Order)
    topic.create()
    return topic


def test_a_lab_that_cannot_be_made(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "…"):
        with pytest.raises(LabkitError, match="cannot be a notebook's name"):
            Lab(name)
    with pytest.raises(LabkitError, match="pace must be positive"):
        Lab("runs", pace=0)
    monkeypatch.setenv("LABKIT_PACE", "fast")
    with pytest.raises(LabkitError, match="LABKIT_PACE must be a number, not 'fast'"):
        Lab("runs")


@pytest.mark.long
def test_what_a_killed_notebook_left_is_collected(cluster: Cluster, lab: Lab, state_dir: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", NOTEBOOK], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        prefix, *pids = process.stdout.readline().decode().split()
        assert prefix in dict(runs.living())
        assert "killed" in lab._repr_html_()  # among the other labs
        process.kill()
    wait_until(lambda: not [pid for pid in pids if is_alive(int(pid))], 5, "the end of its pods, the frozen one too")
    assert len(left(cluster, prefix)) == 3
    assert prefix not in dict(runs.living())
    with Lab("next") as after:
        assert prefix in after.collected
        # A group whose members were killed lives as long as their sessions: it is not forgotten.
        assert left(cluster, prefix) in ([], [f"{prefix}shop"])
    wait_until(lambda: not _collected(cluster, lab, prefix), 15, "the group to be collected")
    assert lab.run.prefix + "telemetry" in cluster.topics()  # a living run's


def _collected(cluster: Cluster, lab: Lab, prefix: str) -> list[str]:
    runs.collect(cluster, lab.connection.cluster_id)
    return left(cluster, prefix)


def refuse(record: object) -> None:
    raise ValueError("no")


def test_close_deletes_what_retries_made_and_nothing_of_anybody_else(lab: Lab, cluster: Cluster) -> None:
    mine, foreign = lab.topic("orders", 1, Order), _somewhere(cluster)
    lab.deploy("shop", RetryingConsumer([mine, foreign], refuse, retry=retry_topics(0.1)))
    for topic in (mine, foreign):
        put(topic, {"id": 1})
    letters = [dead_letters_topic(topic, lab.run.name("shop")) for topic in (mine, foreign)]
    wait_until(lambda: [len(values(topic)) for topic in letters] == [1, 1], 30, "both in their queues")
    others = decoys(lab.run, foreign.name)
    for name in others:
        cluster.create_topic(name, 1)
    # Telemetry, orders, the group; and beside each source replays, retries, dead letters, lanes and skips.
    assert len([name for name in left(cluster, lab.run.prefix) if name not in others]) == 3 + 2 * 5
    lab.close()
    assert [name for name in left(cluster, lab.run.prefix) if name not in others] == []
    assert cluster.topics().keys() >= {*others, foreign.name}
    cluster.delete_topics([*others, foreign.name])


def decoys(run: runs.Run, foreign: str) -> list[str]:
    """Names of topics that are like those of a run, and not its own."""
    _, learner, notebook, _, _ = run.prefix.split(".")
    another = f"labkit.{learner}.{notebook}.991231235959ffff.orders"
    return [
        another,
        f"{run.prefix[:-1]}orders",
        f"{run.prefix[:-1]}0.orders",
        f"labkit.{learner}s.{notebook}.{run.id}.orders",
        f"labkit.{learner}.{notebook}s.{run.id}.orders",
        f"test.{run.prefix}orders",
        f"copy_{run.prefix}orders_v2",
        own_topic(foreign, another, "lanes"),
        own_topic(f"{run.prefix}orders", another, "lanes"),  # another run's group beside a topic of this one
        own_topic(foreign, f"test.{run.prefix}shop", "lanes"),
    ]


def test_only_what_is_of_a_dead_runs_name_is_deleted(cluster: Cluster, connection: Connection, state_dir: Path) -> None:
    run = runs.Run("dead", connection.cluster_id)
    mine, stranger = run.name("mine"), f"test.stranger.{time.time_ns()}"
    beside = own_topic(stranger, run.name("shop"), "lanes")
    others = [stranger, *decoys(run, stranger)]
    beside_another = own_topic(others[1], run.name("shop"), "lanes")
    for name in (mine, beside, beside_another, *others):
        cluster.create_topic(name, 1)
    assert run.prefix not in runs.collect(cluster, connection.cluster_id)  # it lives
    run.forget()
    assert run.prefix not in runs.collect(cluster, "another-cluster")
    assert run.prefix in runs.collect(cluster, connection.cluster_id)
    assert not {mine, beside, beside_another} & cluster.topics().keys()
    assert cluster.topics().keys() >= set(others)
    assert not (state_dir / "runs" / f"{run.id}.json").exists()
    cluster.delete_topics(others)


def test_a_record_of_an_earlier_labkit_is_collected_by_its_prefix(cluster: Cluster, connection: Connection) -> None:
    """It lists topics and groups; only the prefix counts, whatever else it lists."""
    run = runs.Run("earlier", connection.cluster_id)
    stranger = f"test.stranger.{time.time_ns()}"
    told = json.loads(run._path.read_text())
    run._path.write_text(json.dumps({**told, "topics": [run.name("orders"), stranger], "groups": [run.name("shop")]}))
    for name in (run.name("orders"), run.name("unlisted"), stranger):
        cluster.create_topic(name, 1)
    run.forget()
    assert run.prefix in runs.collect(cluster, connection.cluster_id)
    assert left(cluster, run.prefix) == []
    assert stranger in cluster.topics()
    cluster.delete_topics([stranger])


@pytest.mark.parametrize("prefix", ["", "labkit.", "test."])
def test_a_record_with_another_prefix_deletes_nothing(cluster: Cluster, connection: Connection, prefix: str) -> None:
    run = runs.Run("broken", connection.cluster_id)
    told = json.loads(run._path.read_text())
    run._path.write_text(json.dumps({**told, "prefix": prefix}))
    stranger = _somewhere(cluster)
    run.forget()
    runs.collect(cluster, connection.cluster_id)
    assert not run._path.exists()
    assert stranger.name in cluster.topics()
    cluster.delete_topics([stranger.name])


def test_records_that_are_broken_or_being_made_harm_nobody(
    cluster: Cluster, connection: Connection, state_dir: Path
) -> None:
    folder = runs._folder()  # made, if this test is the first
    empty, broken = folder / "empty.json", folder / "broken.json"
    empty.write_bytes(b"")
    broken.write_bytes(b'{"cluster')
    (folder / "gone.json").symlink_to(folder / "nowhere")
    try:
        runs.collect(cluster, connection.cluster_id)
        runs.living()
        assert empty.exists()
        long_ago = time.time() - runs.FORGET - 10
        os.utime(broken, (long_ago, long_ago))
        runs.collect(cluster, connection.cluster_id)
        assert not broken.exists()
    finally:
        for path in (empty, folder / "gone.json"):
            path.unlink(missing_ok=True)


def test_what_a_dead_run_had_elsewhere_goes_too(cluster: Cluster, connection: Connection, tmp_path: Path) -> None:
    """Where the path of its folder is too long for a socket, the socket has a folder of its own."""
    run = runs.Run("far-away", connection.cluster_id)
    elsewhere = tmp_path / "labkit-elsewhere"
    elsewhere.mkdir()
    (run.folder / "control").symlink_to(elsewhere / "control")
    run.forget()  # it was killed
    assert run.prefix in runs.collect(cluster, connection.cluster_id)
    assert not elsewhere.exists()


def test_a_run_whose_cluster_is_away_is_kept(
    cluster: Cluster, connection: Connection, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.Run("away", connection.cluster_id)
    name = run.name("orders")
    cluster.create_topic(name, 1)

    def away(self: Cluster, names: object) -> None:
        raise ClusterUnreachable("away")

    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "delete_topics", away)
        run.end(cluster)
    assert (state_dir / "runs" / f"{run.id}.json").exists()
    assert run.prefix in runs.collect(cluster, connection.cluster_id)
    assert name not in cluster.topics()


def test_who_has_the_name_of_somebody_elsewhere_is_warned(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", cluster.bootstrap)
    with Lab("unnamed") as lab:
        assert "LABKIT_LEARNER is not set, so this is your user name" in lab._repr_html_()
    monkeypatch.setenv("LABKIT_LEARNER", "Twin")
    topic = Topic(cluster, "labkit.twin.elsewhere.261124090000aaaa.orders", 1, dict)
    topic.create()
    group = topic.name.replace("orders", "shop")
    put(topic, {})
    with Member(Consumer(topic, lambda record: None, group=group)) as member:
        member.wait_committed({0: 1})
        with Lab("here") as lab, Lab("and-here"):
            assert f"at {cluster.bootstrap} as twin</td>" in lab._repr_html_()
        said = "twin runs notebook elsewhere on another machine, too: group shop has members. If that is not you, set"
        assert capsys.readouterr().out.count(said) == 2, "once by each, and none by its own runs"
    with Lab("after"):
        assert capsys.readouterr().out == ""
    cluster.delete_topics([topic.name])
    cluster.delete_groups([group])
