"""Observing a lab: waiting for what should happen, and figures, records, verdicts and logs of what has happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from labkit.kafka.cluster import Cluster
from labkit.kafka.effects import Sent
from labkit.kafka.errors import LabkitError, error_text
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.lab import comparison, runs
from labkit.lab.comparison import Way
from labkit.lab.history import Fault, History
from labkit.lab.load import Load, identifier
from labkit.lab.pods.deployment import Deployment
from labkit.lab.results import Results, tell
from labkit.lab.verdict import evidence
from labkit.lab.verdict.settling import Settled, Settling
from labkit.lab.verdict.trace import trace
from labkit.lab.verdict.verdict import Verdict, judge

if TYPE_CHECKING:
    import pandas as pd


class Observing:
    """The part of a Lab that says what happens, and has happened, in it."""

    notebook: str
    pace: float
    cluster: Cluster
    run: runs.Run
    topics: dict[str, Topic[Any]]
    deployments: dict[str, Deployment]
    loads: list[Load[Any]]
    _history: History
    _settling: Settling
    _results: Results | None
    _closing: bool

    def seconds(self, told: float) -> float:
        """A length of time at this lab's pace."""
        return told / self.pace

    def figure(self, metric: str, label: str | None = None) -> float:
        """The newest value of a metric in the history, NaN before its first: `lab.figure("requests/s", "clients")`. A
        panel of one line is a metric without labels: `lab.figure("charged")`."""
        return self._history.now(metric, metric if label is None else label)

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float = 60.0) -> None:
        """Wait until a condition holds; it is checked every 20 ms. While a service that it asks does not answer
        (OSError), it does not hold.

        Raises LabkitError after `timeout` seconds, with `what` was waited for and the pods' last lines.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                if answer := condition():
                    return
                why = "" if answer is False else f" ({answer!r})"
            except OSError as error:
                why = f" ({error_text(error)})"
            if time.monotonic() > until:
                raise LabkitError(f"not within {timeout:g} s: {what}{why}{self._said()}")
            time.sleep(0.02)

    def wait_ready(self, *deployments: Deployment, timeout: float = 30.0) -> None:
        """Wait until every pod of these runs, and consumers share all partitions of their topics, added ones too; see
        `wait_until`."""
        everyone = self.deployments.values()
        there: dict[str, int] = {}
        with suppress(LabkitError):  # while Kafka is down, the partitions at their deployment count
            there = self.cluster.topics()
        beside = {
            one.name: [it for it in everyone if it is not one and it.group == one.group is not None]
            for one in deployments
        }
        what = f"{', '.join(beside)} to be ready"
        self.wait_until(lambda: all(one.ready(beside[one.name], there) for one in deployments), what, timeout)

    def settle(self, timeout: float = 60.0) -> Settled:
        """Wait until loads are done, groups have no lag, and nothing waits for a retry. Never raises.

        A plan of `when` that still waits once all is at rest is dropped. If waiting cannot help, it returns at once:
        Kafka or Kafka Connect is down or frozen; a pod is frozen; records are retried against a service or database
        that somebody has to recover (buttons do not work while a cell waits); a load, a connector or a plan has failed.
        """
        return self._settling.settle(timeout)

    def unsettled(self) -> str | None:
        """Why this lab is not at rest now; None when it is."""
        return self._settling.unsettled()

    def verdict(
        self,
        sent: Load[Any] | Iterable[Load[Any]] | Iterable[Sent] | Mapping[Any, Any],
        done: Topic[Any] | evidence.Content | Callable[[], Topic[Any] | evidence.Content],
        by: str | Callable[[Any], str] = "id",
        name: str = "",
        exactly_once: bool = False,
        ordered: bool = True,
        early: Iterable[str] | Callable[[], Iterable[str]] | None = None,
        rejected: Iterable[str] | Callable[[], Iterable[str]] | None = None,
        timeout: float = 60.0,
    ) -> Verdict:
        """Wait until the lab has settled, then compare what was sent with what took effect, by business id.

        `sent`: loads, `Sent` tuples, or a mapping from an id to the value that it should have in the end. `done`: the
        topic in which work takes effect, `Effect`s (of a ledger), or a mapping from an id to its value (in a view).
        `early`, `rejected`: ids of what was done before its time, and of what was set aside (None: not checked). These
        three may be functions, which are called once the lab has settled.

        `exactly_once` admits no extra; `ordered`: each key is to take effect in the order of sending; `name` says what
        was looked at. The answer is `unknown`, with its reason, while the lab has not settled. If it is not `valid`,
        the pods' last lines are printed. Raises LabkitError for a value without the id, and for what cannot be
        compared.
        """
        given = sent if isinstance(sent, Mapping) else [sent] if isinstance(sent, Load) else list(sent)
        self._check_open(*given, done)
        stale = None
        was_read = any(isinstance(one, dict | list | tuple | set) for one in (done, early, rejected))
        if was_read and (reason := self.unsettled()):
            stale = f"what took effect was read before the lab had settled ({reason}): give a function that reads it"
        self.settle(timeout)
        # Before the topics are read, or what comes to rest meanwhile would count as lost. And twice, because a record
        # that is handled between two looks may have made one upstream of what was looked at first.
        unknown = self.unsettled() or self.unsettled() or stale
        sends, others = evidence.sends(given, self.loads)
        effects, poison = evidence.took_effect(done() if callable(done) else done, identifier(by))
        found = judge(
            sends,
            effects,
            self._history.faults,
            name=name,
            exactly_once=exactly_once,
            ordered=ordered,
            early=early() if callable(early) else early,
            rejected=rejected() if callable(rejected) else rejected,
            others=others,
            unknown=unknown or poison,
        )
        tell("verdict", found.result, found.why, name, by=self._results)
        if found.result != "valid":
            for deployment in self.deployments:
                self.logs(deployment)
        return found

    def compare(self, title: str, *ways: Way) -> pd.DataFrame:
        """Show what each way costs, the pattern last, and keep it as this notebook's row for `comparison`.

        `title` begins with the notebook's number, and ends with what the figures are for: "06 Aggregation: an import".
        """
        return comparison.write(runs.plain(self.notebook, "notebook"), title, ways)

    def comparison(self) -> pd.DataFrame:
        """The rows that all notebooks have kept; a line says which are missing."""
        return comparison.read()

    def records(self, topic: Topic[Any], last: int = 10) -> pd.DataFrame:
        """The newest records of a topic as a table: partition, offset, key, value, time (UTC).

        Records that do not decode are not in it; a line says how many.
        """
        import pandas as pd

        with Reader(topic) as reader:
            found = sorted(reader.read_to_end(), key=lambda record: record.timestamp)[-last:]
        if poison := reader.undecodable:
            print(f"Not shown: {poison}")  # noqa: T201
        rows = [(one.partition, one.offset, one.key, one.value, one.timestamp) for one in found]
        table = pd.DataFrame(rows, columns=["partition", "offset", "key", "value", "time"])
        return table.assign(time=pd.to_datetime(table["time"], unit="s").dt.round("ms"))

    def history(self) -> pd.DataFrame:
        """Everything the sampler saw, tidy: time, seconds, metric, label, value."""
        return self._history.frame()

    def trace(self, id: object, by: str | Callable[[Any], Any] = "id") -> pd.DataFrame:  # noqa: A002 - as `by` names it
        """One record's life across pods, faults and redeliveries, oldest first.

        Columns: time (UTC), seconds since the first row, event, place, pod, detail. `by` names the business id whose
        value is `id`. A handling shows by what it sent. Raises LabkitError when no record of this lab's topics has it.
        """
        self._check_open()
        return trace(id, by, list(self.topics.values()), self.faults)

    @property
    def faults(self) -> list[Fault]:
        """What was done to this lab, oldest first."""
        return self._history.faults

    def logs(self, name: str, lines: int = 20) -> None:
        """Print the last lines of a deployment's log: what its pods printed, and what happened to them."""
        if name not in self.deployments:
            there = ", ".join(self.deployments) or "none so far"
            raise LabkitError(f"there is no deployment {name!r} in this lab: there is {there}")
        for line in self.deployments[name].log[-lines:]:
            print(line)  # noqa: T201

    def _said(self) -> str:
        """How deployments stand, and the last lines of their pods."""
        return "".join("\n  ".join([f"\n{one!r}", *map(str, one.log[-10:])]) for one in self.deployments.values())

    @property
    def _again(self) -> str:
        return f"run the notebook again from the cell with Lab({self.notebook!r})"

    def _check_open(self, *things: object) -> None:
        """Raises LabkitError when this lab is closed, or when one of `things` belongs to an earlier run of it."""
        if self._closing:
            raise LabkitError(f"this lab is closed: {self._again}")
        earlier = self.run.prefix.removesuffix(f"{self.run.id}.")
        for thing in things:
            topic = thing.topic if isinstance(thing, Load) else thing
            name = topic.name if isinstance(topic, Topic) else self.run.prefix
            stale = isinstance(thing, Deployment) and self.deployments.get(thing.name) is not thing
            if stale or (name.startswith(earlier) and not name.startswith(self.run.prefix)):
                raise LabkitError(f"{thing!r} belongs to an earlier run: run the notebook's cells again from the first")
