"""What a lab is to do once a condition holds: faults that were planned by a cell, done by a thread."""

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
        self._deciding = threading.Lock()  # it is begun or it is dropped: never both
        threading.Thread(target=self._run, name="planned", daemon=True).start()

    def drop(self, why: str) -> bool:
        """Do not do it any more, unless it has begun: whether it had not."""
        with self._deciding:
            if dropped := self.waits and not self._begun:
                self.waits, self.state = False, f"did not happen: {why}"
            return dropped

    def is_the_same(self, condition: Callable[[], bool], action: Callable[[], object]) -> bool:
        """Whether it does just this, under just this condition."""
        try:
            return _what(self._condition) == _what(condition) and _what(self._action) == _what(action)
        except Exception:  # one was given what cannot be compared, a DataFrame say
            return False

    def __repr__(self) -> str:
        name = getattr(self._action, "__name__", "action").replace("<lambda>", "action")
        return f"planned ({name}) {self.state}"

    def _holds(self) -> bool:
        try:
            return self._condition()
        except OSError:  # a service that it asks is away, or is only just starting
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
        except Exception as error:  # a thread has nobody to raise to: `unsettled` names it
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
        """Plan something. What failed is forgotten; one that is the same and still waits is dropped.

        If the same is just being done, that is the answer: done beside itself it would meet what it breaks.
        """
        for one in self:
            if one.is_the_same(condition, action) and not one.drop("planned again") and one.waits:
                return one
        planned = Planned(condition, action)
        self._all = (*(one for one in self if not one.failed), planned)
        return planned

    def waiting(self) -> str | None:
        """One that still waits, in words."""
        return next((repr(planned) for planned in self if planned.waits), None)

    def failed(self) -> str | None:
        """One that failed, in words."""
        return next((repr(planned) for planned in self if planned.failed), None)


def _what(function: Callable[[], object]) -> tuple[object, ...]:
    """What makes a function the same though a cell that ran again made it anew. A method is the same by itself."""
    if not isinstance(function, FunctionType):
        return (function,)
    return function.__code__, function.__defaults__, function.__kwdefaults__, function.__closure__
