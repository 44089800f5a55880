"""Who of a class is where: a table for the trainer, read from the cluster alone."""

from __future__ import annotations

import html
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import lags, newest_records
from labkit.kafka.reader import read_all
from labkit.lab import runs
from labkit.lab.results import Kind, Result
from labkit.runtime.connect import connect

HEADS = ("learner", "notebook", "since", "last word", "lag", "pods", "last verdict", "exercise")
REFRESH = 2.0  # seconds between two looks


@dataclass(frozen=True)
class Row:
    """A run on the cluster; or a learner's last result, if no run of theirs is there. Times are in Unix seconds."""

    learner: str
    notebook: str
    run: str
    since: float | None
    last_word: float | None
    """When the newest record was sent in the run, without what pods report of themselves, or its newest result."""
    lag: int | None = None
    """Records that the run's consumer groups have still to read. None: unknown, or no run."""
    pods: int | None = None
    """Members of the run's consumer groups. A pod that consumes in no group, as a service, is none. None: no run."""
    verdict: Result | None = None
    exercise: Result | None = None
    twice: bool = False
    """This learner has pods in two runs of a notebook, or on two machines: two people use one name."""


def look(cluster: Cluster) -> list[Row]:
    """A row for the newest run of each learner's notebook, and for every run with pods, by learner and time.

    Raises ClusterUnreachable.
    """
    topics, groups, told = _of_runs(there := cluster.topics()), _of_runs(cluster.groups()), _told(cluster, there)
    members = cluster.members([group for names in groups.values() for group in names])
    assigned = {group: {place for one in found for place in one.assigned} for group, found in members.items()}
    newest = newest_records(cluster, {name for names in topics.values() for name in names if _is_word(name)})
    behind = lags(cluster, {name: topics[run] for run, names in groups.items() for name in names}, assigned)
    rows: list[Row] = []
    hosts, latest = defaultdict[str, set[str]](set), dict[tuple[str, str], str]()
    for prefix in topics.keys() | groups.keys():
        _, learner, notebook, run, _ = prefix.split(".")
        latest[learner, notebook] = max(latest.get((learner, notebook), ""), run)
        own = [one for one in told.get(learner, ()) if one.run == run]
        counts = [behind[group] for group in groups[prefix]]
        since = runs.began(run)
        words = [newest.get(name) for name in topics[prefix]] + [since, *(one.time for one in own)]
        people = [one for group in groups[prefix] for one in members[group]]
        hosts[learner].update(one.host for one in people)
        rows.append(
            Row(
                learner,
                notebook,
                run,
                since,
                max((one for one in words if one is not None), default=None),
                None if None in counts else sum(filter(None, counts)),
                len(people),
                _last(own, "verdict"),
                _last(own, "exercise"),
            )
        )
    rows = [row for row in rows if row.pods or latest[row.learner, row.notebook] == row.run]
    busy = [(row.learner, row.notebook) for row in rows if row.pods]
    rows = [
        replace(row, twice=len(hosts[row.learner]) > 1 or busy.count((row.learner, row.notebook)) > 1) for row in rows
    ]
    for learner in told.keys() - {row.learner for row in rows}:
        last = max(told[learner], key=lambda one: one.time)
        own = [one for one in told[learner] if one.run == last.run]
        since, verdict, exercise = runs.began(last.run), _last(own, "verdict"), _last(own, "exercise")
        rows.append(Row(learner, last.notebook, last.run, since, last.time, verdict=verdict, exercise=exercise))
    return sorted(rows, key=lambda row: (row.learner, row.run))


def cells(row: Row, now: float) -> tuple[object, ...]:
    """A row for people to read, in the order of HEADS."""
    since = "–" if row.since is None else time.strftime("%a %H:%M", time.localtime(row.since))
    verdict, exercise = "–", "–"
    if row.verdict is not None:
        result, why = row.verdict.result, row.verdict.why
        verdict = f"{result if result == 'valid' else f'{result}: {why}'} ({row.verdict.cell})"
    if row.exercise is not None:
        exercise = row.exercise.result
    counts = ("–" if count is None else f"{count:,}" for count in (row.lag, row.pods))
    learner = f"{row.learner} (twice)" if row.twice else row.learner
    return learner, row.notebook, since, _age(row.last_word, now), *counts, verdict, exercise


def advice(rows: Iterable[Row]) -> str:
    """What is to be done about names that two people use. Empty if there are none."""
    names = sorted({row.learner for row in rows if row.twice})
    return "".join(f"\n{name}: two work under this name. One of them sets LABKIT_LEARNER to another." for name in names)


class ClassTable:
    """The table in the trainer's notebook, which goes on until `close()`. Shown again, it goes on where it is shown."""

    def __init__(self, cluster: Cluster, refresh: float) -> None:
        import ipywidgets

        self._cluster, self._refresh = cluster, refresh
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.widget = ipywidgets.HTML()
        self.rows: list[Row] = []

    def look(self) -> None:
        """Read the cluster, and show it. It never raises: what went wrong stands above what was last seen."""
        trouble = ""
        try:
            self.rows = look(self._cluster)
        except LabkitError as error:
            trouble = f"{error}. This was seen before:"
        now = time.time()
        lines = [_html("th", HEADS), *(_html("td", cells(row, now)) for row in self.rows)]
        notes = (f"<p>{html.escape(text)}</p>" if text else "" for text in (trouble, advice(self.rows)))
        self.widget.value = f"<table>{''.join(lines)}</table>".join(notes)

    def close(self) -> None:
        """Look no more. What was seen last stays."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        if self._thread is None:
            self.look()
            self._thread = threading.Thread(target=self._go_on, name="labkit-class", daemon=True)
            self._thread.start()
        return {**self.widget._repr_mimebundle_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"The class: {len(self.rows)} runs. Run this cell to see them."

    def _go_on(self) -> None:
        while not self._closed.wait(self._refresh):
            self.look()


def class_table(cluster: Cluster | None = None, refresh: float = REFRESH) -> ClassTable:
    """The class, live, at the end of a cell: of this cluster, else of the Kafka that a lab would use."""
    return ClassTable(connect().cluster if cluster is None else cluster, refresh)


def _of_runs(names: Iterable[str]) -> defaultdict[str, list[str]]:
    """Names by the prefix of their run."""
    found = defaultdict(list)
    for name in names:
        if (prefix := runs.prefix_of(name)) is not None:
            found[prefix].append(name)
    return found


def _told(cluster: Cluster, topics: Iterable[str]) -> dict[str, list[Result]]:
    """What each learner's notebooks told, by the name of the topic."""
    found = defaultdict(list)
    for record in read_all(cluster, [name for name in topics if runs.CLASS_TOPIC.fullmatch(name)], Result):
        if record.value is not None and (match := runs.CLASS_TOPIC.fullmatch(record.topic)):
            found[match[1]].append(record.value)
    return found


def _is_word(topic: str) -> bool:
    return runs.short_names(topic) != "telemetry"


def _last(results: Sequence[Result], kind: Kind) -> Result | None:
    return max((one for one in results if one.kind == kind), key=lambda one: one.time, default=None)


def _age(moment: float | None, now: float) -> str:
    if moment is None:
        return "–"
    seconds = max(0, round(now - moment))  # clocks of machines differ
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _html(kind: str, texts: Iterable[object]) -> str:
    inner = "".join(f'<{kind} style="text-align:left">{html.escape(str(text))}</{kind}>' for text in texts)
    return f"<tr>{inner}</tr>"
