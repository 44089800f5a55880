"""One way to break things: the same few verbs for pods, servers and services, in code, by button, and in a terminal.

To break: `kill`, `freeze`, `slow`, `fail`, `cut`, `restart`. To mend: `recover`. What is done is in the lab's history.
"""

from __future__ import annotations

import html
import inspect
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Protocol

from labkit.kafka.errors import LabkitError
from labkit.lab.metrics import Fault, History


@dataclass(frozen=True)
class Action:
    """A button: verb and object ("Stop the provider"), what it does in a tooltip, and when it may.

    `available` answers None when the action makes sense, else the reason why not, which becomes the tooltip. If `run`
    returns a text, that is shown.
    """

    label: str
    tooltip: str
    run: Callable[[], object]
    available: Callable[[], str | None] = lambda: None


class Target:
    """What can be broken and mended, as by the buttons of a board.

    A verb at the wrong moment, or with a figure that makes no sense, raises LabkitError with the fix. What is already
    so is left alone, as a cell may run twice: to kill what is dead, to freeze what is frozen, to mend what is well.
    """

    _stays_in_the_notebook = "faults are injected from the notebook, not from a handler"

    verbs: Mapping[str, str]
    """What can be done to it, in the order of the buttons, and what that does."""

    def __init__(self, name: str, history: History) -> None:
        self.name, self.history = name, history

    @property
    def condition(self) -> str:
        """What it is doing, in words."""
        raise NotImplementedError

    def why_not(self, verb: str) -> str | None:
        """Why a verb makes no sense now, and what to do about it; None when it does."""
        raise NotImplementedError

    def recover(self) -> str:
        """Mend it: end all that stands. Says what was mended, or that there was nothing to mend."""
        raise NotImplementedError

    def standing(self) -> list[str]:
        """Its faults that have not ended, in words."""
        return [fault.text for fault in self.history.standing() if fault.target == self.name]

    def do(self, verb: str, options: Mapping[str, float]) -> str:
        """Do it by the name of the verb, and say what came of it. Raises LabkitError for what it cannot be told."""
        if verb not in self.verbs:
            what = f"{verb!r} cannot be done to {self.name}" if verb else f"say what is to be done to {self.name}"
            raise LabkitError(f"{what}; what can: {', '.join(self.verbs)}")
        method = getattr(self, verb)
        takes = inspect.signature(method).parameters
        if unknown := [name for name in options if name not in takes]:
            raise LabkitError(
                f"{verb} takes no {unknown[0]} for {self.name}; it takes: {', '.join(takes) or 'nothing'}"
            )
        if verb != "recover":
            self._check(verb)
        said = method(**options)
        return said if isinstance(said, str) else f"{verb} {self.name}: it is {self.condition}"

    def actions(self) -> list[Action]:
        """A board's buttons for all that can be done to it, each disabled with its reason while it makes no sense."""
        return [self._action(verb, about) for verb, about in self.verbs.items()]

    def _action(self, verb: str, about: str) -> Action:
        return Action(
            f"{verb.capitalize()} {self.name}", about, getattr(self, verb), lambda: sentence(self.why_not(verb))
        )

    def _check(self, verb: str) -> None:
        if why := self.why_not(verb):
            raise LabkitError(f"cannot {verb} {self.name}: {why}")

    def _nothing(self) -> str:
        return f"nothing to mend: {self.name} is {self.condition}"

    def _began(self, kind: str, text: str, since: float | None = None, needs_mending: bool = False) -> None:
        """Note a fault that stands."""
        self.history.begin(Fault(since or time.time(), None, kind, self.name, text, needs_mending))

    def _ended(self, *kinds: str) -> None:
        for kind in kinds:
            self.history.end(kind, self.name, time.time())

    def __repr__(self) -> str:
        stands = ", ".join(self.standing())
        return f"{self.name} is {self.condition}" + (f": {stands}" if stands else "")

    def _repr_html_(self) -> str:
        return f"<span>{html.escape(repr(self))}</span>"


class Switch(Protocol):
    """How a service is told to misbehave: through a store, or by HTTP."""

    understands: Collection[str]
    """The names of what it can be told: "errors", "status", "delay", and "cut" where it can."""

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        """Have it do this and nothing else. Raises LabkitError for values that make no sense, or when it is away."""


