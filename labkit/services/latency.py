"""How long things took lately: the figures that a service and its clients tell of themselves."""

from __future__ import annotations

import time
from collections import deque

LATELY = 5.0  # seconds


class Latency:
    """The times of the last seconds, at most 4,000 of them: to sort more would hold up a busy service.

    Not for use by several threads at once.
    """

    def __init__(self) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=4000)

    def add(self, seconds: float) -> None:
        """One more."""
        self._times.append((time.monotonic(), seconds))

    def quantiles(self, *parts: float) -> list[float]:
        """What these parts of them stayed below, in seconds; zeros when there are none."""
        oldest = time.monotonic() - LATELY
        while self._times and self._times[0][0] < oldest:
            self._times.popleft()
        ordered = sorted(seconds for _, seconds in self._times)
        last = len(ordered) - 1
        return [ordered[round(part * last)] if ordered else 0.0 for part in parts]

    def gauges(self) -> dict[str, float]:
        """The same as a service reports it, in milliseconds."""
        half, most = self.quantiles(0.5, 0.99)
        return {"p50 ms": half * 1000, "p99 ms": most * 1000}
