"""What a lab saw over time: samples of its metrics, and the faults that were injected into it."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

_time_of = attrgetter("time")

REPEAT = 2.0  # seconds after which an unchanged value is kept again; a picture shows 4 s without a sample as a gap


def clock(moment: float) -> str:
    """The local time of day of a Unix time, as logs and boards show it."""
    return time.strftime("%H:%M:%S", time.localtime(moment))


@dataclass(frozen=True, slots=True)
class Sample:
    """One metric at one moment. `time` is in Unix seconds; `label` says whose value it is ("orders/0")."""

    time: float
    metric: str
    label: str
    value: float


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that was injected: a window of time, or an instant.

    `end` is None while the fault still stands, and equals `start` for an instant. `kind` is the verb that did it.
    `text` is what the picture writes beside it ("kill pod 1"). `needs_mending`: work that meets it cannot be done until
    somebody ends it.
    """

    start: float
    end: float | None
    kind: str
    target: str
    text: str
    needs_mending: bool = False

    @property
    def instant(self) -> bool:
        return self.end == self.start


class Snapshot(NamedTuple):
    """A consistent copy of a history. `version` grows whenever the history does."""

    samples: list[Sample]
    faults: list[Fault]
    version: int
    changed: float
    """Time of the newest sample that differed from the one before it."""


class History:
    """Samples and faults of one lab, written by its sampler, read by its board and by the learner.

    A sampler records every series at every tick, in the order of time. A series without a sample for some seconds is
    shown as a gap. To save memory the history keeps only both ends of every change, and now and then an unchanged
    value: they draw the same lines.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: list[Sample] = []
        self._held: dict[tuple[str, str], Sample] = {}  # the newest sample of each unchanged series
        self._kept_at: dict[tuple[str, str], float] = {}
        self._faults: list[Fault] = []
        self._last: dict[tuple[str, str], float] = {}
        self._highest: dict[tuple[str, str], float] = {}
        self._version = 0
        self._changed = 0.0

    @property
    def samples(self) -> list[Sample]:
        """All samples so far (a copy)."""
        return self.snapshot().samples

    @property
    def faults(self) -> list[Fault]:
        """All faults so far (a copy); those that still stand have `end` None."""
        with self._lock:
            return list(self._faults)

    @property
    def begun(self) -> float | None:
        """Time of the first sample; None before it."""
        with self._lock:
            return self._samples[0].time if self._samples else None

    def record(self, samples: Iterable[Sample]) -> None:
        """Append samples, not older than those before them."""
        with self._lock:
            kept: list[Sample] = []
            held, self._held = self._held, {}
            for sample in samples:
                series = (sample.metric, sample.label)
                before = self._held.pop(series, None) or held.pop(series, None)
                if self._last.get(series) != sample.value:
                    self._changed = sample.time
                    kept += [] if before is None else [before]  # the change begins here
                elif sample.time - self._kept_at[series] < REPEAT:
                    self._held[series] = sample
                    continue
                kept.append(sample)
                self._kept_at[series] = sample.time
                self._last[series] = sample.value
                self._highest[series] = max(sample.value, self._highest.get(series, sample.value))
            kept += held.values()  # series that have fallen silent
            self._samples += sorted(kept, key=_time_of)
            self._version += 1

    def note(
        self,
        kind: str,
        target: str,
        text: str,
        *,
        stands: bool = False,
        since: float | None = None,
        until: float | None = None,
        needs_mending: bool = False,
    ) -> None:
        """Note a fault, by default an instant: now. It may have begun at `since`, and it may stand until `end()`."""
        now = time.time()
        fault = Fault(since or now, None if stands else until or now, kind, target, text, needs_mending)
        with self._lock:
            self._faults.append(fault)
            self._version += 1
            self._changed = max(self._changed, fault.start)

    def end(self, kind: str, target: str, at: float) -> Fault | None:
        """End all standing faults of this kind on this target; returns the newest, None when none stands."""
        ended = None
        with self._lock:
            for i, fault in enumerate(self._faults):
                if fault.end is None and (fault.kind, fault.target) == (kind, target):
                    # A window of no length would read as an instant.
                    self._faults[i] = ended = replace(fault, end=max(at, fault.start + 0.001))
                    self._version += 1
                    self._changed = max(self._changed, at)
        return ended

    def now(self, metric: str, label: str) -> float:
        """The newest value of a series; NaN before its first."""
        with self._lock:
            return self._last.get((metric, label), float("nan"))

    def standing(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.end is None]

    def snapshot(self, since: float = 0.0) -> Snapshot:
        """Copy the samples from `since` (Unix seconds) on, and all faults, in one moment."""
        with self._lock:
            first = bisect_left(self._samples, since, key=_time_of)
            held = (sample for sample in self._held.values() if sample.time >= since)
            samples = sorted([*self._samples[first:], *held], key=_time_of)
            return Snapshot(samples, list(self._faults), self._version, self._changed)

    def frame(self) -> pd.DataFrame:
        """All samples, tidy: time (UTC), seconds (since the first sample), metric, label, value."""
        # Imported here, because pods import this package and need no pandas, which takes half a second.
        import pandas as pd

        samples = self.samples
        start = samples[0].time if samples else 0.0
        return pd.DataFrame(
            {
                "time": pd.to_datetime([s.time for s in samples], unit="s"),
                "seconds": pd.Series([s.time - start for s in samples], dtype="float64"),
                "metric": pd.Series([s.metric for s in samples], dtype="str"),
                "label": pd.Series([s.label for s in samples], dtype="str"),
                "value": pd.Series([s.value for s in samples], dtype="float64"),
            }
        )

    def table(self) -> pd.DataFrame:
        """The present figures: one row a series, its newest value and the highest so far."""
        import pandas as pd

        with self._lock:
            rows = [(m, label, value, self._highest[m, label]) for (m, label), value in self._last.items()]
        return (
            pd.DataFrame(rows, columns=["metric", "label", "now", "highest"])
            .sort_values(["metric", "label"])
            .reset_index(drop=True)
        )
