"""A thread that asks Kafka a question periodically, so that no other thread waits when Kafka is slow."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from labkit.kafka.errors import ClusterUnreachable, LabkitError

A = TypeVar("A")


class PeriodicCheck(Generic[A]):
    """Calls `ask` every so many seconds while this context lasts, or until the first failure."""

    def __init__(self, ask: Callable[[], A], every: float) -> None:
        self._ask, self._every = ask, every
        self._answer: A | None = None
        self._failure: LabkitError | None = None
        self._stop = threading.Event()

    def answer(self) -> A | None:
        """The last answer, if there was one. Raises the LabkitError that `ask` raised."""
        if self._failure is not None:
            raise self._failure
        return self._answer

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name="look at a topic", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self._answer = self._ask()
            except ClusterUnreachable:
                pass  # the cluster comes back; meanwhile nothing changes
            except LabkitError as error:
                self._failure = error
                return
