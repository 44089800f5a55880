"""The sampler: one thread of a lab that reads its metrics, from Kafka itself wherever possible."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from labkit.kafka.errors import ClusterUnreachable, LabkitError, error_text
from labkit.kafka.lag import lag
from labkit.kafka.reader import Reader
from labkit.kafka.records import CAUSE
from labkit.kafka.topics import Topic
from labkit.lab.board.panels import Read
from labkit.lab.history import History, Sample
from labkit.lab.load import Load, identifier
from labkit.lab.pods.deployment import Deployment
from labkit.lab.pods.pod import PodState
from labkit.lab.pods.telemetry import PodReport

TICK = 0.33  # seconds between two samples
FROZEN = 2.0  # seconds after a freeze in which a pod reports that it lost its partitions
ASLEEP = 5.0  # if the wall clock gains so many seconds on this process's clock, the machine slept


class Tally:
    """Counts what took effect in a topic: distinct ids, and effects that one record had more than once."""

    def __init__(self, topic: Topic[Any], by: str | Callable[[Any], str]) -> None:
        self.topic, self.by = topic, by
        self._reader = Reader(topic)
        self._identify = identifier(by)
        self._seen: set[str] = set()
        self._nameless: str | None = None
        self._made: set[tuple[str | None, str]] = set()  # the cause and the id of each effect
        self.again = 0
        """How often a record's work took effect again. (An id that is sent twice may take effect twice.)"""

    @property
    def completed(self) -> int:
        """Distinct ids so far."""
        return len(self._seen)

    def read(self) -> None:
        """Take in what is new."""
        while records := self._reader.poll(0):
            for record in records:
                if record.value is None:
                    continue  # a tombstone is no effect
                try:
                    name = self._identify(record.value)
                except LabkitError as error:
                    self._nameless = str(error)
                    continue
                self._seen.add(name)
                work = (record.headers.get(CAUSE), name)
                self.again += work in self._made
                self._made.add(work)

    def look(self) -> None:
        """From now on, also count in partitions that were added."""
        self._reader.look()

    @property
    def trouble(self) -> str | None:
        """What could not be counted."""
        return self._nameless or self._reader.undecodable

    def close(self) -> None:
        """Let the client go."""
        self._reader.close()


