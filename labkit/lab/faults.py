"""One way to break things: the same few verbs for pods, servers and services, in code, by button, and in a terminal.

To break: `kill`, `freeze`, `slow`, `fail`, `cut`, `hold`, `restart`. To mend: `recover`. What is done is in the lab's
history.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.lab.history import History
from labkit.runtime.proxy import Proxy

_FIX = {  # by the state in which a verb makes no sense
    "starting": "wait until it runs",
    "running": "there is nothing to mend",
    "as it should be": "there is nothing to mend",
    "draining": "wait until it has started again",
    "restarting": "recover it, or wait until it runs",
    "stopped": "deploy it again",
}


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

    verbs: Mapping[str, Collection[Enum]]
    """What can be done to it, in the order of the buttons, and in which states. A button's tooltip is the first
    paragraph of what its method says of itself."""

    def __init__(self, name: str, history: History) -> None:
        self.name, self.history = name, history

    @property
    def state(self) -> Enum:
        """What it is doing."""
        raise NotImplementedError

    def recover(self) -> str:
        """Mend it: end all that stands. Says what was mended, or that there was nothing to mend."""
        raise NotImplementedError

    def why_not(self, verb: str) -> str | None:
        """Why a verb makes no sense now, and what to do about it; None when it does."""
        state = self.state
        if state in self.verbs.get(verb, (state,)):  # what can never be done to it says so itself
            return None
        return f"it is {state.value}: {_FIX.get(state.value, 'recover it first')}"

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
            known = ", ".join(takes) or "nothing"
            raise LabkitError(f"{verb} takes no {unknown[0]} for {self.name}; it takes: {known}")
        return method(**options) or f"{verb} {self.name}: it is {self.state.value}"

    def action(self, verb: str) -> Action:
        """A board's button for this verb, disabled with its reason while it makes no sense."""
        about = inspect.getdoc(getattr(self, verb)) or ""
        tooltip = " ".join(about.partition("\n\n")[0].split())
        label = f"{verb.capitalize()} {self.name}"
        return Action(label, tooltip, partial(self.do, verb, {}), partial(self._reason, verb))

    def actions(self) -> list[Action]:
        """The buttons for all that can be done to it."""
        return [self.action(verb) for verb in self.verbs]

    def _reason(self, verb: str) -> str | None:
        why = self.why_not(verb)
        return why and f"{why[0].upper()}{why[1:]}."

    def _check(self, verb: str) -> None:
        if why := self.why_not(verb):
            raise LabkitError(f"cannot {verb} {self.name}: {why}")

    def _nothing(self) -> str:
        return f"nothing to mend: {self.name} is {self.state.value}"

    def _began(self, kind: str, text: str, since: float | None = None, needs_mending: bool = False) -> None:
        """Note a fault that stands."""
        self.history.note(kind, self.name, text, stands=True, since=since, needs_mending=needs_mending)

    def _ended(self, *kinds: str) -> None:
        """Note the end of what stands, of all if no kinds are named."""
        for fault in self.history.standing():
            if fault.target == self.name and (not kinds or fault.kind in kinds):
                self.history.end(fault.kind, self.name, time.time())

    def __repr__(self) -> str:
        stands = ", ".join(self.standing())
        return f"{self.name} is {self.state.value}" + (f": {stands}" if stands else "")


class Switch(Protocol):
    """How a service is told to misbehave: through a store, or by HTTP."""

    understands: Collection[str]
    """The names of what it can be told: "errors", "status", "delay", and "cut" where it can."""

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        """Have it do this and nothing else. Raises LabkitError for what it does not understand, or when it is away."""


class ServiceState(Enum):
    """What a service was told."""

    WELL = "as it should be"
    ILL = "misbehaving"


class Service(Target):
    """A service that misbehaves when it is told to.

    A fault stands until `recover`, which ends all of them, or for `seconds`. Different ones stand side by side.
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
            self._switch.tell(self.name, {})  # also what an earlier cell told it, whatever we know of it
            self._told.clear()
            self._ended()
        return f"ended: {', '.join(stood)}" if stood else self._nothing()

    def close(self) -> None:
        """What still stands does not end by itself any more."""
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
                return  # it was ended, or another one of its kind has taken its place
            del self._told[kind]
            try:
                self._switch.tell(self.name, self._all())
            except LabkitError:  # it is away, or Kafka is: the fault stands until it can be told
                self._told[kind] = told
                self._later(1.0, kind, told)
            else:
                self._ended(kind)


class Connection(Target):
    """The way through a proxy to a broker, for those who take `cluster`, and to what else is reached `through` it.

    `cut` and `hold` begin at once, or with the broker's first request of a kind (`Produce`, `EndTxn` …); different
    faults stand side by side until `recover`. A `distance` is no fault, and stays.
    """

    _stays_in_the_notebook = Proxy._stays_in_the_notebook

    verbs: Mapping[str, Collection[Enum]] = {
        **dict.fromkeys(("cut", "hold", "slow"), tuple(ServiceState)),
        "recover": (ServiceState.ILL,),
    }

    def __init__(self, proxy: Proxy, history: History) -> None:
        super().__init__("connection", history)
        self._proxy = proxy

    @property
    def state(self) -> ServiceState:
        return ServiceState.ILL if self.standing() else ServiceState.WELL

    @property
    def cluster(self) -> Cluster:
        """The broker's cluster, reached by this connection."""
        return self._proxy.cluster

    def distance(self, seconds: float) -> None:
        """Put this far away what is reached by this connection: so many seconds each way, a round trip to connect."""
        self._proxy.distance(seconds)

    def through(self, port: int) -> int:
        """The port by which what listens on `port`, a service or a database, is reached by this connection too."""
        return self._proxy.through(port)

    def cut(self, request: str = "") -> None:
        """Close all connections through the proxy and refuse new ones, until it recovers."""
        self._proxy.cut(request)
        self._stands("cut", request)

    def hold(self, request: str = "") -> None:
        """Hold answers back while requests go through, until it recovers. After `wait`, `cut`: the broker has done the
        work, and its client never hears of it."""
        self._proxy.hold(request)
        self._stands("hold", request)

    def slow(self, seconds: float = 1.0) -> None:
        """Pass everything on a second later each way, or so many, until it recovers."""
        self._proxy.slow(seconds)
        self._ended("slow")
        self._began("slow", f"slow the connection by {seconds:g} s")

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until the `cut` or `hold` that was asked for has begun. Raises LabkitError after `timeout` seconds."""
        self._proxy.wait(timeout)

    def recover(self) -> str:
        """Let everything pass again. Answers that were held back go out, unless their connection was cut."""
        stood = self.standing()
        self._proxy.recover()
        self._ended()
        return f"ended: {', '.join(stood)}" if stood else self._nothing()

    def _stands(self, verb: str, request: str) -> None:
        self._ended("cut", "hold")  # the newer one takes the place of the older
        first = f" from the next {request} on" if request else ""
        self._began(verb, f"{verb} the connection{first}", needs_mending=True)


def positive(figure: float, name: str) -> float:
    """The figure. Raises LabkitError if it is not a positive number."""
    if isinstance(figure, bool) or not isinstance(figure, int | float) or not 0 < figure < math.inf:
        raise LabkitError(f"{name} must be a positive number, not {figure!r}; recover() ends a fault")
    return figure
