"""The trainer's table: what learners' notebooks tell, and what the cluster knows of their runs."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)
from consuming import Member, put
from lab_helpers import values
from processes import wait_until
from typer.testing import CliRunner

from labkit import Lab, class_table, exercise
from labkit.cli.classroom import CLEAR
from labkit.cli.main import app
from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import LabkitError
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.lab import classroom, results, runs
from labkit.lab.classroom import Row, look
from labkit.lab.results import Result, Results, topic_of
from labkit.runtime.broker import Broker, prepare
from labkit.runtime.child import Child
from labkit.runtime.which_kafka import Connection

pytestmark = pytest.mark.usefixtures("connection")

RUN, LATER = "261201090000aaaa", "261201100000bbbb"
BEGAN = 1796115600.0  # when RUN began: 2026-12-01 09:00 UTC


class Class:
    """Learners of this test alone, and what they have on the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.mark = cluster, f"t{uuid.uuid4().hex[:6]}"

    def learner(self, name: str) -> str:
        return f"{self.mark}-{name}"

    def name(self, learner: str, short: str, run: str = RUN) -> str:
        return f"labkit.{self.learner(learner)}.start-here.{run}.{short}"

    def topic(self, learner: str, short: str = "orders", run: str = RUN) -> Topic[int]:
        topic = Topic(self.cluster, self.name(learner, short, run), 1, int)
        topic.create()
        return topic

    def works(self, learner: str, run: str = RUN) -> Member:
        """A pod of this learner, that has handled what is in its topic."""
        topic = self.topic(learner, run=run)
        return Member(Consumer(topic, lambda record: None, group=self.name(learner, "shop", run)))

    def tells(self, learner: str, *told: Result) -> None:
        topic = topic_of(self.cluster, self.learner(learner))
        topic.create({"cleanup.policy": "compact"})
        topic.deliver([(one, one.cell, None) for one in told])

    def rows(self) -> list[Row]:
        return [row for row in look(self.cluster) if row.learner.startswith(self.mark)]


AUTHORIZER = """
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true
"""


@pytest.fixture
def everybody(cluster: Cluster) -> Class:
    return Class(cluster)


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> str:
    """The learner of a lab that this test makes."""
    name = f"me-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("LABKIT_LEARNER", name)
    return name


@pytest.fixture
def lab(connection: Connection, learner: str) -> Iterator[Lab]:
    lab = Lab("class")
    yield lab
    lab._end(0)


def verdict(result: str, why: str = "", run: str = RUN, time: float = BEGAN + 60) -> Result:
    return Result("", "start-here", run, "verdict", "verdict", result, why, time)


def row_of(cluster: Cluster, learner: str) -> Row | None:
    return next((row for row in look(cluster) if row.learner == runs.learner(learner)), None)


# -- what a notebook tells


