"""Two learners on one Kafka: a short name at the terminal means one's own, and another's is named on purpose."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from consuming import Member, fresh_topic, put
from processes import wait_until
from typer.testing import CliRunner

from labkit.cli.main import app
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import Policy, RetryingConsumer, blocking, dead_letter

pytestmark = pytest.mark.usefixtures("connection")


@pytest.fixture(autouse=True)
def _i_am_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_LEARNER", "Ada")


class Both:
    """Runs of ada and bob with the same names in them. Bob's is the newer one."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.notebook = cluster, f"shared-{uuid.uuid4().hex[:8]}"
        self.group = f"g{uuid.uuid4().hex[:8]}"
        self.runs = {"ada": "261124090000aaaa", "bob": "261124090001bbbb"}

    def name(self, learner: str, short: str) -> str:
        return f"labkit.{learner}.{self.notebook}.{self.runs[learner]}.{short}"

    def topic(self, learner: str, short: str = "rents") -> Topic[int]:
        topic = Topic(self.cluster, self.name(learner, short), 1, int)
        topic.create()
        return topic

    def whose(self, learner: str) -> dict[str, str]:
        return {"learner": learner, "notebook": self.notebook, "run": self.runs[learner]}

    def said(self, learner: str, short: str = "") -> str:
        return f"{short or self.group} of {learner}, notebook {self.notebook}, run {self.runs[learner]}"

    @contextmanager
    def failing(self, policy: Policy) -> Iterator[dict[str, Member]]:
        """A consumer of each, to which a record came that it refuses."""
        members = {}
        with ExitStack() as stack:
            for learner in self.runs:
                topic = self.topic(learner)
                put(topic, 7, key=learner)
                consumer = RetryingConsumer(topic, refuse, self.name(learner, self.group), retry=policy)
                members[learner] = stack.enter_context(Member(consumer.prepare()))
            yield members


@pytest.fixture
def both(cluster: Cluster) -> Both:
    return Both(cluster)


def refuse(record: object) -> None:
    raise ConnectionError("no answer")


def labkit(*arguments: str, code: int = 0, answer: str | None = None) -> str:
    done = CliRunner().invoke(app, arguments, input=answer)
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout


def told(*arguments: str) -> Any:
    return json.loads(labkit(*arguments, "--json"))


@pytest.mark.long  # test_cli_retries.py has the commands, test_topics_and_lag whose they are
def test_blocked_skip_and_resume(both: Both) -> None:
    group, bobs = both.group, ("--learner", "Bob")
    with both.failing(blocking(300)) as members:
        wait_until(lambda: told("blocked", group) and told("blocked", group, *bobs), 30, "both to be blocked")
        (mine,), (his,) = told("blocked", group), told("blocked", group, *bobs)
        assert (mine["key"], his["key"]) == ("ada", "bob")
        assert both.whose("ada").items() <= mine.items()
        assert both.whose("bob").items() <= his.items()
        assert labkit("blocked", group).startswith(f"{both.said('ada')}\nrecord")
        assert told("skip", group, "--all") == {"skipped": 1, "until": "resume", **both.whose("ada")}
        members["ada"].wait_committed({0: 1})
        assert [one["key"] for one in told("blocked", group, *bobs)] == ["bob"]
        assert told("resume", group) == {"resumed": True, **both.whose("ada")}
        shown = labkit("skip", group, *bobs, f"{both.name('bob', 'rents')}/0/0")
        assert shown == f"{both.said('bob')}\nSkipped rents/0/0 (bob): ConnectionError: no answer\n"
        members["bob"].wait_committed({0: 1})
        assert both.name("bob", group) in labkit("skip", both.name("bob", group), "--all"), "a full name is anybody's"
        assert labkit("resume", group, *bobs) == f"{both.said('bob')}\nThe next failure blocks again.\n"


