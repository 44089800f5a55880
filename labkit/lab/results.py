"""What a class sees of a learner: each verdict, and how each exercise stands, as a small record of a compacted topic,
`labkit.<learner>.class`. It is no run's, so it stays when a run goes. Nothing of a learner's answers is in it.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from typing import Literal, TypeAlias

import msgspec

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.lab import runs

WAIT = 1.0  # seconds that a lab which is closed waits for what is not written yet
LONGEST = 200  # characters of a reason
Kind: TypeAlias = Literal["verdict", "exercise"]


class Result(msgspec.Struct, frozen=True):
    """What came of a cell of a notebook, and in which run."""

    learner: str
    notebook: str
    run: str
    cell: str
    kind: Kind
    result: str
    """Of a verdict: valid, invalid or unknown. Of an exercise: open, not yet or done."""
    why: str
    time: float


def topic_of(cluster: Cluster, learner: str = "") -> Topic[Result]:
    """The topic of a learner's results."""
    return Topic(cluster, f"labkit.{runs.learner(learner)}.class", 1, Result)


class Results:
    """Writes a lab's results, from a thread of its own: a verdict neither waits nor fails where they cannot be written.

    A private lab has none, as nobody else sees its Kafka: its results are written by the notebook's shared lab.
    """

    def __init__(self, cluster: Cluster, run: runs.Run) -> None:
        self._cluster = cluster
        _, self._learner, self._notebook, self._run, _ = run.prefix.split(".")
        self._told: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._created = False
        _open.append(self)

    def tell(self, kind: Kind, result: str, why: str = "", name: str = "") -> None:
        """Have a result written. `name` tells it from others of its cell."""
        cell = "/".join(filter(None, (_cell(), name)))[:LONGEST] or kind
        why = " ".join(why.split())[:LONGEST]
        self._told.put(Result(self._learner, self._notebook, self._run, cell, kind, result, why, time.time()))
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="labkit-results", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what was told, if that takes no longer than a moment."""
        if self in _open:
            _open.remove(self)
        self._told.put(None)
        if self._thread is not None:
            self._thread.join(WAIT)

    def _write(self) -> None:
        topic = topic_of(self._cluster, self._learner)
        while (result := self._told.get()) is not None:
            with suppress(LabkitError):  # it is away, or does not let us: the class misses a line
                if not self._created:
                    topic.create({"cleanup.policy": "compact"})
                    self._created = True
                topic.deliver([(result, f"{result.notebook}/{result.cell}", None)], timeout=10.0)


_open: list[Results] = []


def tell(kind: Kind, result: str, why: str = "", name: str = "", by: Results | None = None) -> None:
    """Have a result written: by these results, else by those of the notebook's first lab, if one is open."""
    if (writer := by or next(iter(_open), None)) is not None:
        writer.tell(kind, result, why, name)


def _cell() -> str:
    """The id of the cell that runs; empty where the front end does not say it."""
    from IPython import get_ipython

    with suppress(Exception):  # every front end has its own metadata, and a verdict must not fail by them
        cell = get_ipython().get_parent()["metadata"]["cellId"]
        return str(cell).rpartition("#")[2]
    return ""
