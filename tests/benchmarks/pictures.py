"""What a board that is watched costs the notebook's kernel."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

from benchmarks.bench import Bench, say
from benchmarks.report import Goal, Row
from labkit.lab.board.board import Board
from labkit.lab.board.panels import completed_panel, lag_panel, retries_panel
from labkit.lab.board.sampler import TICK
from labkit.lab.history import History, Sample
from labkit.lab.pods.deployment import Deployment
from labkit.lab.pods.pod import Pod, PodState

SECONDS = 15.0
WINDOW = 60.0
FRAMES = 3  # a second
PARTITIONS = 8


def board(bench: Bench) -> Iterator[Row]:
    """CPU of one board whose three panels change at each of 3 frames a second."""
    lab = BusyLab()
    now = time.time()
    for tick in range(int((WINDOW + 5) / TICK), 0, -1):
        lab.tick(now - tick * TICK)
    panels = [
        lag_panel(["orders"]),
        retries_panel(["shop"], ["charged"]),
        completed_panel("charged", ["orders"]),
    ]
    deployment = Pods(4)
    shown = Board(
        lab.history,
        panels,
        lambda: "shop: 4 of 4 pods running",
        lambda: [deployment],
        lambda: list(lab.log),
        window=WINDOW,
    )
    shown.start()
    cpu = cpu_clock(next(thread for thread in threading.enumerate() if thread.name == "labkit-board"))
    used, began, frames, pause = cpu(), time.monotonic(), shown.frames, threading.Event()
    while (passed := time.monotonic() - began) < SECONDS:
        lab.tick(time.time())
        pause.wait(TICK)
    used, frames = cpu() - used, shown.frames - frames
    shown.close()
    say(f"  {frames} frames in {passed:.1f} s, {used:.2f} s of CPU")
    note = f"CPU of its thread for a frame, {used / frames * 1000:.0f} ms, times {FRAMES}; "
    note += f"{frames / passed:.1f} frames a second were drawn; {PARTITIONS} partitions, {WINDOW:g} s, 4 faults"
    yield Row("board: CPU at 3 frames a second", used / frames * FRAMES * 100, "% of a core", None, Goal("≤", 20), note)


def cpu_clock(thread: threading.Thread) -> Callable[[], float]:
    """Seconds of CPU a thread has used. Of the whole process where the system does not tell (macOS)."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    return lambda: time.clock_gettime(clock)


class RunningPod(Pod):
    """A pod that runs, as a board asks."""

    state = PodState.RUNNING


class Pods:
    """A deployment, as a board asks."""

    def __init__(self, replicas: int) -> None:
        self.name, self.history = "shop", History()
        self.pods = [RunningPod(cast(Deployment, self), index) for index in range(replicas)]

    def scale(self, replicas: int, /) -> None: ...


class BusyLab:
    """Figures and log lines as a busy lab makes them, none of which stays as it was, and a few faults."""

    def __init__(self) -> None:
        self.history = History()
        self.log: deque[str] = deque(maxlen=200)
        self._random = random.Random(4)
        self._lag = [0.0] * PARTITIONS
        self._sent = self._completed = self._failed = self._again = 0
        self._ticks = 0

    def tick(self, at: float) -> None:
        """What a sampler records of this deployment at one moment."""
        self._ticks += 1
        draw = self._random.randint
        self._lag = [max(0.0, lag + draw(-9, 10)) for lag in self._lag]
        self._sent += draw(20, 60)
        self._completed = min(self._sent, self._completed + draw(15, 60))
        self._failed += draw(0, 4)
        self._again += draw(0, 1)
        values = [(f"orders/{number}", lag) for number, lag in enumerate(self._lag)]
        samples = [Sample(at, "lag", label, lag) for label, lag in values]
        samples += [Sample(at, "blocked", label, float(lag > 50)) for label, lag in values]
        of_shop = {"pods": 4, "restarts": 1, "waiting": draw(0, 12), "failed": self._failed, "rate": draw(100, 150)}
        samples += [Sample(at, metric, "shop", value) for metric, value in of_shop.items()]
        samples += [
            Sample(at, "sent", "orders", self._sent),
            Sample(at, "completed", "charged", self._completed),
            Sample(at, "redelivered", "charged", self._again),
        ]
        self.history.record(samples)
        if self._ticks % 60 == 30:
            self.history.note("kill", "shop-1", "kill pod 1", since=at, until=at)
        elif self._ticks % 60 == 45:
            self.history.note("freeze", "shop-2", "freeze pod 2", since=at - 3, until=at)
        self.log.append(f"shop-{self._ticks % 4} | charge {self._ticks} failed, attempt 1: TimeoutError: no answer")
