"""What a notebook can do to a service that asks how it is to misbehave."""

from __future__ import annotations

import html
import threading
import time
from typing import Protocol

from labkit.lab.board import Action
from labkit.lab.metrics import Fault, History


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
