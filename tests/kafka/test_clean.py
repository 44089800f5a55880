"""`labkit clean`: what it removes, what it leaves alone, and what it says."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AclOperation, ResourceType  # type: ignore[attr-defined]
from consuming import Member, put
from secured import allow, broker_with_acls
from typer.testing import CliRunner

from labkit import Lab
from labkit.cli.main import app
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import NotAllowed
from labkit.kafka.lag import committed_offsets
from labkit.kafka.topics import Topic
from labkit.lab import runs
from labkit.lab.remains import remains, remove

pytestmark = pytest.mark.usefixtures("connection")

LONG_AGO = "261124090000"


def labkit(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["clean", *arguments])
    assert done.exit_code == code, done.output
    return done.output


class Class:
    """Learners whom nobody else has, with runs of machines that are gone."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.mark = cluster, uuid.uuid4().hex[:6]

    def learner(self, name: str) -> str:
        return f"{name}-{self.mark}"

    def topic(self, name: str, short: str = "rents", at: str = LONG_AGO) -> Topic[int]:
        prefix = f"labkit.{runs.learner(self.learner(name))}.retries.{at}aaaa."
        topic = Topic(self.cluster, f"{prefix}{short}", 1, int)
        topic.create()
        return topic

    def verdicts(self, name: str) -> Topic[int]:
        topic = Topic(self.cluster, f"labkit.{self.learner(name)}.class", 1, int)
        topic.create({"cleanup.policy": "compact"})
        return topic

    def left(self) -> set[str]:
        return {name for name in (*self.cluster.topics(), *self.cluster.groups()) if self.mark in name}


@pytest.fixture
def room(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Class]:
    room = Class(cluster)
    monkeypatch.setenv("LABKIT_LEARNER", room.learner("ada"))
    yield room
    cluster.delete_topics([name for name in cluster.topics() if room.mark in name])
    cluster.delete_groups([name for name in cluster.groups() if room.mark in name])


def test_one_learner_is_reset_and_nobody_else_is_touched(room: Class) -> None:
    mine, bobs, beside = room.topic("ada"), room.topic("bob"), room.topic("bob", "fees", at="261123080000")
    verdicts, eves = room.verdicts("bob"), room.verdicts("eve")
    group = f"{bobs.name.removesuffix('rents')}shop"
    put(bobs, 1)
    with Member(Consumer(bobs, lambda record: None, group=group)) as member:
        member.wait_committed({0: 1})
        said = labkit("--learner", room.learner("bob"), "--older-than", "1s", "--yes")
        assert "stays: group shop has members" in said
        assert room.left() == {mine.name, bobs.name, group, verdicts.name, eves.name}, "a run that lives stays"
        said = labkit("--learner", room.learner("bob"), "--yes", code=1)
        assert "group shop has members" in said
        assert "stays: a run of this learner lives" in said
        assert "labkit: nothing was removed: what is there lives. Close its lab first (`lab.close()`)" in said
    said = labkit("--learner", room.learner("bob").upper(), "--yes")
    assert said.endswith("Removed 2 topics and 1 group.\n")
    assert beside.name not in said
    assert room.left() == {mine.name, eves.name}
    assert not committed_offsets(room.cluster, group)
    said = labkit("--learner", room.learner("bob"), "--yes")
    assert said.startswith("There is nothing to remove.\n"), "twice is no error"


def test_ones_own_that_have_ended_by_default(room: Class) -> None:
    old, new = room.topic("ada"), room.topic("ada", at=time.strftime("%y%m%d%H%M%S", time.gmtime()))
    others = {room.topic("bob").name, room.verdicts("ada").name}
    assert labkit("--older-than", "2h", "--yes").endswith("Removed 1 topic.\n")
    assert room.left() == {new.name, *others}
    with Lab("cleaned") as lab:
        said = labkit("--yes")
        assert f"stays: process {os.getpid()} of this machine has it" in said
        assert "Removed 1 topic.\n" in said
        assert room.left() == {lab.run.name("telemetry"), *others}
        assert lab.run.id in labkit("--yes", code=1)
    assert old.name not in room.left() == others


def test_without_a_terminal_it_only_says_what_it_would_do(room: Class) -> None:
    topic = room.topic("ada")
    head, row, said = labkit().splitlines()
    assert head.split() == ["learner", "notebook", "run", "since", "topics", "groups"]
    assert row.split()[:3] == [room.learner("ada"), "retries", f"{LONG_AGO}aaaa"]
    assert row.split()[-2:] == ["1", "0"]
    assert said == "This would remove 1 topic. Nothing was removed, as there is no terminal to ask at: add --yes."
    assert room.left() == {topic.name}


