"""Who of a class is where: a table for the trainer, read from the cluster alone."""

from __future__ import annotations

import html
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import msgspec

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import lags, newest_records
from labkit.kafka.reader import read_all
from labkit.lab import runs
from labkit.lab.results import Kind, Result
from labkit.runtime.which_kafka import connect

HEADS = ("learner", "notebook", "since", "last word", "lag", "pods", "last verdict", "exercise")
REFRESH = 2.0  # seconds between two looks
_Key: TypeAlias = tuple[str, str, str]  # a run: learner, notebook, run id


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
    behind = lags(cluster, {name: topics[run] for run, names in groups.items() for name in names}, assigned)
    sent = newest_records(cluster, [name for names in topics.values() for name in names if _is_word(name)])
    here = topics.keys() | groups.keys()
    newest = {(learner, notebook): run for learner, notebook, run in sorted(here)}
    hosts = defaultdict[str, set[str]](set)

    def row(key: _Key) -> Row:
        learner, notebook, run = key
        own, since = [one for one in told[learner] if one.run == run], runs.began(run)
        words = [*(sent[name] for name in topics[key] if name in sent), *(one.time for one in own)]
        counts = [behind[group] for group in groups[key]]
        people = [one for group in groups[key] for one in members[group]]
        hosts[learner].update(one.host for one in people)
        return Row(
            learner,
            notebook,
            run,
            since,
            max([*words, since or 0.0]) or None,
            sum(filter(None, counts)) if key in here and None not in counts else None,
            len(people) if key in here else None,
            _last(own, "verdict"),
            _last(own, "exercise"),
        )

    absent = told.keys() - {learner for learner, _, _ in here}
    last = [max(told[learner], key=lambda one: one.time) for learner in absent]
    rows = [row(key) for key in sorted({*here, *((one.learner, one.notebook, one.run) for one in last)})]
    rows = [one for one in rows if one.pods or newest.get((one.learner, one.notebook), one.run) == one.run]
    busy = Counter((one.learner, one.notebook) for one in rows if one.pods)
    return [replace(one, twice=len(hosts[one.learner]) > 1 or busy[one.learner, one.notebook] > 1) for one in rows]


def cells(row: Row, now: float) -> tuple[str, ...]:
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
    texts = (learner, row.notebook, since, _age(row.last_word, now), *counts, verdict, exercise)
    # What a learner's machine has written may hold commands for a terminal.
    return tuple("".join(one if one.isprintable() else " " for one in text) for text in texts)


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


def _of_runs(names: Iterable[str]) -> defaultdict[_Key, list[str]]:
    """Names by the run that they belong to."""
    found = defaultdict(list)
    for name in names:
        if (prefix := runs.prefix_of(name)) is not None:
            _, learner, notebook, run, _ = prefix.split(".")
            found[learner, notebook, run].append(name)
    return found


def _told(cluster: Cluster, topics: Iterable[str]) -> defaultdict[str, list[Result]]:
    """What each learner's notebooks told. Whose it is the topic says: anybody may write anything."""
    found = defaultdict(list)
    for record in read_all(cluster, [name for name in topics if runs.CLASS_TOPIC.fullmatch(name)], Result):
        if record.value is not None and (match := runs.CLASS_TOPIC.fullmatch(record.topic)):
            found[match[1]].append(msgspec.structs.replace(record.value, learner=match[1]))
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
