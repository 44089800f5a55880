"""What a notebook can do to a service that asks how it is to misbehave, and what it sees of the stores in its pods."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from labkit.kafka.lag import end_offsets
from labkit.kafka.topics import Topic
from labkit.lab.board import Action
from labkit.lab.deployment import Deployment
from labkit.lab.metrics import Fault, History
from labkit.lab.picture import BLACK, BLUE, GREEN, ORANGE, PURPLE, Now, Panel, Plot


class Switches(Protocol):
    """Where services look up how they are to misbehave."""

    def set(self, service: str, errors: float, status: int, delay: float, seconds: float | None) -> None: ...
    def clear(self, service: str) -> None: ...


class Faulty:
    """A service that a notebook can make misbehave: which of its faults stand."""

    _stays_in_the_notebook = "faults are injected from the notebook, not from a handler"

    def __init__(self, name: str, history: History) -> None:
        self.name = name
        self._history = history

    def _standing(self) -> list[str]:
        return [fault.text for fault in self._history.standing() if fault.target == self.name]

    def _well(self) -> str | None:
        return None if self._standing() else f"{self.name} behaves already."

    def __repr__(self) -> str:
        return f"Faults of {self.name}: {', '.join(self._standing()) or 'none'}"

    def _repr_html_(self) -> str:
        return f"<span>{html.escape(repr(self))}</span>"


class ServiceControls(Faulty):
    """Make a service fail or slow, as the buttons of a board do. Noted among the lab's faults.

    `seconds` is how long it lasts, else until `recover`. What is set replaces what was set before. Methods raise
    LabkitError for figures that make no sense, DeliveryFailed while Kafka is away.
    """

    def __init__(self, name: str, switches: Switches, history: History) -> None:
        super().__init__(name, history)
        self._switches = switches
        self._over: threading.Timer | None = None

    def fail(self, share: float = 1.0, status: int = 503, seconds: float | None = None) -> None:
        """Have it refuse this share of its requests, with this HTTP status."""
        kind, text = ("fail", f"fail {self.name}") if share == 1 else ("flaky", f"fail {self.name} {share:.0%}")
        self._set(kind, text, share, status, 0.0, seconds)

    def slow(self, delay: float = 1.0, seconds: float | None = None) -> None:
        """Have it wait so many seconds before each answer."""
        self._set("slow", f"slow {self.name} by {delay:g} s", 0.0, 503, delay, seconds)

    def recover(self) -> None:
        """Have it behave again."""
        self._switches.clear(self.name)
        self._ended()

    def actions(self) -> list[Action]:
        """The board's buttons for all of these."""
        return [
            Action(f"Fail {self.name}", "Have it refuse every request, until it recovers.", self.fail),
            Action(f"Slow {self.name}", "Have it wait a second before each answer.", self.slow),
            Action(f"Recover {self.name}", "Have it behave again.", self.recover, self._well),
        ]

    def close(self) -> None:
        """Forget what is still to end by itself: it does so without us."""
        if self._over is not None:
            self._over.cancel()

    def _set(self, kind: str, text: str, errors: float, status: int, delay: float, seconds: float | None) -> None:
        self._switches.set(self.name, errors, status, delay, seconds)
        self._ended()
        self._history.begin(Fault(time.time(), None, kind, self.name, text, seconds))
        if seconds is not None:
            self._over = threading.Timer(seconds, self._ended)  # what was set ends by itself
            self._over.daemon = True
            self._over.start()

    def _ended(self) -> None:
        self.close()
        for kind in ("fail", "flaky", "slow"):
            self._history.end(kind, self.name, time.time())


# -- Stores in pods ------------------------------------------------------------------------------------------------


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
