"""Deployments: n pods kept running, as in Kubernetes.

A pod that dies is started again under its name. One thread for each deployment does all of it.
"""

from __future__ import annotations

import html
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic, short_name
from labkit.lab import runs
from labkit.lab.history import History, clock
from labkit.lab.pods.pod import GRACE, UP, LogLine, Pod
from labkit.lab.pods.process import Runnable, message
from labkit.lab.pods.telemetry import PodReport, Waiting
from labkit.runtime.streams import StreamsCounter

GroupMember: TypeAlias = Consumer | StreamsCounter
"""A runnable that reads topics as a member of a group; without a group it gets one of the deployment's name."""


class Deployment:
    """A named number of pods that run the same thing. `scale` changes the number; dead pods are replaced."""

    _stays_in_the_notebook = "a handler runs inside one of its pods; send a record to a topic instead"

    def __init__(
        self,
        name: str,
        runnable: Runnable,
        replicas: int,
        telemetry: Topic[PodReport],
        history: History,
    ) -> None:
        _check(replicas)
        if not callable(getattr(runnable, "run", None)):
            raise LabkitError(f"{runnable!r} cannot be deployed: give a Consumer(topic, handler), or what has a run()")
        self.name, self.runnable, self.history = name, runnable, history
        self._payload = message(runnable, name, telemetry)  # raises CannotTravel before anything is started
        self._lock = threading.Lock()
        self._retired: list[Pod] = []
        self._pods = [Pod(self, index) for index in range(replicas)]
        self._log: deque[LogLine] = deque(maxlen=5000)
        self._leaving = False  # told to end, though its pods may still drain
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"deployment {name}", daemon=True)

    def begin(self) -> None:
        """Start its pods."""
        self._thread.start()

    @property
    def pods(self) -> list[Pod]:
        """Its pods, in the order of their index."""
        with self._lock:
            return list(self._pods)

    @property
    def log(self) -> list[LogLine]:
        """What its pods printed, handlers' output and tracebacks too, and what happened to them, oldest first."""
        return sorted((*self._log, *self._faults()), key=lambda line: line.time)

    @property
    def group(self) -> str | None:
        return self.runnable.group if isinstance(self.runnable, GroupMember) else None

    @property
    def topics(self) -> list[Topic[object]]:
        return list(self.runnable.sources) if isinstance(self.runnable, GroupMember) else []

    @property
    def restarts(self) -> int:
        """How often one of its pods was started again."""
        return sum(pod.restarts for pod in self.pods)

    @property
    def waiting(self) -> list[Waiting]:
        """Records in a back-off, in any of its pods."""
        return [one for pod in self.pods for one in pod.waiting]

    def scale(self, replicas: int) -> None:
        """Run this many pods from now on: the highest indexes go first.

        Raises LabkitError when it has ended, or was told to.
        """
        _check(replicas)
        with self._lock:
            if self._leaving:
                raise LabkitError(
                    f"{self.name} has ended, or was told to: use what lab.deploy returned last, or deploy it again"
                )
            gone = self._pods[replicas:]
            if replicas != len(self._pods):
                # Partitions move while pods leave. Noted first, because they may be gone at once.
                self.history.note("scale", self.name, f"scale to {replicas}", stands=bool(gone))
            self._pods = self._pods[:replicas]
            self._pods += [Pod(self, index) for index in range(len(self._pods), replicas)]
            self._retired += gone
        for pod in gone:
            pod.retire()

    def ready(self, beside: Iterable[Deployment] = (), there: Mapping[str, int] | None = None) -> bool:
        """Whether every pod runs, and listens if it is a service; consumers share all partitions: no rebalance follows.

        `beside` are other deployments that are members of its group. `there` has how many partitions topics have now:
        some may have been added since it was deployed.
        """
        if self._leaving:
            return False
        pods = [*self.pods, *(pod for one in beside for pod in one.pods)]
        if not all(pod.state in UP for pod in pods):
            return False
        reports = [report for pod in pods if (report := pod.report) is not None]
        if getattr(self.runnable, "listens", False) and not all(report.counts for report in reports):
            return False  # its first figures come when it listens
        if not pods or not self.topics:
            return True
        shares = [report.assigned for report in reports]
        held = [place for share in shares for place in share]
        shared = getattr(self.runnable, "mains", self.topics)  # retry topics follow their main topics
        counts = {topic.name: (there or {}).get(topic.name, topic.partitions) for topic in shared}
        every = {f"{name}/{number}" for name, count in counts.items() for number in range(count)}
        # The first pod of a group has all partitions until the next one asks for its share. (Exactly once, the same
        # numbers of several topics go to one pod.)
        spread = max if getattr(self.runnable, "guarantee", "") == "exactly once" else sum
        holders = min(len(pods), spread(counts.values()))
        return len(held) == len(set(held)) and every <= set(held) and sum(map(bool, shares)) >= holders

    def note(self, pod: str, text: str) -> None:
        self._log.append(LogLine(time.time(), pod, text))

    def heard(self, report: PodReport) -> None:
        """Take in a pod's report."""
        for pod in self.pods:
            if pod.name != report.pod or pod.child is None or pod.child.pid != report.process:
                continue
            before, now = set(pod.report.assigned if pod.report is not None else ()), set(report.assigned)
            for verb, places in (("got", now - before), ("gave up", before - now)):
                if places:
                    short = ", ".join(sorted(map(short_name, places)))
                    self._log.append(LogLine(report.time, pod.name, f"{verb} {short}"))
            pod.heard = report

    def drain(self, timeout: float = GRACE + 2) -> None:
        """Stop all pods for good: they finish the records that they handle now, commit and leave."""
        self.scale_down()
        until = time.monotonic() + timeout
        while any(pod.child is not None for pod in self._retired) and time.monotonic() < until:
            if self._ended.wait(0.02):
                break  # the deployment's thread has ended
        self.close()

    def scale_down(self) -> None:
        """Begin to drain all pods, without waiting."""
        with self._lock:
            self._leaving = True
            gone, self._pods = self._pods, []
            self._retired += gone
            leaving = list(self._retired)
        for pod in leaving:  # including those that an interrupted call did not reach
            pod.retire()

    def close(self) -> None:
        """End everything now. May be called again."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5)
        for pod in (*self.pods, *self._retired):
            pod.end()
        self.history.end("scale", self.name, time.time())

    def __repr__(self) -> str:
        states = ", ".join(repr(pod) for pod in self.pods) or "no pods"
        return f"Deployment {self.name} ({states})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{title}</th>" for title in (html.escape(self.name), "state", "restarts", "partitions"))
        rows = "".join(
            f"<tr><td>{html.escape(pod.name)}</td><td>{pod.state.value}</td><td>{pod.restarts}</td>"
            f"<td>{html.escape(pod.partitions)}</td></tr>"
            for pod in self.pods
        )
        return f"<table><tr>{head}</tr>{rows}</table>"

    def _faults(self) -> Iterator[LogLine]:
        """What was done to its pods, to itself, and to Kafka."""
        for fault in self.history.faults:
            if fault.target in (self.name, "Kafka", "machine") or fault.target.rpartition("-")[0] == self.name:
                word, over = ("", "done") if fault.kind in ("scale", "redeploy") else ("fault: ", "ended")
                yield LogLine(fault.start, fault.target, f"{word}{fault.text}")
                if fault.end is not None and not fault.instant:
                    lasted = f"{fault.text}: {over} after {fault.end - fault.start:.1f} s"
                    yield LogLine(fault.end, fault.target, lasted)

    def _run(self) -> None:
        while not self._ended.is_set():
            now = time.monotonic()
            with self._lock:
                names = {pod.name for pod in self._retired}  # two live pods never share one
                pods = [*self._retired, *(pod for pod in self._pods if pod.name not in names)]
            for pod in pods:
                pod.step(now, self._payload)
            with self._lock:
                left = [pod for pod in self._retired if pod.child is None]
                self._retired = [pod for pod in self._retired if pod.child is not None]
                if left and not self._retired:
                    self.history.end("scale", self.name, time.time())
            self._ended.wait(0.02)


def pane(deployments: Sequence[Deployment], lines: int = 200) -> list[str]:
    """The newest lines of their logs as a board shows them; above them, where the earlier ones are."""
    log = sorted({line for one in deployments for line in one.log}, key=lambda line: line.time)
    if earlier := max(0, len(log) - lines + 1):
        log = log[earlier:]
    shown = [f"{clock(line.time)} {line.pod} | {runs.short_names(line.text)}" for line in log]
    many = "1 earlier line" if earlier == 1 else f"{earlier:,} earlier lines"
    where = " or ".join(f"lab.logs({one.name!r}, {earlier + len(log)})" for one in deployments)
    return [f"{many}: {where}", *shown] if earlier else shown


def _check(replicas: int) -> None:
    if not isinstance(replicas, int) or isinstance(replicas, bool) or not 0 <= replicas <= 64:
        raise LabkitError(f"replicas must be a number from 0 to 64, not {replicas!r}")