@pytest.mark.parametrize("name", ["jörg.müller.", "Ünal", "王小明", "x" * 200])
def test_a_verdict_and_an_exercise_reach_the_class(
    name: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_LEARNER", name)
    with Lab("class") as lab:
        assert lab.verdict({"a": 1}, {"a": 1}, name="first").result == "valid"
        assert lab.verdict({"a": 1, "b": 1}, {"a": 1}, name="second").result == "invalid"
        exercise("Choose.", delay=1)
        wait_until(lambda: (row := row_of(cluster, name)) is not None and row.exercise, 20, "what it told")
        row = row_of(cluster, name)
        assert row is not None
        assert (row.notebook, row.run, row.pods, row.lag) == ("class", lab.run.id, 0, 0)
        assert row.verdict is not None
        assert (row.verdict.result, row.verdict.why, row.verdict.cell) == ("invalid", "lost 1", "second")
        assert row.exercise is not None
        assert row.exercise.result == "done"
        assert abs((row.since or 0.0) - row.exercise.time) < 60
    gone = row_of(cluster, name)
    assert gone is not None
    assert (gone.run, gone.pods, gone.lag, gone.verdict) == (lab.run.id, None, None, row.verdict), "it outlives the run"


def test_compaction_keeps_the_last_of_each_cell_and_nothing_of_an_answer(
    lab: Lab, cluster: Cluster, learner: str
) -> None:
    topic = topic_of(cluster, learner)
    for answer in (..., "s3cret", "s3cret too"):
        exercise("Choose.", lambda answer: f"{answer} is wrong", answer=answer)
    lab.verdict({"a": 1}, {"a": 1})
    lab.verdict({"a": 1}, {"a": 2})
    lab._results.close()
    with Reader(topic) as reader:
        told = reader.read_to_end()
    assert [(one.key, one.value.result) for one in told] == [
        ("class/exercise", "open"),
        ("class/exercise", "not yet"),
        ("class/exercise", "not yet"),
        ("class/verdict", "valid"),
        ("class/verdict", "invalid"),
    ]
    assert "s3cret" not in str([one.value for one in told])
    assert cluster.topic_config(topic.name)["cleanup.policy"] == "compact"


def test_the_cell_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython

    class Shell:
        def __init__(self, metadata: Any) -> None:
            self.metadata = metadata

        def get_parent(self) -> dict[str, Any]:
            return {"metadata": self.metadata}

    for metadata, cell in (
        ({"cellId": "crash-verdict"}, "crash-verdict"),
        ({"cellId": "vscode-notebook-cell:00.ipynb#W3sZ"}, "W3sZ"),
        ({}, ""),
        (None, ""),
    ):
        monkeypatch.setattr(IPython, "get_ipython", partial(Shell, metadata))
        assert results._cell() == cell


def test_a_topic_that_cannot_be_used_harms_no_verdict(lab: Lab, cluster: Cluster, learner: str) -> None:
    topic = Topic(cluster, topic_of(cluster, learner).name, 2, dict)
    topic.create({"cleanup.policy": "delete"})  # somebody's own, of that name
    assert lab.verdict({"a": 1}, {"a": 1}).result == "valid"
    assert exercise("Choose.", delay=1)
    lab._results.close()
    assert values(topic) == []


def test_a_kafka_that_is_away_harms_no_verdict(learner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "WAIT", 0.1)
    run = runs.Run("class", "gone")
    away = Results(Cluster("127.0.0.1:1"), run)
    away.tell("verdict", "valid")
    assert exercise("Choose.", delay=1)
    away.close()
    run.forget()


def test_what_a_private_lab_finds_is_told_by_the_shared_one(lab: Lab, cluster: Cluster, learner: str) -> None:
    results.tell("verdict", "valid", name="far view", by=None)
    results._open[0].close()
    (told,) = values(topic_of(cluster, learner))
    assert (told.notebook, told.run, told.cell) == ("class", lab.run.id, "far view")


@pytest.mark.long
def test_a_kafka_that_forbids_its_topic_harms_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kafka, learner = prepare(), "ada"
    monkeypatch.setenv("LABKIT_LEARNER", learner)
    broker = Broker.create(tmp_path / "broker", kafka, extra=AUTHORIZER)
    with Child(kafka.command(broker.folder), cwd=broker.folder, output=broker.log) as child:
        broker.wait_until_ready(lambda: child.poll() is None)
        topic = topic_of(broker.cluster, learner)
        allow = partial(_rule, AclPermissionType.ALLOW, AclOperation.ALL)
        forbid = partial(_rule, AclPermissionType.DENY, AclOperation.CREATE)
        cluster, every = (ResourceType.BROKER, "kafka-cluster"), (ResourceType.TOPIC, "*")
        rules = [allow(*cluster), allow(*every), forbid(*cluster), forbid(ResourceType.TOPIC, topic.name)]
        for rule in rules:
            admin(broker.cluster).create_acls([rule])[rule].result(10)
        with pytest.raises(LabkitError, match="Authorization failed"):
            topic.create()
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", broker.cluster.bootstrap)
        with Lab("class") as lab:
            assert lab.verdict({"a": 1}, {"a": 1}).result == "valid"
            assert exercise("Choose.", delay=1)
            lab._results.close()
            row = row_of(broker.cluster, learner)
            assert row is not None
            assert (row.run, row.verdict) == (lab.run.id, None)
        assert topic.name not in broker.cluster.topics()


def _rule(permission: AclPermissionType, operation: AclOperation, kind: ResourceType, name: str) -> AclBinding:
    return AclBinding(kind, name, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation, permission)


# -- what the table says


def test_a_row_says_since_when_lag_pods_and_the_last_verdict(everybody: Class) -> None:
    put(everybody.topic("ada"), *range(3))
    put(everybody.topic("ada", "telemetry"), 1)
    everybody.tells("ada", verdict("valid"), verdict("invalid", "lost 2, wrong 1", time=BEGAN + 90))
    with everybody.works("ada") as pod:
        pod.wait_committed({0: 3})
        (row,) = everybody.rows()
        assert (row.notebook, row.since, row.lag, row.pods) == ("start-here", BEGAN, 0, 1)
    put(everybody.topic("ada"), 3, 4)
    (row,) = everybody.rows()
    assert (row.lag, row.pods) == (2, 0)
    assert row.verdict is not None
    assert row.verdict.result == "invalid"
    assert classroom.cells(row, (row.last_word or 0.0) + 130)[3:7] == (
        "2 min",
        "2",
        "0",
        "invalid: lost 2, wrong 1 (verdict)",
    )


def test_two_of_one_name_are_both_shown(everybody: Class) -> None:
    everybody.topic("bob")
    with ExitStack() as stack:
        for run in (RUN, LATER):
            put(everybody.topic("ada", run=run), 1)
            stack.enter_context(everybody.works("ada", run)).wait_committed({0: 1})
        ada, again, bob = everybody.rows()
        assert [(row.run, row.pods) for row in (ada, again, bob)] == [(RUN, 1), (LATER, 1), (RUN, 0)]
    ada, bob = everybody.rows()
    assert ada.run == LATER, "a run without pods stands behind the newer one of its notebook"


def test_a_run_that_is_deleted_meanwhile(everybody: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, group = everybody.cluster, everybody.name("ada", "shop")
    put(everybody.topic("ada"), 1)
    with everybody.works("ada") as pod:
        pod.wait_committed({0: 1})
    put(everybody.topic("bob"), 1)
    everybody.tells("ada", verdict("valid"))

    def deleting(part: str) -> None:
        """Have the run deleted just before this part of the look."""
        done: Callable[..., Any] = getattr(classroom, part)

        def first(*arguments: Any) -> Any:
            cluster.delete_topics([name for name in cluster.topics() if everybody.learner("ada") in name])
            cluster.delete_groups([group])
            return done(*arguments)

        monkeypatch.setattr(classroom, part, first)

    deleting("_told")
    ada, bob = everybody.rows()
    assert (ada.pods, ada.verdict, bob.lag) == (0, None, 0)
    assert [row.learner for row in everybody.rows()] == [bob.learner]


@pytest.mark.parametrize("part", ["newest_records", "lag"])
def test_topics_that_go_between_two_questions(part: str, everybody: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    put(everybody.topic("ada"), 1)
    with everybody.works("ada") as pod:
        pod.wait_committed({0: 1})
    ask: Callable[..., Any] = getattr(classroom, part)

    def deleted(cluster: Cluster, *more: Any) -> Any:
        cluster.delete_topics([everybody.name("ada", "orders")])
        return ask(cluster, *more)

    monkeypatch.setattr(classroom, part, deleted)
    (row,) = everybody.rows()
    assert (row.lag, row.pods) == (0, 0)


@pytest.mark.long
def test_thirty_learners(everybody: Class) -> None:
    names = [everybody.name(f"{number:02}", short) for number in range(30) for short in ("orders", "telemetry")]
    names += [f"labkit.{everybody.learner(f'{number:02}')}.class" for number in range(30)]
    for made in admin(everybody.cluster).create_topics([NewTopic(name, 1) for name in names]).values():
        made.result(20)
    wait_until(lambda: everybody.cluster.topics().keys() >= {*names}, 10, "the topics")
    assert len(everybody.rows()) == 30


def test_what_is_no_result_is_passed_over(everybody: Class) -> None:
    everybody.tells("ada", verdict("invalid", "\x1b[2Jlost 1"))
    everybody.tells("eve", verdict("valid", run="no.run"))
    topic = topic_of(everybody.cluster, everybody.learner("ada"))
    Topic(everybody.cluster, topic.name, 1, dict).deliver([({"cell": 7}, "x", None), (None, "y", None)])
    Topic(everybody.cluster, f"labkit.{everybody.learner('bob')}.start-here.999999999999aaaa.orders", 1, int).create()
    ada, bob = everybody.rows()
    assert classroom.cells(ada, BEGAN)[6] == "invalid:  [2Jlost 1 (verdict)", "no command for a terminal"
    assert (bob.since, bob.last_word) == (None, None)
    assert classroom.cells(bob, BEGAN)[2:] == ("–", "–", "0", "0", "–", "–")


# -- where it is shown


def labkit(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_says_it_as_lines_and_in_json(everybody: Class) -> None:
    everybody.tells("ada", verdict("invalid", "lost 2"))
    line = next(line for line in labkit("class").splitlines() if everybody.learner("ada") in line)
    assert "invalid: lost 2 (verdict)" in line
    row = next(row for row in json.loads(labkit("class", "--json")) if row["learner"] == everybody.learner("ada"))
    assert (row["notebook"], row["since"], row["pods"], row["verdict"]["why"]) == ("start-here", BEGAN, None, "lost 2")
    own = json.loads(labkit("topics", "--learner", everybody.learner("ada"), "--json"))
    assert [row["learner"] for row in own if row["short"] == "class"] == [everybody.learner("ada")]
    others = json.loads(labkit("topics", "--learner", "somebody", "--json"))
    assert not [row for row in others if row["short"] == "class"], "a learner's class topic is nobody else's"


def test_the_widget_follows_the_class(everybody: Class) -> None:
    everybody.tells("ada", verdict("valid"))
    shown = class_table(everybody.cluster, refresh=0.05)
    bundle = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert everybody.learner("ada") in shown.widget.value
    everybody.tells("ada", verdict("unknown", "<b> is frozen", time=BEGAN + 90))
    wait_until(lambda: "unknown: &lt;b&gt; is frozen" in shown.widget.value, 10, "the new verdict")
    shown.close()
    assert shown.rows


@pytest.mark.long
def test_the_command_goes_on_at_a_terminal_until_it_is_interrupted(everybody: Class) -> None:
    everybody.tells("ada", verdict("valid"))
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", "from labkit.cli.main import app; app()", "class"])
    seen = ""

    def shows(text: str) -> bool:
        nonlocal seen
        seen += os.read(terminal, 10_000).decode()
        return text in seen.rpartition(CLEAR)[2]

    wait_until(lambda: shows("valid (verdict)"), 30, "the first look")
    everybody.tells("ada", verdict("invalid", "lost 9", time=BEGAN + 90))
    wait_until(lambda: shows("lost 9"), 30, "a later look")
    os.kill(process, signal.SIGINT)
    with suppress(OSError):  # the end of a terminal that nobody is at
        while os.read(terminal, 10_000):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    os.close(terminal)


@pytest.mark.long
def test_the_table_while_a_learner_is_cut_off_and_while_kafka_is_frozen(learner: str) -> None:
    with Lab("class", cluster="private") as lab:
        there = Class(lab.cluster)
        topic = replace(there.topic("ada"), cluster=lab.proxy.cluster)
        put(there.topic("ada"), 1)
        put(there.topic("bob"), 1)
        run = runs.Run("far", "private")
        far = Results(lab.proxy.cluster, run)
        with Member(Consumer(topic, lambda record: None, group=there.name("ada", "shop"))) as pod:
            pod.wait_committed({0: 1})
            lab.proxy.cut()
            put(there.topic("ada"), 2)
            wait_until(lambda: there.rows()[0].pods == 0, 30, "the end of the session")
            ada, bob = there.rows()
            assert (ada.lag, bob.lag) == (1, 0)
            far.tell("verdict", "valid", name="told while cut off")
            lab.proxy.recover()
            wait_until(lambda: (there.rows()[0].pods, there.rows()[0].lag) == (1, 0), 30, "its return")
        wait_until(lambda: row_of(lab.cluster, learner), 30, "what was told while cut off")
        far.close()
        run.forget()
        shown = class_table(lab.cluster)
        shown.look()
        assert there.learner("ada") in shown.widget.value
        lab.broker.freeze()
        shown.look()
        assert "no answer from" in shown.widget.value
        assert there.learner("ada") in shown.widget.value, "what was seen before"
        lab.broker.recover()
        shown.look()
        assert "no answer from" not in shown.widget.value
