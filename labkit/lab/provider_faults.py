"""Faults of a service that takes them over HTTP: the payment provider of notebook 04, and its buttons."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from labkit.kafka.errors import LabkitError
from labkit.lab.board import Action
from labkit.lab.metrics import Fault

if TYPE_CHECKING:
    from labkit.lab.lab import Lab

ANSWER = 5.0  # seconds for the service to take a fault
SEVERAL = 3  # connections that the button cuts


class ProviderFaults:
    """Make the provider at `url` misbehave, as the buttons of a board do. Each is noted among the lab's faults.

    A fault stands until `recover`, or for `seconds` at the lab's pace. What is set replaces what was set before.
    Methods raise LabkitError when the provider cannot be reached.
    """

    _stays_in_the_notebook = "faults are injected from the notebook, not from a handler"

    def __init__(self, lab: Lab, url: str, name: str = "provider") -> None:
        self.name = name
        self._lab, self._url, self._history = lab, url, lab._history
        self._over: threading.Timer | None = None

    def fail(self, seconds: float | None = None) -> None:
        """It refuses everybody (503)."""
        self._set("fail", f"{self.name} down", seconds, down=True)

    def slow(self, by: float = 1.0, seconds: float | None = None) -> None:
        """Each answer takes so much longer."""
        self._set("slow", f"{self.name} slow", seconds, slow=self._lab.seconds(by))

    def flaky(self, share: float = 0.5, seconds: float | None = None) -> None:
        """It refuses this share of the calls."""
        self._set("flaky", f"{self.name} flaky {share:.0%}", seconds, flaky=share)

    def wrong(self, seconds: float | None = None) -> None:
        """It answers nonsense."""
        self._set("wrong", f"{self.name} answers nonsense", seconds, wrong=True)

    def drop(self, count: int = SEVERAL) -> None:
        """It charges, and then cuts the connection before it answers: so many times."""
        self._set("drop", f"{self.name} drops {count}", 0.0, drops=count)

    def stick(self, customer: str) -> None:
        """Calls for this customer end in an error, until somebody mends it."""
        self._set("stick", f"{customer} stuck", None, stuck=customer)

    def decline(self, customer: str) -> None:
        """This customer's card is declined, for good."""
        self._set("decline", f"card of {customer} declined", None, declined=customer)

    def recover(self) -> None:
        """It behaves again."""
        self._tell({})
        self._ended()

    def actions(self) -> list[Action]:
        """The board's buttons."""
        return [
            Action(f"Fail {self.name}", "It refuses every call, until it recovers.", self.fail),
            Action(f"Slow {self.name}", "Each answer takes a second longer.", self.slow),
            Action(f"Make {self.name} flaky", "It refuses every second call.", self.flaky),
            Action(
                "Cut connections", f"It charges {SEVERAL} times and cuts the connection before it answers.", self.drop
            ),
            Action(f"Recover {self.name}", "It behaves again.", self.recover, self._well),
        ]

    def _well(self) -> str | None:
        standing = any(fault.target == self.name for fault in self._history.standing())
        return None if standing else f"The {self.name} behaves already."

    def _set(self, kind: str, text: str, seconds: float | None, **faults: Any) -> None:
        self._tell(faults)
        self._ended()
        now = time.time()
        self._history.begin(Fault(now, now if seconds == 0 else None, kind, self.name, text))
        if seconds:
            self._over = threading.Timer(self._lab.seconds(seconds), self.recover)
            self._over.daemon = True
            self._over.start()

    def _ended(self) -> None:
        if self._over is not None:
            self._over.cancel()
        for fault in self._history.standing():
            if fault.target == self.name:
                self._history.end(fault.kind, self.name, time.time())

    def _tell(self, faults: dict[str, Any]) -> None:
        request = urllib.request.Request(f"{self._url}/faults", json.dumps(faults).encode(), method="PUT")  # noqa: S310
        try:
            urllib.request.urlopen(request, timeout=ANSWER).close()  # noqa: S310 - our own service
        except (urllib.error.URLError, OSError) as error:
            raise LabkitError(
                f"the {self.name} at {self._url} takes no orders: {error}. Is its pod running?"
            ) from error