class Service(Target):
    """A service that misbehaves when it is told to.

    A fault stands until `recover`, which ends all of them, or for `seconds`. Different ones stand side by side.
    """

    _VERBS: ClassVar = {
        "fail": "It refuses every request (503), until it recovers.",
        "slow": "It takes a second longer for each answer, until it recovers.",
        "cut": "It does the work of 3 requests, and cuts their connections before it answers.",
        "recover": "It behaves again.",
    }

    def __init__(self, name: str, switch: Switch, history: History) -> None:
        super().__init__(name, history)
        self.verbs = {
            verb: about for verb, about in self._VERBS.items() if verb != "cut" or "cut" in switch.understands
        }
        self._switch = switch
        self._told: dict[str, Mapping[str, object]] = {}  # by the kind of fault
        self._timers: dict[str, threading.Timer] = {}
        self._lock = threading.RLock()

    @property
    def condition(self) -> str:
        return "misbehaving" if self.standing() else "as it should be"

    def why_not(self, verb: str) -> str | None:
        return "it behaves already" if verb == "recover" and not self.standing() else None

    def fail(self, share: float = 1.0, seconds: float | None = None, status: int = 503) -> None:
        """Have it refuse this share of its requests, with this HTTP status."""
        text = f"fail {self.name}" if positive(share, "share") == 1 else f"fail {self.name} {share:.0%}"
        self._tell("fail", text, seconds, {"errors": share, "status": status})

    def slow(self, by: float = 1.0, seconds: float | None = None) -> None:
        """Have it wait so many seconds before each answer."""
        self._tell("slow", f"slow {self.name} by {by:g} s", seconds, {"delay": positive(by, "by")})

    def cut(self, count: int = 3) -> None:
        """Have it do the work of so many requests, and cut the connection before it answers."""
        if "cut" not in self.verbs:
            raise LabkitError(f"{self.name} cannot cut connections: it can {', '.join(self.verbs)}")
        positive(count, "count")
        with self._lock:
            self._switch.tell(self.name, {**self._all(), "cut": count})  # told once: the service counts it down
        now = time.time()
        self.history.begin(Fault(now, now, "cut", self.name, f"cut {count} connections of {self.name}"))

    def tell(self, text: str, seconds: float | None = None, **told: object) -> None:
        """Have it do something else that it understands: `tell("customer 7 stuck", stuck="customer 7")`.

        A board writes `text` beside it.
        """
        self._tell(" ".join(told), text, seconds, told)

    def recover(self) -> str:
        """Have it behave again."""
        stood = self.standing()
        with self._lock:
            self._switch.tell(self.name, {})  # also what an earlier cell told it, whatever we know of it
            self._told.clear()
            self.close()
            self._ended(*(fault.kind for fault in self.history.standing() if fault.target == self.name))
        return f"ended: {', '.join(stood)}" if stood else self._nothing()

    def close(self) -> None:
        """Do not end by itself any more what still stands."""
        with self._lock:
            while self._timers:
                self._timers.popitem()[1].cancel()

    def _tell(self, kind: str, text: str, seconds: float | None, told: Mapping[str, object]) -> None:
        if seconds is not None:
            positive(seconds, "seconds")
        if unknown := [name for name in told if name not in self._switch.understands]:
            known = ", ".join(self._switch.understands)
            raise LabkitError(f"{self.name} does not understand {unknown[0]!r}; it understands: {known}")
        with self._lock:
            self._switch.tell(self.name, {**self._all(), **told})
            self._forget(kind)
            self._told[kind] = told
            # Another attempt may get through where only some are refused.
            self._began(kind, text, needs_mending=told.get("errors") == 1 and seconds is None)
            if seconds is not None:
                self._timers[kind] = timer = threading.Timer(seconds, self._expire, (kind, told))
                timer.daemon = True
                timer.start()

    def _all(self) -> dict[str, object]:
        return {name: value for told in self._told.values() for name, value in told.items()}

    def _expire(self, kind: str, told: Mapping[str, object]) -> None:
        with self._lock:
            if self._told.get(kind) is not told:
                return  # another one of its kind has taken its place
            self._forget(kind)
            with suppress(LabkitError):  # it is gone, its faults with it
                self._switch.tell(self.name, self._all())

    def _forget(self, kind: str) -> None:
        self._told.pop(kind, None)
        if timer := self._timers.pop(kind, None):
            timer.cancel()
        self._ended(kind)


def positive(figure: float, name: str) -> float:
    """The figure. Raises LabkitError if it is not a positive number."""
    if isinstance(figure, bool) or not isinstance(figure, int | float) or not 0 < figure < math.inf:
        raise LabkitError(f"{name} must be a positive number, not {figure!r}; recover() ends a fault")
    return figure


def sentence(text: str | None) -> str | None:
    """A reason as a tooltip."""
    return text and f"{text[0].upper()}{text[1:]}."
