"""One pod of a deployment: its process is started, broken, mended, and started again with back-off when it has ended.

The methods for learners only set a wish or send a signal, so buttons and cells return at once. The thread of its
deployment does the rest. (What runs inside is `labkit.lab.pods.process`.)
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from labkit.kafka.consumer import EXIT_DEADLINE, EXIT_NO_ANSWER
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import short_name
from labkit.lab.faults.target import Target, positive
from labkit.lab.history import clock
from labkit.lab.pods.telemetry import PodReport, Waiting
from labkit.runtime.child import Child

if TYPE_CHECKING:
    from labkit.lab.pods.deployment import Deployment

GRACE = 10.0  # seconds a pod gets to drain before it is killed
FIRST_RESTART, LONGEST_RESTART = 0.1, 10.0  # seconds before a dead pod is started again, doubling
STABLE = 10.0  # seconds of life after which a pod's back-off begins anew


class PodState(Enum):
    """What a pod is doing."""

    STARTING = "starting"
    RUNNING = "running"
    SLOW = "slow"
    FROZEN = "frozen"
    DRAINING = "draining"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True)
class LogLine:
    """One line that a pod printed."""

    time: float
    pod: str
    text: str

    def __str__(self) -> str:
        return f"{clock(self.time)} {self.pod}: {self.text}"


UP = (PodState.RUNNING, PodState.SLOW)


class Pod(Target):
    """One pod of a deployment. Its name stays when its process is replaced."""

    verbs: Mapping[str, Collection[Enum]] = {
        "kill": (*UP, PodState.STARTING, PodState.FROZEN, PodState.DRAINING),
        "freeze": UP,
        "slow": UP,
        "restart": UP,
        "recover": (PodState.FROZEN, PodState.SLOW, PodState.RESTARTING),
    }

    def __init__(self, deployment: Deployment, index: int) -> None:
        super().__init__(f"{deployment.name}-{index}", deployment.history)
        self.deployment, self.index = deployment, index
        self.restarts = 0
        self.child: Child | None = None
        self.heard: PodReport | None = None
        """The last report of one of its processes."""
        self._lock = threading.Lock()
        self._wanted = True  # False: not started again
        self._reader: threading.Thread | None = None  # reads what it prints
        self._kill_at: float | None = None  # monotonic; a pod that is still draining then is killed
        self._frozen = False
        self._killed = False
        self._slow = 0.0
        self._born = 0.0  # monotonic
        self._deaths = 0  # in a row
        self._again_at = 0.0  # monotonic; when a dead pod is to be started again
        self._at_once = False  # somebody asked for it: no back-off

    @property
    def state(self) -> PodState:
        child = self.child
        if child is None and self._wanted and not self.restarts:
            return PodState.STARTING  # for the first time: nothing has happened to it
        if child is None or self._killed:
            return PodState.RESTARTING if self._wanted else PodState.STOPPED
        if self._frozen:
            return PodState.FROZEN
        if self._kill_at is not None:
            return PodState.DRAINING
        if self.report is None:
            return PodState.STARTING
        return PodState.SLOW if self._slow else PodState.RUNNING

    @property
    def report(self) -> PodReport | None:
        """The last report of its process; None before the first."""
        child, heard = self.child, self.heard
        return heard if child is not None and heard is not None and heard.process == child.pid else None

    @property
    def waiting(self) -> list[Waiting]:
        """Records it has in a back-off."""
        return report.waiting if (report := self.report) is not None else []

    @property
    def handled(self) -> int:
        """How many records its process has handled since it started."""
        return report.handled if (report := self.report) is not None else 0

    @property
    def partitions(self) -> str:
        """The partitions it has, in words."""
        assigned = report.assigned if (report := self.report) is not None else []
        return ", ".join(map(short_name, assigned)) or "no partition"

    def kill(self) -> None:
        """kill -9 it, in the middle of what it does: nothing is drained, nothing committed. It is started again."""
        with self._lock:
            if self.child is None or self._killed or self.child.poll() is not None:
                return
            self.child.kill()
            self._killed = True
            self.history.note("kill", self.name, f"kill pod {self.index}")
            if self._frozen:
                self._frozen = False
                self._ended("freeze")

    def freeze(self) -> None:
        """Stop it in its tracks (SIGSTOP), as a long pause of its machine would, until it recovers.

        It keeps its connections, and its partitions as long as its session lasts.
        """
        with self._lock:
            if self._frozen:
                return
            self._running("freeze").signal(signal.SIGSTOP)
            self._frozen = True
            self._began("freeze", f"freeze pod {self.index}")

    def slow(self, by: float = 0.1) -> None:
        """Make it wait 0.1 s, or so many, at each record, until it recovers or is started again."""
        positive(by, "by")
        with self._lock:
            self._tell(self._running("slow"), f"slow {by}\n".encode())
            self._slow = by
            self._ended("slow")
            self._began("slow", f"slow pod {self.index}")

    def restart(self) -> None:
        """Ask it to stop in good order (SIGTERM): it finishes, commits and leaves; it is started again."""
        with self._lock:
            self._drain(self._running("restart"))
            self._began("restart", f"restart pod {self.index}")  # until it has left

    def recover(self) -> str:
        """Let it go on (SIGCONT) if it is frozen, at full speed if it is slow; start it now if it is down.

        A frozen one goes on as if no time had passed. Its partitions may be somebody else's by now.
        """
        with self._lock:
            mended = []
            if self.state is PodState.RESTARTING:
                self._again_at, self._at_once = 0.0, True
                return f"{self.name} is started again"
            if (child := self.child) is None:
                return self._nothing()
            if self._frozen:
                self._thaw(child)
                mended.append(f"{self.name} goes on")
            if self._slow:
                self._tell(child, b"slow 0\n")
                self._slow = 0.0
                self._ended("slow")
                mended.append(f"{self.name} is slow no more")
            return ", ".join(mended) or self._nothing()

    def __repr__(self) -> str:
        again = f", restarted {self.restarts}×" if self.restarts else ""
        return f"{self.name}: {self.state.value}{again}, {self.partitions}"

    # -- what follows is called by the deployment's thread ---------------------------------------------------------

    def step(self, now: float, payload: bytes) -> None:
        """Do the next step towards the wanted state."""
        with self._lock:
            if self.child is None:
                if self._wanted and now >= self._again_at:
                    self._start(now, payload)
            elif (code := self.child.poll()) is not None:
                self._bury(code, now)
            elif self._kill_at is not None and now > self._kill_at:
                self.deployment.note(self.name, f"has not drained within {GRACE:g} s and is killed")
                self.child.kill()
                self._kill_at = math.inf

    def retire(self) -> None:
        """Drain it and do not start it again. A frozen pod is thawed for that: killed, it would stay a member of its
        group until its session ends."""
        with self._lock:
            self._wanted = False
            if self.child is not None and self._kill_at is None:
                self._drain(self.child)
                if self._frozen:
                    self._thaw(self.child)  # only now: it wakes up to the SIGTERM

    def end(self) -> None:
        """End it now."""
        with self._lock:
            self._wanted = False
            if self.child is not None:
                self._close(self.child)
                self.child = None
                self._ended()

    def _start(self, now: float, payload: bytes) -> None:
        self._born, self._at_once = now, False
        try:
            self.child = Child([sys.executable, "-u", "-m", "labkit.lab.pods.process", self.name])
        except (LabkitError, OSError) as error:  # no memory, or no process: try again
            self._again(f"could not be started: {error}", now)
            return
        self.deployment.note(self.name, f"pod {self.index} started as process {self.child.pid}")
        self._reader = threading.Thread(target=self._read, args=(self.child,), name=f"log {self.name}", daemon=True)
        self._reader.start()
        self._tell(self.child, payload)

    def _bury(self, code: int, now: float) -> None:
        child, self.child = self.child, None
        if child is not None:
            self._close(child)
        self._ended()  # all its faults end with its process
        # SIGTERM ends a pod that is not up yet at once: it handles nothing.
        drained = self._kill_at is not None and code in (0, -signal.SIGTERM)
        killed = self._killed
        self._killed, self._frozen, self._slow, self._kill_at = False, False, 0.0, None
        if not killed and not drained:  # unexpected: its records are redelivered
            self.history.note("death", self.name, f"pod {self.index} died")
        self._again("drained" if drained else _ended(code), now)

    def _again(self, why: str, now: float) -> None:
        """Plan its next start, if it is wanted."""
        if not self._wanted:
            self.deployment.note(self.name, why)
            return
        self._deaths = 1 if now - self._born > STABLE else self._deaths + 1
        wait = 0.0 if self._at_once else min(LONGEST_RESTART, FIRST_RESTART * 2.0 ** min(self._deaths - 1, 20))
        self._again_at = now + wait
        self.restarts += 1
        self.deployment.note(self.name, f"{why}; starts again in {wait:g} s")

    def _close(self, child: Child) -> None:
        """End a child and its pipes, after reading its last lines."""
        child.kill()
        if self._reader is not None:
            self._reader.join(1)
            if self._reader.is_alive():  # a process that a handler started holds the pipe open
                threading.Thread(target=child.close, name=f"close {self.name}", daemon=True).start()
                return
        child.close()

    def _drain(self, child: Child) -> None:
        child.terminate()
        self._kill_at = time.monotonic() + GRACE

    def _thaw(self, child: Child) -> None:
        child.signal(signal.SIGCONT)
        self._frozen = False
        self._ended("freeze")

    def _read(self, child: Child) -> None:
        if child.output is None:
            return
        with suppress(ValueError):  # closed meanwhile: the pod is gone
            for line in child.output:
                self.deployment.note(self.name, line.decode(errors="replace").rstrip("\n"))

    def _running(self, verb: str) -> Child:
        self._check(verb)
        if self.child is None or self.child.poll() is not None:
            raise LabkitError(f"cannot {verb} {self.name}: it has just ended: wait until it runs")
        return self.child

    @staticmethod
    def _tell(child: Child, words: bytes) -> None:
        with suppress(BrokenPipeError):  # it has just died
            child.stdin.write(words)
            child.stdin.flush()


def _ended(code: int) -> str:
    if code == EXIT_DEADLINE:
        return "ended: a handler overran its deadline"
    if code == EXIT_NO_ANSWER:
        return "ended: a call of its transaction never came back; its successor goes on, and nothing is lost"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
