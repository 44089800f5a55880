"""A target can be broken and mended by its verbs: in code, by a board's button, and in a terminal.

To break: `kill`, `freeze`, `slow`, `fail`, `cut`, `hold`, `restart`. To mend: `recover`. The lab's history has all of
it.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial

from labkit.kafka.errors import LabkitError
from labkit.lab.history import History

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

    A verb at the wrong moment, or with a wrong figure, raises LabkitError with the fix. Because a cell may run twice, a
    verb does nothing if its effect is there already: killing what is dead, freezing what is frozen.
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
        if state in self.verbs.get(verb, (state,)):  # a verb that it does not have says so itself
            return None
        return f"it is {state.value}: {_FIX.get(state.value, 'recover it first')}"

    def standing(self) -> list[str]:
        """Its faults that have not ended, in words."""
        return [fault.text for fault in self.history.standing() if fault.target == self.name]

    def do(self, verb: str, options: Mapping[str, float]) -> str:
        """Do it by the name of the verb, and say the result. Raises LabkitError for an unknown verb or option."""
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


def positive(figure: float, name: str) -> float:
    """The figure. Raises LabkitError if it is not a positive number."""
    if isinstance(figure, bool) or not isinstance(figure, int | float) or not 0 < figure < math.inf:
        raise LabkitError(f"{name} must be a positive number, not {figure!r}; recover() ends a fault")
    return figure
