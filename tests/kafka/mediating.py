"""Orchestration in tests: an order's process on fresh topics, its processors, and the ledger in which effects stand."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from aggregating import stored
from consuming import Member, fresh_topic
from processes import wait_until
from stores import store_topic

from labkit.kafka.cluster import Cluster
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.patterns.mediator import Mediator, Refused
from labkit.patterns.mediator_states import Process, ProcessState, Step, StepCommand, StepReply
from labkit.patterns.retries import RetryingConsumer, blocking

STEPS = ("charge", "reserve", "ship")
LONG = 600.0  # seconds of a timeout that no test waits for


class Ledger:
    """What steps have done, in a file that processes share: a row for each effect, and, in the same transaction, what
    has become of each order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as database:
            database.execute("pragma journal_mode = wal")
            database.execute("create table if not exists effects (step text, what text, id text)")
            database.execute(
                "create table if not exists memory (step text, id text, what text, primary key (step, id))"
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            yield database
        finally:
            database.close()

    def _change(self, step: str, instance: str, to: Mapping[str | None, str]) -> str:
        """Go from what it was to what `to` says, with an effect; if it says nothing, stay. Returns what it is now."""
        with self._open() as database:
            database.execute("begin immediate")
            sql = "select what from memory where step = ? and id = ?"
            was = (database.execute(sql, (step, instance)).fetchone() or (None,))[0]
            now = to.get(was, was)
            if now != was:
                database.execute("insert or replace into memory values (?, ?, ?)", (step, instance, now))
                if now != "cancelled":
                    database.execute("insert into effects values (?, ?, ?)", (step, now, instance))
            database.execute("commit")
        return str(now)

    def do(self, step: str, instance: str) -> None:
        now = self._change(step, instance, {None: "done"})
        if now != "done":
            raise Refused(f"{instance} is {now}")

    def cancel(self, step: str, instance: str) -> Literal["done", "cancelled"]:
        return "done" if self._change(step, instance, {None: "cancelled"}) == "done" else "cancelled"

    def undo(self, step: str, instance: str) -> None:
        self._change(step, instance, {"done": "undone"})

    def effects(self, of: str = "") -> list[tuple[str, str, str]]:
        """Those of orders whose id begins so, as they came."""
        with self._open() as database:
            sql = "select step, what, id from effects where id like ? order by rowid"
            return list(database.execute(sql, (f"{of}%",)))


@dataclass
class Service:
    """A step's functions, on a ledger. By action and id, `fails` has what is raised, or called, before the effect; what
    that returns is the answer."""

    step: str
    ledger: Ledger
    refuses: set[str] = field(default_factory=set)
    refuses_to_undo: set[str] = field(default_factory=set)
    fails: dict[tuple[str, str], Any] = field(default_factory=dict)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    def hold(self, action: str, instance: str, until: Callable[[], bool]) -> None:
        """Let a call wait for a condition."""
        self.fails[action, instance] = lambda: wait_until(until, what=f"{action} {instance} to go on") and None

    def _called(self, action: str, instance: str) -> Any:
        self.calls[action, instance] += 1
        found = self.fails.get((action, instance))
        if isinstance(found, Exception):
            raise found
        return found and found()

    def do(self, instance: str, value: Any) -> None:
        self._called("do", instance)
        if instance in self.refuses:
            raise Refused("not this one")
        self.ledger.do(self.step, instance)

    def cancel(self, instance: str) -> Any:
        return self._called("cancel", instance) or self.ledger.cancel(self.step, instance)

    def undo(self, instance: str, value: Any) -> None:
        self._called("undo", instance)
        if instance in self.refuses_to_undo:
            raise Refused("not this one")
        self.ledger.undo(self.step, instance)


def process(topics: Mapping[str, Topic[StepCommand]], version: int = 1, **options: Any) -> Process:
    """An order's process; options are those of its steps."""
    settings = {"timeout": LONG, "retry": blocking(0.05), **options}
    return Process("order", version, tuple(Step(name, topic, **settings) for name, topic in topics.items()))


class Orders:
    """A mediator on fresh topics, its services, and what has become of the orders."""

    def __init__(self, cluster: Cluster, folder: Path, partitions: int = 1, asks: int = 5, **options: Any) -> None:
        self.cluster, self.ledger = cluster, Ledger(folder / "ledger")
        self.commands = {name: fresh_topic(cluster, 1, StepCommand) for name in STEPS}
        self.mediator = Mediator(
            fresh_topic(cluster, partitions, dict[str, int]),
            fresh_topic(cluster, partitions, StepReply),
            store_topic(cluster, partitions, ProcessState),
            [process(self.commands, **options)],
            asks,
        )
        self.services = {name: Service(name, self.ledger) for name in STEPS}

    def consumer(self, slot: str = "one", **options: Any) -> RetryingConsumer:
        return replace(self.mediator.consumer(slot, 0.02), **options)

    def processor(self, step: str, slot: str = "one") -> RetryingConsumer:
        service = self.services[step]
        made = self.mediator.processor(step, service.do, service.cancel, service.undo, slot)
        return replace(made, commit_interval=0.02)

    @contextmanager
    def processors(self, *steps: str) -> Iterator[dict[str, Member]]:
        """All of them run, or these."""
        with ExitStack() as running:
            yield {step: running.enter_context(Member(self.processor(step))) for step in steps or STEPS}

    def place(self, *ids: str) -> None:
        """Initial events."""
        for one in ids:
            self.mediator.initial.send({"cents": 1}, key=one)
        self.mediator.initial.flush()

    def reply(self, reply: StepReply, partition: int = 0) -> None:
        self.mediator.replies.send(reply, key=reply.id, partition=partition)
        self.mediator.replies.flush()

    def states(self) -> dict[str, ProcessState]:
        return stored(self.mediator.store)

    def partition_of(self, instance: str) -> int:
        """Where its state is."""
        with Reader(self.mediator.store) as reader:
            return next(record.partition for record in reader.read_to_end() if record.key == instance)

    def wait(self, timeout: float = 30.0, **statuses: str) -> None:
        """Wait until orders stand so."""
        with self.mediator.states() as states:
            states.wait_ready()
            wait_until(
                lambda: all(one in states and states[one].status == status for one, status in statuses.items()),
                timeout,
                f"{statuses}, not {dict(states)}",
            )

    def check(self, completed: set[str], compensated: Mapping[str, set[str]] | None = None, of: str = "") -> None:
        """Of the orders whose id begins so, exactly these have ended, each effect is there once, and no other one is.
        `compensated` has the steps that were undone."""
        compensated = compensated or {}
        states = {one: state for one, state in self.states().items() if one.startswith(of)}
        assert {one for one, state in states.items() if state.status == "completed"} == completed
        assert {one for one, state in states.items() if state.status == "compensated"} == set(compensated)
        expected = Counter((step, "done", one) for one in completed for step in STEPS)
        for one, steps in compensated.items():
            expected.update((step, what, one) for step in steps for what in ("done", "undone"))
        assert Counter(self.ledger.effects(of)) == expected

    def options(self) -> dict[str, Any]:
        """What `mediator_member.py` needs to be the same."""
        steps = self.mediator.newest.steps
        return {
            "replies": self.mediator.replies.name,
            "store": self.mediator.store.name,
            "commands": {name: topic.name for name, topic in self.commands.items()},
            "ledger": str(self.ledger.path),
            "timeout": steps[0].timeout,
            "slot": "one",
        }

    @classmethod
    def of(cls, cluster: Cluster, options: Mapping[str, Any]) -> Self:
        """The same in another process."""
        made = cls.__new__(cls)
        made.cluster, made.ledger = cluster, Ledger(Path(options["ledger"]))
        many = options["partitions"]
        made.commands = {name: Topic(cluster, topic, 1, StepCommand) for name, topic in options["commands"].items()}
        made.mediator = Mediator(
            Topic(cluster, options["topic"], many, dict[str, int]),
            Topic(cluster, options["replies"], many, StepReply),
            Topic(cluster, options["store"], many, ProcessState),
            [process(made.commands, timeout=options["timeout"])],
        )
        made.services = {name: Service(name, made.ledger) for name in STEPS}
        return made
