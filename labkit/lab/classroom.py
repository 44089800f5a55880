"""Who of a class is where: a table for the trainer, read from the cluster alone."""

from __future__ import annotations

import html
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import committed_offsets, lag, newest_records
from labkit.kafka.reader import read_all
from labkit.lab import runs
from labkit.lab.results import Kind, Result
from labkit.runtime.which_kafka import connect

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


def look(cluster: Cluster) -> list[Row]:
    """A row for the newest run of each learner's notebook, and for every run with pods, by learner and time.

    Raises ClusterUnreachable.
    """
    there = cluster.topics()
    topics, groups, told = runs.by_run(there), runs.by_run(cluster.groups()), _told(cluster, there)
    members = cluster.members([group for names in groups.values() for group in names])
    sent = newest_records(cluster, [name for names in topics.values() for name in names if _is_word(name)])
    here = topics.keys() | groups.keys()
    newest = {prefix.rsplit(".", 2)[0]: prefix for prefix in sorted(here)}

    def row(prefix: str) -> Row:
        _, learner, notebook, run, _ = prefix.split(".")
        own, since = [one for one in told[learner] if one.run == run], runs.began(run)
        words = [*(sent[name] for name in topics[prefix] if name in sent), *(one.time for one in own)]
        counts = [_behind(cluster, group, topics[prefix], members[group]) for group in groups[prefix]]
        return Row(
            learner,
            notebook,
            run,
            since,
            max([*words, since or 0.0]) or None,
            sum(filter(None, counts)) if prefix in here and None not in counts else None,
            sum(len(members[group]) for group in groups[prefix]) if prefix in here else None,
            _last(own, "verdict"),
            _last(own, "exercise"),
        )

    absent = told.keys() - {prefix.split(".")[1] for prefix in here}
    last = [max(told[learner], key=lambda one: one.time) for learner in absent]
    told_of = (f"labkit.{one.learner}.{one.notebook}.{one.run}." for one in last)
    listed = {*here, *(prefix for prefix in told_of if runs.NAMESPACE.fullmatch(prefix))}  # anybody may write anything
    rows = {prefix: row(prefix) for prefix in sorted(listed)}
    return [one for prefix, one in rows.items() if one.pods or newest.get(prefix.rsplit(".", 2)[0], prefix) == prefix]


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
    texts = (row.learner, row.notebook, since, _age(row.last_word, now), *counts, verdict, exercise)
    # What a learner's machine has written may hold commands for a terminal.
    return tuple("".join(one if one.isprintable() else " " for one in text) for text in texts)


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
        self.widget.value = f"<p>{html.escape(trouble)}</p><table>{''.join(lines)}</table>"

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


def _behind(
    cluster: Cluster, group: str, topics: Sequence[str], members: Iterable[Iterable[tuple[str, int]]]
) -> int | None:
    """Records that a group has to read where it has committed something, or has a member. None where Kafka does not
    say it now: its coordinator may be moving, and other groups' not."""
    with suppress(LabkitError):
        reads = committed_offsets(cluster, group, topics).keys() | {place for one in members for place in one}
        left = lag(cluster, group, [*{topic for topic, _ in reads}])
        return sum(left.get(place, 0) for place in reads)
    return None


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
