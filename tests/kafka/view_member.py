"""A writer of a view as a process: it crashes, or waits for a line on stdin, at a named point of its n-th batch.

Its view keeps a row for each change that was ever written, so that what is done twice, or not at all, can be seen.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.topics import Topic
from labkit.patterns.projection import Projection
from labkit.patterns.views import Batch, Change, Database, PostgresView, SqliteView, View, insert

OUTPUT = threading.Lock()


def tell(step: str, subject: Any = None) -> None:
    with OUTPUT:
        print(json.dumps({"step": step, "subject": subject}), flush=True)


class Written:
    """What is added to a view: nothing replaces anything, and it stops where it is told to."""

    stops: ClassVar[dict[str, str]] = {}
    batches = 0

    def at(self, point: str) -> None:
        match self.stops.get(f"{point}-{self.batches}"):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "wait":
                tell("waiting", point)
                sys.stdin.readline()

    def apply(self, batch: Batch) -> None:
        self.batches += 1
        self.at("before")
        super().apply(batch)  # type: ignore[misc]
        self.at("after")

    def write(self, database: Database, changes: Sequence[Change]) -> None:
        self.at("claimed")
        rows = [(change.key, *row) for change in changes for row in change.rows or ()]
        insert(database, self.name, rows)  # type: ignore[attr-defined]
        self.at("written")


class InFile(Written, SqliteView):
    """In SQLite."""


class OnServer(Written, PostgresView):
    """In PostgreSQL."""


def numbers(where: str) -> View:
    """The view of tests: each change leaves a row (key, value)."""
    return (OnServer if "host=" in where else InFile)(where, "numbers", {"value": "bigint"})


def projection(topic: Topic[int], view: View) -> Projection[int]:
    """No versions: only the offset keeps a record from being written twice."""
    return Projection(topic, lambda record: [(record.value,)], view, version=lambda record: None)


def main() -> None:
    options = json.loads(sys.argv[1])
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    topic = Topic(Cluster(options["bootstrap"]), options["topic"], options["partitions"], int)
    view = numbers(options["where"])
    view.stops = options["stops"]  # type: ignore[attr-defined]

    def told(step: Step, subject: Any) -> None:
        if step in (Step.ASSIGNED, Step.LOST, Step.REVOKED, Step.COMMITTED):
            tell(step.value)

    projection(topic, view).consumer(options["group"], batch=options["batch"]).run(stop, told)


if __name__ == "__main__":
    main()
