"""What a notebook sees of the stores in its pods."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from labkit.kafka.lag import end_offsets
from labkit.kafka.topics import Topic
from labkit.lab.deployment import Deployment
from labkit.lab.picture import BLACK, BLUE, GREEN, ORANGE, PURPLE, Now, Panel, Plot


def store_lag(deployment: Deployment, topic: Topic[Any]) -> int:
    """Records of `topic` that the store in the slowest pod has still to read.

    Seen from outside, by what a pod said last: so that of a frozen one grows. A pod that starts has all to read.
    """
    end = sum(end_offsets(topic.cluster, [topic.name]).values())
    read = [0.0 if pod.report is None else pod.report.gauges.get(f"{topic.short} read", 0.0) for pod in deployment.pods]
    return max(0, end - int(min(read, default=end)))


def store_panels(stores: Sequence[tuple[Deployment, Topic[Any]]]) -> list[Panel]:
    """Lag, loads and entries of the stores on these topics in these deployments. Lag is the metric `behind`."""
    colours = [BLUE, ORANGE, PURPLE, GREEN]
    lag = Plot("behind", "line", [deployment.name for deployment, _ in stores], tuple(colours))
    loads, entries = [], []
    for topic in dict.fromkeys(topic.short for _, topic in stores):
        owners = [deployment.name for deployment, one in stores if one.short == topic]
        loads.append(Plot(f"{topic} loads", "gain", owners, tuple(colours)))
        entries.append(Plot(f"{topic} entries", "line", owners, tuple(colours)))
        colours = colours[len(owners) :] or [BLACK]
    return [
        Panel("Lag", "records behind", [lag], partial(_words, [lag])),
        Panel("Reloads", "stores loaded", loads, partial(_words, loads)),
        Panel("Entries", "keys", entries, partial(_words, entries)),
    ]


def _words(plots: Sequence[Plot], now: Now) -> Sequence[str]:
    told = [f"{plot.name(label)} {value:,.0f}" for plot in plots for label, value in now[plot.metric].items()]
    return [" · ".join(told), f"{len(told)} stores"] if told else ["no store yet"]
