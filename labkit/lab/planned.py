"""What a lab is to do once a condition holds: faults that were planned by a cell, done by a thread."""

from __future__ import annotations

import html
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from labkit.kafka.errors import error_text


class Planned:
    """Something that will be done once a condition holds."""

    def __init__(self, condition: Callable[[], bool], action: Callable[[], object]) -> None:
        self.state = "waits for its condition"
        self.waits = True
        self.failed = False
        self._condition, self._action = condition, action
        self._cancelled, self._begun = threading.Event(), False
        self._deciding = threading.Lock()  # it is begun or it is cancelled: never both
        threading.Thread(target=self._run, name="planned", daemon=True).start()

    def cancel(self) -> None:
        """Do not do it any more."""
        self._cancelled.set()

    def drop(self, why: str) -> bool:
        """The same, and say why; unless it has begun: whether it had not."""
        with self._deciding:
            if dropped := self.waits and not self._begun:
                self.cancel()
                self.waits, self.state = False, f"did not happen: {why}"
            return dropped

    def is_the_same(self, condition: Callable[[], bool], action: Callable[[], object]) -> bool:
        """Whether it does just this, under just this condition."""
        return _same(self._condition, condition) and _same(self._action, action)

    def __repr__(self) -> str:
        name = getattr(self._action, "__name__", "action").replace("<lambda>", "action")
        return f"planned ({name}) {self.state}"

    def _repr_html_(self) -> str:
        return f"<span>{html.escape(repr(self))}</span>"

    def _holds(self) -> bool:
        try:
            return self._condition()
        except OSError:  # a service that it asks is away, or is only just starting
            return False

    def _run(self) -> None:
        try:
            while not self._holds():
                if self._cancelled.wait(0.02):
                    return
            with self._deciding:
                if self._cancelled.is_set():
                    return
                self._begun, self.state = True, "is being done"
            self._action()
            self.state, self.waits = "done", False
        except Exception as error:  # a thread has nobody to raise to: `unsettled` names it
            with self._deciding:
                if self._begun or not self._cancelled.is_set():
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


def _same(one: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether they are the same method of the same object, or a function and what a cell that ran again made of it."""
    if not (inspect.isfunction(one) and inspect.isfunction(other)):
        return one == other
    return one.__code__ == other.__code__ and all(map(_equal, _given(one), _given(other)))


def _given(function: types.FunctionType) -> list[Any]:
    """What a function was given when it was made: defaults, and variables of the function around it."""
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            given.append(cell.cell_contents)
        except ValueError:  # not set yet
            given.append(cell)
    return given


def _equal(one: Any, other: Any) -> bool:
    """Constants of a cell that is compiled again are new objects; of other things, only the same one is."""
    plain = type(one) is type(other) and isinstance(one, str | bytes | int | float)
    return one is other or (plain and bool(one == other))