class Sampler:
    """Takes a sample of everything, three times a second, into `history`."""

    def __init__(
        self,
        history: History,
        telemetry: Topic[PodReport],
        deployments: Mapping[str, Deployment],
        loads: Sequence[Load[Any]],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """`look` notes what happened to Kafka; it is called before each sample."""
        self.history = history
        self._look = look
        self.trouble: str | None = None
        """Why the last sample is not complete, for the status line."""
        self.rate: dict[str, float] = {}
        """Records handled a second, by deployment, over the last seconds."""
        self._deployments, self._loads = deployments, loads
        self._reports = Reader(telemetry)
        self._tallies: dict[str, Tally] = {}
        self._replaced: list[Tally] = []
        self._handled: dict[tuple[str, str, int], PodReport] = {}  # the newest report of each process
        self._recent: dict[tuple[str, str], list[tuple[float, int]]] = {}
        self._watched: dict[tuple[str, str], Read] = {}
        self._ids: dict[str, set[str]] = {}  # sent, by topic
        self._counted: dict[int, int] = {}  # how many records of each load are in `_ids`
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def tally(self, topic: Topic[Any], by: str | Callable[[Any], str]) -> None:
        """Count what takes effect in `topic`, from its beginning. This replaces a count by another id."""
        with self._lock:
            before = self._tallies.get(topic.short)
            if before is None or before.by != by:
                self._tallies[topic.short] = Tally(topic, by)
                self._replaced += [] if before is None else [before]

    def watch(self, readers: Mapping[tuple[str, str], Read]) -> None:
        """Sample what these functions return, by metric and label, from now on: see `panel`."""
        with self._lock:
            self._watched |= readers

    def close(self) -> None:
        """End the thread and its clients."""
        self._stop.set()
        self._thread.join(15)
        if not self._thread.is_alive():  # a client may be closed twice
            self._reports.close()
            for tally in (*self._tallies.values(), *self._replaced):
                tally.close()

    def _run(self) -> None:
        wall, mono = time.time(), time.monotonic()
        while not self._stop.is_set():
            slept = (time.time() - wall) - (time.monotonic() - mono)
            if slept > ASLEEP:
                # Sessions ended meanwhile: without this fault, redeliveries would have no explanation.
                self.history.note("sleep", "machine", f"the machine slept {slept:.0f} s", since=wall)
            wall, mono = time.time(), time.monotonic()
            try:
                self.trouble = self._sample()
            except LabkitError as error:
                self.trouble = str(error)
            except Exception as error:  # nobody would catch it; the status line shows it
                self.trouble = error_text(error)
            self._stop.wait(max(0.0, TICK - (time.monotonic() - mono)))

    def _sample(self) -> str | None:
        """Take one. What could not be read is left out; returns why."""
        self._look()
        for record in self._reports.poll(0):
            report = record.value
            self._look_for_eviction(report)
            self._handled[report.deployment, report.pod, report.process] = report
            if report.deployment in self._deployments:
                self._deployments[report.deployment].heard(report)
        with self._lock:
            tallies, watched = list(self._tallies.values()), list(self._watched.items())
        while self._replaced:
            self._replaced.pop().close()  # in the thread that reads it
        for tally in tallies:
            tally.read()
        values: list[tuple[str, str, float]] = []
        trouble = next((tally.trouble for tally in tallies if tally.trouble), None)
        away = False
        for name, deployment in list(self._deployments.items()):
            values += self._of_pods(name, deployment)
            try:
                values += [] if away else self._of_group(deployment)
            except LabkitError as error:
                # We have waited for Kafka once. To wait again for each group would stop the picture during a fault.
                trouble, away = str(error), away or isinstance(error, ClusterUnreachable)
        for tally in () if away else tallies:
            tally.look()
        for topic, count in self._sent().items():
            values.append(("sent", topic, count))
        for tally in tallies:
            values.append(("completed", tally.topic.short, tally.completed))
            values.append(("redelivered", tally.topic.short, tally.again))
        for (metric, label), read in watched:
            try:
                if (value := read()) is not None and math.isfinite(value):  # an unknown figure is left out
                    values.append((metric, label, value))
            except Exception as error:  # a learner's function, or a server that is down: go on with the others
                trouble = f"{metric}{f' of {label}' * (label != metric)}: {error_text(error)}"
        now = time.time()
        highest: dict[tuple[str, str], float] = {}  # the highest lag, if several groups read one topic
        for metric, label, value in values:
            highest[metric, label] = max(value, highest.get((metric, label), value))
        self.history.record(Sample(now, *series, value) for series, value in highest.items())
        return trouble

    def _look_for_eviction(self, report: PodReport) -> None:
        """Note a fault if a pod lost its partitions because it got no CPU time, or was stopped from outside."""
        before = self._handled.get((report.deployment, report.pod, report.process))
        if report.lost <= (0 if before is None else before.lost):
            return
        for fault in self.history.faults:
            over = fault.end is not None and report.time - fault.end > FROZEN
            if (fault.kind, fault.target) == ("freeze", report.pod) and not over:
                return  # a fault explains it
        text = f"{report.pod} lost its partitions"
        self.history.note("eviction", report.pod, text, since=report.away, until=report.time)

    def _of_pods(self, name: str, deployment: Deployment) -> list[tuple[str, str, float]]:
        reports = [report for (of, _, _), report in self._handled.items() if of == name]
        totals = {"handled": sum(report.handled for report in reports)}
        for report in reports:
            for metric, count in report.counts.items():
                totals[metric] = totals.get(metric, 0) + count
        rates = {metric: self._grows(name, metric, count) for metric, count in totals.items()}
        self.rate[name] = rates.pop("handled")
        values: list[tuple[str, str, float]] = [
            ("pods", name, sum(pod.state in (PodState.RUNNING, PodState.SLOW) for pod in deployment.pods)),
            ("restarts", name, deployment.restarts),
            ("waiting", name, len(deployment.waiting)),
            ("failed", name, sum(report.failed for report in reports)),
            ("rate", name, self.rate[name]),
        ]
        values += [(metric, name, totals[metric]) for metric in rates]
        values += [(f"{metric}/s", name, rate) for metric, rate in rates.items()]
        alive = [pod.report for pod in deployment.pods if pod.report is not None and pod.child is not None]
        gauges: dict[str, float] = {}
        for report in alive:
            for metric, value in report.gauges.items():
                gauges[metric] = max(value, gauges.get(metric, value))
        return [*values, *((metric, name, value) for metric, value in gauges.items())]

    def _grows(self, name: str, metric: str, total: int) -> float:
        """How much a total grows in a second, over the last samples."""
        recent = self._recent.setdefault((name, metric), [])
        recent.append((time.monotonic(), total))
        del recent[:-10]
        (begun, before), (ended, after) = recent[0], recent[-1]
        return (after - before) / (ended - begun) if ended > begun else 0.0

    def _of_group(self, deployment: Deployment) -> list[tuple[str, str, float]]:
        values: list[tuple[str, str, float]] = []
        if deployment.group and deployment.topics:
            short = {topic.name: topic.short for topic in deployment.topics}
            behind = lag(self._reports.topic.cluster, deployment.group, list(short))  # the proxy may be cut
            stuck = {one.place.rpartition("/")[0] for one in deployment.waiting}
            for (topic, number), count in sorted(behind.items()):
                label = f"{short[topic]}/{number}"
                values += [("lag", label, count), ("blocked", label, f"{topic}/{number}" in stuck)]
            values.append(("behind", deployment.name, sum(behind.values())))
        return values

    def _sent(self) -> dict[str, int]:
        """Distinct ids sent to each topic: a load's cell that ran again adds none."""
        for number, load in enumerate(list(self._loads)):
            fresh = load.confirmed_since(self._counted.get(number, 0))
            self._counted[number] = self._counted.get(number, 0) + len(fresh)
            self._ids.setdefault(load.topic.short, set()).update(one.id for one in fresh)
        return {topic: len(ids) for topic, ids in self._ids.items()}