def test_at_a_terminal_it_asks(room: Class) -> None:
    topic = room.topic("ada")
    here, there = pty.openpty()
    command = [sys.executable, "-c", "from labkit.cli.main import app; app(['clean'])"]
    os.write(here, b"n\n")
    done = subprocess.run(command, stdin=there, capture_output=True, text=True, timeout=60, check=False)
    os.close(here)
    os.close(there)
    assert done.returncode == 1
    assert f"Remove 1 topic at {room.cluster.bootstrap} for good?" in done.stderr
    assert done.stderr.endswith("labkit: nothing was removed\n")
    assert room.left() == {topic.name}


@pytest.mark.parametrize("wrong", ["2", "h", "-1h", "2 hours"])
def test_a_time_that_is_none_is_named(wrong: str) -> None:
    assert f"such as 2h, not {wrong!r}" in labkit(f"--older-than={wrong}", code=1)


def test_all_and_one_learner_is_refused() -> None:
    assert "leave out --all, or --learner" in labkit("--all", "--learner", "bob", code=1)


@pytest.mark.parametrize("name", ["Bob. B.", "Jörg Müßig", "b" * 200])
def test_whatever_a_learner_is_called(room: Class, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = room.learner(name)
    monkeypatch.setenv("LABKIT_LEARNER", full)
    run = runs.Run("names", "no-cluster")
    topic = Topic(room.cluster, run.name("orders"), 1, int)
    topic.create()
    try:
        assert "this machine has it" in labkit("--learner", full, code=1)
    finally:
        run.forget()
        run._path.unlink()
    assert labkit("--learner", full, "--yes").endswith("Removed 1 topic.\n")
    assert topic.name not in room.cluster.topics()


def test_what_came_to_life_after_it_was_looked_at_stays(room: Class) -> None:
    topic, other = room.topic("bob"), room.topic("eve")
    group = f"{topic.name.removesuffix('rents')}shop"
    seen = [one for one in remains(room.cluster) if room.mark in one.learner]
    assert not [one for one in seen if one.life]
    put(topic, 1)
    with Member(Consumer(topic, lambda record: None, group=group)) as member:
        member.wait_committed({0: 1})
        left, (why,) = remove(room.cluster, seen)
        assert left == [topic.name]
        assert why.endswith("lives again: group shop has members.")
    assert other.name not in room.left()


def test_a_run_that_begins_while_it_looks_lives(room: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[runs.Run] = []
    ask = Cluster.topics

    def beginning(cluster: Cluster) -> dict[str, int]:
        if not begun:
            begun.append(runs.Run("begun", "no-cluster"))
            Topic(cluster, begun[0].name("orders"), 1, int).create()
        return ask(cluster)

    monkeypatch.setattr(Cluster, "topics", beginning)
    (found,) = [one for one in remains(room.cluster) if one.prefix == begun[0].prefix]
    assert "this machine has it" in found.life
    begun[0].forget()
    begun[0]._path.unlink()


@pytest.mark.long
def test_a_cluster_that_forbids_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what was removed and what was not, and what to ask for; a lab that may make no topic, too."""
    with broker_with_acls(tmp_path / "broker") as cluster:
        room = Class(cluster)
        mine, bobs, verdicts = room.topic("ada"), room.topic("bob"), room.verdicts("bob")
        ada, bob = room.learner("ada"), room.learner("bob")
        group = f"{bobs.name}.shop"
        put(bobs, 1)
        with Member(Consumer(bobs, lambda record: None, group=group)) as member:
            member.wait_committed({0: 1})
        rest = (AclOperation.CLUSTER_ACTION, AclOperation.ALTER, AclOperation.DESCRIBE)  # all that is needed but Create
        allow(cluster, ResourceType.BROKER, "kafka-cluster", *rest, exactly=True)
        for kind in (ResourceType.TOPIC, ResourceType.GROUP):
            allow(cluster, kind, "labkit.", AclOperation.DESCRIBE)
            allow(cluster, kind, f"labkit.{ada}.", AclOperation.ALL)
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", cluster.bootstrap)
        monkeypatch.setenv("LABKIT_LEARNER", ada)
        said = labkit("--all", "--yes", code=1).partition("labkit: ")[2].splitlines()
        assert said[:4] == ["removed: 1 topic. Still there:", f"  {verdicts.name}", f"  {bobs.name}", f"  {group}"]
        assert f"2 topics at {cluster.bootstrap} could not be deleted: " in said[4]
        assert f"1 group at {cluster.bootstrap} could not be deleted: " in said[5]
        assert said[6:] == [
            "Ask for Delete on topics and groups that begin with labkit. (an ACL whose pattern type is PREFIXED)."
        ]
        assert mine.name not in room.left()
        assert f"begin with labkit.{bob}. (an ACL" in labkit("--learner", bob, "--yes", code=1)
        with Lab("allowed") as lab:
            assert f"as {ada}</td>" in lab._repr_html_()
        monkeypatch.setenv("LABKIT_LEARNER", bob)
        with pytest.raises(NotAllowed) as refused:
            Lab("refused")
        assert f"Ask for Create on topics that begin with labkit.{bob}. (" in str(refused.value)
        assert "set LABKIT_LEARNER to that name" in str(refused.value)