@pytest.mark.long
def test_dead_letters(both: Both) -> None:
    group, bobs = both.group, ("--learner", "bob")
    with both.failing(dead_letter()) as members:
        for member in members.values():
            member.wait_committed({0: 1})
    (mine,), (his,) = told("dlq", "list", group), told("dlq", "list", group, *bobs)
    assert both.whose("ada").items() <= mine.items()
    assert both.whose("bob").items() <= his.items()
    assert labkit("dlq", "list", group).startswith(f"{both.said('ada')}\nrecord")
    assert labkit("dlq", "show", group, "rents/0/0").splitlines()[0] == both.said("ada")
    assert told("dlq", "show", group, "rents/0/0", *bobs)["learner"] == "bob"
    assert told("dlq", "replay", group, "--all") == {"replayed": 1, **both.whose("ada")}
    assert "replayed" not in told("dlq", "show", group, "rents/0/0", *bobs)
    asked = labkit("dlq", "purge", group, "--all", *bobs, code=1, answer="n\n")
    assert f"Remove all dead letters of {both.said('bob')} for good?" in asked
    assert told("dlq", "purge", group, "--all", "--yes") == {"purged": 1, **both.whose("ada")}
    left = {}
    for learner in both.runs:
        with DeadLetters(both.topic(learner), both.name(learner, group)) as queue:
            left[learner] = len(queue)
    assert left == {"ada": 0, "bob": 1}


def test_topics_and_lag(both: Both) -> None:
    foreign = fresh_topic(both.cluster)
    groups = {learner: both.name(learner, both.group) for learner in both.runs}
    for learner, group in groups.items():
        topic = both.topic(learner)
        put(topic, 1)
        with Member(Consumer(topic, lambda record: None, group=group)) as member:
            member.wait_committed({0: 1})
    put(both.topic("ada"), *range(2))
    for learner, other in (("ada", "bob"), ("bob", "ada")):
        rows = {row["topic"]: row for row in told("topics", "--learner", learner)}
        assert both.whose(learner).items() <= rows[both.name(learner, "rents")].items()
        assert both.name(other, "rents") not in rows
        assert rows[foreign.name]["learner"] == "", "what no lab made is shown to everybody"
    assert told("topics") == told("topics", "--learner", "ada")
    assert {row["topic"] for row in told("topics", "--all")} >= {both.name(one, "rents") for one in both.runs}
    answer = told("lag", both.group)
    assert (answer["group"], answer["lag"]) == (groups["ada"], 2)
    assert both.whose("ada").items() <= answer.items()
    assert labkit("lag", both.group, "--learner", "bob").startswith(f"{both.said('bob')}: 0 records behind\n")
    assert [one for one in told("lag") if one["short"] == both.group] == [
        {"group": groups["ada"], "short": both.group, **both.whose("ada")}
    ]
    assert both.group not in {one["short"] for one in told("lag", "--learner", "nobody")}
    assert set(groups.values()) <= {one["group"] for one in told("lag", "--all")}
    for command, name in (("topics", both.name("bob", "rents")), ("lag", groups["bob"])):
        row = next(line for line in labkit(command, "--all").splitlines() if f" {name}" in line)
        assert row.split()[:2] == ["bob", both.notebook]


def test_who_has_none_is_told_who_has(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    with both.failing(dead_letter()) as members:
        for member in members.values():
            member.wait_committed({0: 1})
    monkeypatch.setenv("LABKIT_LEARNER", "eve")
    for command in ("lag", "blocked", "skip --all", "resume", "dlq list", "dlq replay --all", "dlq purge --all --yes"):
        said = labkit(*command.split(), both.group, code=1)
        assert said.endswith(f" called '{both.group}'; ada and bob have one: add --learner ada\n")
    for learner in both.runs:
        (letter,) = told("dlq", "list", both.group, "--learner", learner)
        assert "replayed" not in letter
    for command in ("topics", "lag"):
        done = CliRunner().invoke(app, [command, "--json"])
        assert "eve has nothing here" in done.stderr
        assert both.name("ada", "") not in done.stdout


def test_status_says_who_one_is(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert labkit("status").splitlines()[0].endswith("), as ada")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", cluster.bootstrap)
    assert told("status")["learner"] == "ada"
    monkeypatch.delenv("LABKIT_LEARNER")
    assert "(LABKIT_LEARNER is not set, so this is your user name: set it to a name " in labkit("status")
