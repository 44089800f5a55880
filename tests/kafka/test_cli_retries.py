"""`labkit blocked`, `skip`, `resume` and `dlq`, beside a consumer that runs elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from consuming import Member, put
from processes import wait_until
from typer.testing import CliRunner

from labkit.cli.main import app
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import RetryingConsumer, blocking, dead_letter
from labkit.runtime.which_kafka import Connection

RUN = "labkit.ada.renting.261124090000bbbb."


WHOSE = {"learner": "ada", "notebook": "renting", "run": "261124090000bbbb"}


@pytest.fixture(autouse=True)
def _i_am_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_LEARNER", "ada")


def labkit(*arguments: str, code: int = 0, answer: str | None = None) -> str:
    done = CliRunner().invoke(app, arguments, input=answer)
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout  # a consumer beside it writes its log to stderr


def told(*arguments: str) -> Any:
    return json.loads(labkit(*arguments, "--json"))


class Mended:
    """Refuses everything until it is mended."""

    mended = False

    def __call__(self, record: Record[int]) -> None:
        if not self.mended:
            raise ConnectionError("no answer")


def test_a_shift_at_the_terminal(connection: Connection) -> None:
    topic = Topic(connection.cluster, f"{RUN}rents", 1, int)
    topic.create()
    group, handler = f"{RUN}letting", Mended()
    consumer = RetryingConsumer(topic, handler, group, retry=blocking(300))
    consumer.prepare()
    with Member(consumer) as member:
        assert labkit("blocked", "letting").endswith("\nNothing is blocked.\n")
        assert "there is no group with retries called 'nobody'; there are:" in labkit("blocked", "nobody", code=1)
        assert "letting" in labkit("blocked", "nobody", code=1)
        put(topic, *range(3), key="ada")
        wait_until(lambda: told("blocked", "letting"), 20, "the blocked record")
        (one,) = told("blocked", group)
        assert (one["place"], one["key"], one["attempts"]) == (f"{topic.name}/0/0", "ada", 1)
        assert "rents/0/0" in labkit("blocked", "letting")
        assert "rents/0/9 is not blocked; there are: rents/0/0" in labkit("skip", "letting", "rents/0/9", code=1)
        assert "say --all" in labkit("skip", "letting", code=1)
        assert "\nSkipped rents/0/0 (ada): ConnectionError: no answer\n" in labkit("skip", "letting", "rents/0/0")
        assert "skips nothing" in labkit("resume", "letting", code=1)
        wait_until(lambda: [one["offset"] for one in told("blocked", "letting")] == [1], 20, "the next one")
        assert told("skip", "letting", "--all") == {"skipped": 1, "until": "resume", **WHOSE}
        member.wait_committed({0: 3})
        assert "blocks again" in labkit("resume", "letting")


@pytest.mark.long
def test_a_review_at_the_terminal(connection: Connection) -> None:
    topic = Topic(connection.cluster, f"{RUN}bills", 1, int)
    topic.create()
    group, handler = f"{RUN}billing", Mended()
    put(topic, *range(4), key="ada")
    with Member(RetryingConsumer(topic, handler, group, retry=dead_letter())) as member:
        member.wait_committed({0: 4})
        assert [one["value"] for one in told("dlq", "list", "billing")] == ["0", "1", "2", "3"]
        assert "ConnectionError: no answer" in labkit("dlq", "list", "billing")
        shown = labkit("dlq", "show", "billing", "bills/0/2")
        assert f"place: {topic.name}/0/2" in shown
        assert "value: 2" in shown
        assert told("dlq", "show", "billing", "bills/0/2")["attempts"] == 1
        assert "or say --all" in labkit("dlq", "replay", "billing", code=1)
        assert "not among the dead letters" in labkit("dlq", "purge", "billing", "bills/0/7", "--yes", code=1)
        assert "nothing was removed" in labkit("dlq", "purge", "billing", "bills/0/0", code=1, answer="n\n")
        assert labkit("dlq", "purge", "billing", "bills/0/0", answer="y\n").endswith("1 removed.\n")
        handler.mended = True
        assert told("dlq", "replay", "billing", "bills/0/1") == {"replayed": 1, **WHOSE}
        assert told("dlq", "replay", "billing", "--all")["replayed"] in (2, 3)  # the first may be done already
        with DeadLetters(topic, group) as queue:
            wait_until(lambda: len(queue) == 0, 20, "an empty queue")
        assert labkit("dlq", "list", "billing").endswith("\nNo dead letters.\n")


@pytest.mark.parametrize("command", [["skip", "g", "p", "--all"], ["dlq", "purge", "g", "p", "--all", "--yes"]])
def test_one_and_all_at_once_is_refused(connection: Connection, command: list[str]) -> None:
    assert "say --all" in labkit(*command, code=1)
