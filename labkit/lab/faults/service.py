"""Faults of a service: it fails, answers slowly or cuts connections, because a switch tells it to."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Protocol

from labkit.kafka.errors import LabkitError
from labkit.lab.faults.target import Target, positive
from labkit.lab.history import History


class Switch(Protocol):
    """How a service is told to misbehave: through a store, or by HTTP."""

    understands: Collection[str]
    """What it can be told: "errors", "status", "delay", and "cut" if it can."""

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        """Have it do this and nothing else. Raises LabkitError for what it does not understand, or when it is down."""


class ServiceState(Enum):
    """What a service was told."""

    WELL = "as it should be"
    ILL = "misbehaving"


class Service(Target):
    """A service that misbehaves when it is told to.

    A fault stands until `recover`, which ends all of them, or for `seconds`. Different faults stand together.
    """

    def __init__(self, name: str, switch: Switch, history: History) -> None:
        super().__init__(name, history)
        able = [verb for verb in ("fail", "slow", "cut") if verb != "cut" or "cut" in switch.understands]
        self.verbs = {**dict.fromkeys(able, tuple(ServiceState)), "recover": (ServiceState.ILL,)}
        self._switch = switch
        self._told: dict[str, Mapping[str, object]] = {}  # by the kind of fault
        self._lock = threading.RLock()

    @property
    def state(self) -> ServiceState:
        return ServiceState.ILL if self.standing() else ServiceState.WELL

    def fail(self, share: float = 1.0, seconds: float | None = None, status: int = 503) -> None:
        """Have it refuse every request, or this share of them, with this HTTP status, until it recovers."""
        text = f"fail {self.name}" if positive(share, "share") == 1 else f"fail {self.name} {share:.0%}"
        self._tell("fail", text, seconds, {"errors": share, "status": status})

    def slow(self, by: float = 1.0, seconds: float | None = None) -> None:
        """Have it wait a second, or so many, before each answer, until it recovers."""
        self._tell("slow", f"slow {self.name} by {by:g} s", seconds, {"delay": positive(by, "by")})

    def cut(self, count: int = 3) -> None:
        """Have it do the work of 3 requests, or so many, and cut each connection before it answers."""
        positive(count, "count")
        with self._lock:
            self._switch.tell(self.name, {**self._all(), "cut": count})  # told once: the service counts it down
        self.history.note("cut", self.name, f"cut {count} connections of {self.name}")

    def tell(self, text: str, seconds: float | None = None, **told: object) -> None:
        """Have it do something else that it understands: `tell("customer 7 stuck", stuck="customer 7")`.

        A board writes `text` beside it.
        """
        self._tell(" ".join(told), text, seconds, told)

    def recover(self) -> str:
        """Have it behave again."""
        stood = self.standing()
        with self._lock:
            self._switch.tell(self.name, {})  # also what an earlier cell has told it
            self._told.clear()
            self._ended()
        return f"ended: {', '.join(stood)}" if stood else self._nothing()

    def close(self) -> None:
        """From now on no timer ends a fault that still stands."""
        self._told.clear()

    def _tell(self, kind: str, text: str, seconds: float | None, told: Mapping[str, object]) -> None:
        if seconds is not None:
            positive(seconds, "seconds")
        with self._lock:
            self._switch.tell(self.name, {**self._all(), **told})
            self._ended(kind)
            self._told[kind] = told
            # Another attempt may get through where only some are refused.
            self._began(kind, text, needs_mending=told.get("errors") == 1 and seconds is None)
        if seconds is not None:
            self._later(seconds, kind, told)

    def _later(self, seconds: float, kind: str, told: Mapping[str, object]) -> None:
        timer = threading.Timer(seconds, self._expire, (kind, told))
        timer.daemon = True
        timer.start()

    def _all(self) -> dict[str, object]:
        return {name: value for told in self._told.values() for name, value in told.items()}

    def _expire(self, kind: str, told: Mapping[str, object]) -> None:
        with self._lock:
            if self._told.get(kind) is not told:
                return  # it has ended, or was replaced by a fault of its kind
            del self._told[kind]
            try:
                self._switch.tell(self.name, self._all())
            except LabkitError:  # it is down, or Kafka is: the fault stands
                self._told[kind] = told
                self._later(1.0, kind, told)
            else:
                self._ended(kind)
