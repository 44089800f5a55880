"""Faults of a service that takes them over HTTP: the payment provider of notebook 04, and its buttons."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from labkit.kafka.errors import LabkitError
from labkit.lab.board import Action
from labkit.lab.metrics import Fault
from labkit.lab.services import Faulty

if TYPE_CHECKING:
    from labkit.lab.lab import Lab

ANSWER = 5.0  # seconds for the service to take a fault
SEVERAL = 3  # connections that the button cuts

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # never by a proxy of the environment


class ProviderFaults(Faulty):
    """Make the provider at `url` misbehave, as the buttons of a board do. Each is noted among the lab's faults.

    A fault stands until `recover`, which ends all of them, or for `seconds` at the lab's pace.
    Methods raise LabkitError when the provider cannot be reached.
    """

    def __init__(self, lab: Lab, url: str, name: str = "provider") -> None:
        super().__init__(name, lab._history)
        self._lab, self._url = lab, url
        self._faults: dict[str, Any] = {}
        self._ends: dict[str, threading.Timer] = {}  # of the faults that end by themselves, by kind
        self._lock = threading.Lock()

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
        with self._lock:
            self._faults.clear()
            self._tell()
        self._ended()

    def actions(self) -> list[Action]:
        """The board's buttons."""
        return [
            Action(f"Fail {self.name}", "It refuses every call, until it recovers.", self.fail),
            Action(f"Slow {self.name}", "Each answer takes a second longer.", self.slow),
            Action(f"Make {self.name} flaky", "It refuses every second call.", self.flaky),
            Action("Cut connections", f"It charges, and cuts {SEVERAL} connections before it answers.", self.drop),
            Action(f"Recover {self.name}", "It behaves again.", self.recover, self._well),
        ]

    def _set(self, kind: str, text: str, seconds: float | None, **faults: Any) -> None:
        with self._lock:
            self._faults |= faults
            self._tell()
            if seconds == 0:  # told once: the provider counts it down
                self._faults = {name: value for name, value in self._faults.items() if name not in faults}
        self._ended(kind)
        now, lasts = time.time(), self._lab.seconds(seconds) if seconds else None
        self._history.begin(Fault(now, now if seconds == 0 else None, kind, self.name, text, lasts))
        if lasts is not None:
            self._ends[kind] = timer = threading.Timer(lasts, self._expire, (kind, faults))
            timer.daemon = True
            timer.start()

    def _expire(self, kind: str, faults: dict[str, Any]) -> None:
        with self._lock:
            for name in faults:
                self._faults.pop(name, None)
            with suppress(LabkitError):  # it is gone, its faults with it
                self._tell()
        self._ended(kind)

    def _ended(self, kind: str = "") -> None:
        for one in [kind] if kind else list(self._ends):
            if timer := self._ends.pop(one, None):
                timer.cancel()  # a fault of that kind which comes later is none of its business
        for fault in self._history.standing():
            if fault.target == self.name and kind in ("", fault.kind):
                self._history.end(fault.kind, self.name, time.time())

    def _tell(self) -> None:
        request = urllib.request.Request(f"{self._url}/faults", json.dumps(self._faults).encode(), method="PUT")  # noqa: S310
        try:
            _direct(request, timeout=ANSWER).close()
        except OSError as error:
            raise LabkitError(f"the {self.name} at {self._url} takes no orders: is its pod running? {error}") from error
