"""The panels of a board, as data: what they draw, what they say in words, what they read. `picture` draws them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import end_offsets

if TYPE_CHECKING:
    from labkit.kafka.cluster import Partition
    from labkit.kafka.topics import Topic
    from labkit.lab.pods.deployment import Deployment

T = TypeVar("T")
Read: TypeAlias = Callable[[], float | None]
"""Reads a figure; None or NaN if it is not known now."""

# Okabe–Ito: told apart by colour-blind eyes. Vermillion and the light orange are kept for faults.
BLUE, SKY, GREEN, PURPLE, ORANGE, BLACK = "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000"
GREY = "#8B8F98"
COLOURS = (BLUE, PURPLE, GREEN, SKY, ORANGE, BLACK)
_FIGURE = re.compile("<(.+?)>")  # in words
NAMED = 6
"""The most lines that a panel names; if there are more, it names the highest ones, and the others are grey."""


@dataclass(frozen=True)
class Plot:
    """One metric of a panel.

    How it is drawn: "line" and "area" for each label, areas on each other; "gain", a line of what came on top since the
    left edge of the picture (a counter's old total would flatten the news); "goal", one dotted line of the sum; "word",
    not at all. `owners` are the topics or deployments whose labels it takes ("orders", "orders/0"), by default all.
    """

    metric: str
    how: Literal["line", "area", "gain", "goal", "word"]
    owners: Sequence[str] = ()
    colours: Sequence[str] = COLOURS

    def among(self, series: Mapping[tuple[str, str], T]) -> dict[str, T]:
        """Its part of these series (by metric and label): by label, in natural order."""
        labels = (label for metric, label in series if metric == self.metric)
        mine = [label for label in labels if not self.owners or _parts(label)[0] in self.owners]
        return {label: series[self.metric, label] for label in sorted(mine, key=_natural)}

    def name(self, label: str) -> str:
        """The text at the end of its line: just enough to tell it from the others."""
        owner, partition = _parts(label)
        words = [] if len(self.owners) == 1 else [owner]
        return " ".join([*words, f"p{partition}"] if partition else words) or self.metric


@dataclass(frozen=True)
class Panel:
    """One panel. `words` say its figures of now, the longest wording first, by default every line; the first that fits
    is shown.

    In them `<lag>` stands for the sum of a metric, `<each lag>` for every line by name, `<highest lag>` for the highest
    line, `<which lag>` for the names of those above 0. A part with an unknown figure is left out, and so are the last
    parts where there is no room. `readers` are functions that read figures, by metric and label; a lab whose board
    shows the panel calls them.
    """

    title: str
    unit: str
    plots: Sequence[Plot]
    words: Sequence[str] = ()
    readers: Mapping[tuple[str, str], Read] = field(default_factory=dict)

    def wordings(self, now: Mapping[tuple[str, str], float]) -> list[str]:
        """The figures of now in words, the longest wording first. `now` has the newest values, by metric and label."""
        known: dict[str, str] = {}
        for plot in self.plots:
            if figures := {plot.name(label): value for label, value in plot.among(now).items()}:
                each = {name: f"{name}{':' * (' ' in name)} {_amount(value)}" for name, value in figures.items()}
                known[plot.metric] = _amount(sum(figures.values()))
                known[f"each {plot.metric}"] = " · ".join(each.values())
                known[f"highest {plot.metric}"] = each[max(figures, key=figures.__getitem__)]
                known[f"which {plot.metric}"] = ", ".join(name for name in figures if figures[name]) or "nothing"
        told = []
        for words in self.words or [" · ".join(f"<each {plot.metric}>" for plot in self.plots)]:
            parts = [part for part in words.split(" · ") if all(figure in known for figure in _FIGURE.findall(part))]
            if parts:
                told.append(_FIGURE.sub(lambda found: known[found[1]], " · ".join(parts)))
        parts = told[-1].split(" · ") if told else ["nothing yet"]
        return [*told, *(" · ".join(parts[:number]) for number in range(len(parts), 0, -1))]


def panel(title: str, what: Read | Mapping[str, Read] | str, unit: str = "", of: str | Sequence[str] = ()) -> Panel:
    """A panel for a board: `lab.board(panels=[panel("Charged", lambda: len(charges(dsn)), unit="renewals"), …])`.

    `what` is a function that reads a figure (one line), functions by their labels (a line each), or the name of a
    metric that the history has; `of` are its owners (deployments, topics), by default all. Functions are called three
    times a second, in the sampler's thread, and must answer soon. The status line shows what they raise. What they
    read goes into the history as a metric, the title in lower case: `lab.figure("charged")`.
    """
    if isinstance(what, str):
        return Panel(title, unit, [Plot(what, "line", [of] if isinstance(of, str) else of)])
    metric, several = title.lower(), isinstance(what, Mapping)
    reads: Mapping[str, Read] = what if isinstance(what, Mapping) else {metric: what}
    if of or not reads or not all(map(callable, reads.values())):
        ways = "a function, functions by their labels, or the name of a metric (of these alone: `of` its owners)"
        raise LabkitError(f"panel {title!r} shows {ways}, not {what!r}")
    readers = {(metric, label): read for label, read in reads.items()}
    words = [] if several else [f"<{metric}> {unit}".strip()]
    return Panel(title, unit, [Plot(metric, "line", list(reads))], words, readers)


# -- The panels of every lab -----------------------------------------------------------------------------------------


def lag_panel(topics: Sequence[str]) -> Panel:
    """Records behind, a line for each partition, and which partitions are blocked."""
    plots = Plot("lag", "line", topics, (BLUE, SKY, GREEN, PURPLE, ORANGE, BLACK)), Plot("blocked", "word", topics)
    words = "<each lag> · <which blocked> blocked", "<lag> in all · highest <highest lag> · <which blocked> blocked"
    return Panel("Lag", "records behind", plots, words)


def retries_panel(deployments: Sequence[str], topics: Sequence[str]) -> Panel:
    """Records waiting in a back-off as areas; failed attempts; and records that took effect again in `topics`."""
    waiting = Plot("waiting", "area", deployments, (GREEN, ORANGE, PURPLE, SKY))
    again = [Plot("redelivered", "gain", topics, (BLUE,))] if topics else []
    failed = Plot("failed", "gain", deployments, (BLACK,))
    words = "<waiting> waiting · <redelivered> redelivered · <failed> failed"
    return Panel("Retries", "records", (waiting, *again, failed), [f"{words} in all", words])


def completed_panel(completed: str, topics: Sequence[str]) -> Panel:
    """Distinct ids that took effect in the topic `completed`, towards the dotted line of what was sent to `topics`."""
    plots = Plot("sent", "goal", topics, (GREY,)), Plot("completed", "line", [completed], (GREEN,))
    return Panel("Completed", "records", plots, ["<completed> of <sent>", "<completed>"])


def blocked_panel(deployment: str, lanes: Read, longest: Read) -> Panel:
    """How many lanes of a deployment are blocked, and for how many seconds the longest of them has been."""
    plots = Plot("stuck", "area", [deployment], (ORANGE,)), Plot("blocked lanes", "word", [deployment])
    readers = {("stuck", deployment): longest, ("blocked lanes", deployment): lanes}
    return Panel("Blocked", "seconds", plots, ["<blocked lanes> blocked · longest <stuck> s"], readers)


def set_aside_panel(deployment: str, retries: Mapping[str, Read], dead: Read) -> Panel:
    """What waits in each retry topic of a deployment, by its delay in words; and its dead letters."""
    plots = (
        Plot("to be retried", "area", list(retries), (SKY, BLUE, PURPLE, GREEN)),
        Plot("dead", "line", [deployment], (BLACK,)),
    )
    words = "<each to be retried> · <dead> dead", "<dead> dead · <to be retried> wait"
    readers = {("to be retried", delay): read for delay, read in retries.items()}
    return Panel("Set aside", "records", plots, words, {**readers, ("dead", deployment): dead})


def store_panels(stores: Sequence[tuple[Deployment, Topic[Any]]], deployments: Mapping[str, Deployment]) -> list[Panel]:
    """Lag, loads and entries of the stores on these topics in these deployments. Lag is the metric `behind`.

    `deployments` are those of the lab, by name: one that replaces another is followed.
    """
    colours = [BLUE, ORANGE, PURPLE, GREEN]
    lag = Plot("behind", "line", [deployment.name for deployment, _ in stores], colours)
    readers = {("behind", one.name): partial(store_lag, deployments, one.name, topic) for one, topic in stores}
    loads, entries = [], []
    for topic in dict.fromkeys(topic.short for _, topic in stores):
        owners = [deployment.name for deployment, one in stores if one.short == topic]
        loads.append(Plot(f"{topic} loads", "gain", owners, colours))
        entries.append(Plot(f"{topic} entries", "line", owners, colours))
        colours = colours[len(owners) :] or [BLACK]
    return [
        Panel("Lag", "records behind", [lag], readers=readers),
        Panel("Reloads", "stores loaded", loads),
        Panel("Entries", "keys", entries),
    ]


def replica_panels(topic: Topic[Any], brokers: Sequence[str]) -> list[Panel]:
    """How many partitions of a topic each of these brokers leads, whose ids are 1, 2, 3; and how many replicas of each
    partition are in sync."""
    found: dict[int, Partition] = {}
    asked = float("-inf")

    def known() -> dict[int, Partition]:
        """Ask Kafka once a round: the readers are called one after another."""
        nonlocal found, asked
        if time.monotonic() - asked > 0.2:
            found = {}
            try:
                found = topic.cluster.partitions(topic.name, at_once=True)
            finally:
                asked = time.monotonic()
        return found

    def led(broker: int) -> float | None:
        there = known()
        return sum(one.leader == broker for one in there.values()) if there else None

    def in_sync(partition: int) -> float | None:
        there = known()
        return len(there[partition].in_sync) if partition in there else None

    leads, synced = f"{topic.short} led", f"{topic.short} in sync"
    leaders = {(leads, name): partial(led, broker) for broker, name in enumerate(brokers, 1)}
    replicas = {(synced, f"{topic.short}/{number}"): partial(in_sync, number) for number in range(topic.partitions)}
    shown, lines = Plot(leads, "area", brokers), Plot(synced, "line", [topic.short])
    return [
        Panel("Leaders", f"partitions of {topic.short}", [shown], readers=leaders),
        Panel("In sync", f"replicas of {topic.short}", [lines], readers=replicas),
    ]


def store_lag(deployments: Mapping[str, Deployment], name: str, topic: Topic[Any]) -> int:
    """Records of `topic` that the store in the slowest pod of a deployment has still to read.

    It goes by each pod's last report, so the lag of a frozen pod grows. A pod that starts has everything to read.
    """
    end = sum(end_offsets(topic.cluster, [topic.name]).values())
    reports = [pod.report for pod in deployments[name].pods]
    read = [0.0 if report is None else report.gauges.get(f"{topic.short} read", 0.0) for report in reports]
    return max(0, end - int(min(read, default=end)))


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _parts(label: str) -> tuple[str, str]:
    """Owner and partition of a label: of "orders/0", "orders" and "0"."""
    owner, _, partition = label.rpartition("/")
    return (owner, partition) if owner and partition.isdigit() else (label, "")


def _natural(label: str) -> tuple[object, ...]:
    """Sort key that puts "orders/10" after "orders/9"."""
    # Split by digits, every second part is a number, so numbers are only compared with numbers.
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", label)))
