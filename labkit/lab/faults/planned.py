"""Actions that a lab does once a condition holds: a cell plans a fault, and a thread does it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import FunctionType

from labkit.kafka.errors import error_text


class Planned:
    """Something that will be done once a condition holds."""

    def __init__(self, condition: Callable[[], bool], action: Callable[[], object]) -> None:
        self.state = "waits for its condition"
        self.waits = True
        self.failed = False
        self._condition, self._action = condition, action
        self._begun = False
        self._deciding = threading.Lock()  # it is either begun or dropped
        threading.Thread(target=self._run, name="planned", daemon=True).start()

    def drop(self, why: str) -> bool:
        """Drop it, unless it has begun. Returns whether it was dropped."""
        with self._deciding:
            if dropped := self.waits and not self._begun:
                self.waits, self.state = False, f"did not happen: {why}"
            return dropped

    def is_the_same(self, condition: Callable[[], bool], action: Callable[[], object]) -> bool:
        """Whether it is the same action under the same condition."""
        try:
            return _what(self._condition) == _what(condition) and _what(self._action) == _what(action)
        except Exception:  # a default value that cannot be compared, such as a DataFrame
            return False

    def __repr__(self) -> str:
        name = getattr(self._action, "__name__", "action").replace("<lambda>", "action")
        return f"planned ({name}) {self.state}"

    def _holds(self) -> bool:
        try:
            return self._condition()
        except OSError:  # a service that it asks is down, or is starting
            return False

    def _run(self) -> None:
        try:
            while not self._holds():
                time.sleep(0.02)
                if not self.waits:
                    return
            with self._deciding:
                if not self.waits:
                    return
                self._begun, self.state = True, "is being done"
            self._action()
            self.state, self.waits = "done", False
        except Exception as error:  # nobody would catch it; `unsettled` names it
            with self._deciding:
                if self.waits:
                    self.state = f"failed: {error_text(error)}"
                    self.failed, self.waits = True, False


class Plans:
    """All that was planned in a lab, oldest first."""

    def __init__(self) -> None:
        self._all: tuple[Planned, ...] = ()

    def __iter__(self) -> Iterator[Planned]:
        return iter(self._all)

    def add(self, condition: Callable[[], bool], action: Callable[[], object]) -> Planned:
        """Plan an action. Failed plans are forgotten, and the same plan, if it still waits, is dropped.

        If the same plan is just being done, return that one: two of them would get in each other's way.
        """
        for one in self:
            if one.is_the_same(condition, action) and not one.drop("planned again") and one.waits:
                return one
        planned = Planned(condition, action)
        self._all = (*(one for one in self if not one.failed), planned)
        return planned

    def waiting(self) -> str | None:
        """A plan that still waits, in words."""
        return next((repr(planned) for planned in self if planned.waits), None)

    def failed(self) -> str | None:
        """A plan that failed, in words."""
        return next((repr(planned) for planned in self if planned.failed), None)


def _what(function: Callable[[], object]) -> tuple[object, ...]:
    """The identity of a function, which stays the same if a cell runs again. Methods can be compared as they are."""
    if not isinstance(function, FunctionType):
        return (function,)
    return function.__code__, function.__defaults__, function.__kwdefaults__, function.__closure__
