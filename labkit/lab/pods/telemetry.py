"""What only a pod knows: how much it handled, what it retries, since when. It has a topic of its own.

Everything else a board shows is read from Kafka itself, so the picture cannot disagree with the truth.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import msgspec

from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import DeliveryFailed, error_text
from labkit.kafka.producer import Producer
from labkit.kafka.records import encode
from labkit.kafka.topics import Topic

INTERVAL = 0.2  # seconds between two reports
AGAIN = 2.0  # seconds after which an unchanged report is sent again, because it may be lost
HANDLING, HANDLED = Step.HANDLING, Step.HANDLED  # looking up a member of an enum for every record is slow
UNHEARD = 7.0  # seconds: a member that lost its partitions sent no heartbeat for longer than its session


class Waiting(msgspec.Struct):
    """A record in a lane that backs off."""

    place: str
    attempt: int
    since: float
    error: str


class PodReport(msgspec.Struct):
    """What a pod is doing. Counts are since this process started."""

    deployment: str
    pod: str
    process: int
    time: float
    handled: int = 0
    failed: int = 0
    lost: int = 0
    """How often its partitions were given to others because it sent no heartbeat."""
    away: float = 0.0
    """Since when it had sent no heartbeat, the last time."""
    assigned: list[str] = []
    waiting: list[Waiting] = []
    counts: dict[str, int] = {}
    gauges: dict[str, float] = {}
    """What it measured (see `Measured`)."""


class Telemetry:
    """Collects the steps of one running pod and sends a PodReport whenever something changed, and every two seconds.

    Once `stop` is set, records are not delayed any more, so a slow pod drains as quickly as others.
    """

    def __init__(
        self, topic: Topic[PodReport], deployment: str, pod: str, process: int, stop: threading.Event | None = None
    ) -> None:
        self.topic = topic
        self._stop = stop or threading.Event()
        self.slow = 0.0
        """Seconds by which every record is delayed: the fault "slow"."""
        self._report = PodReport(deployment, pod, process, time.time())
        self._awake = time.time()  # when this process ran last
        self._pause = (0.0, 0.0)  # when it was last stopped, or got no CPU time: from, until
        self._waiting: dict[str, Waiting] = {}
        self._assigned: set[str] = set()
        self._done: list[None] = []  # one for each record handled since the last report: appended to without the lock
        self._lock = threading.Lock()
        self._over = threading.Event()
        # A producer of its own: a telemetry record that is not delivered must not hold up a commit. Not idempotent: the
        # first report, by which a pod counts as running, would wait for up to a second; and the newest one wins anyway.
        self._producer = Producer(topic.cluster, timeout=5.0, idempotent=False)
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def __call__(self, step: Step, subject: Any) -> None:
        """The pod's `report`."""
        if step is HANDLED:  # these two come with every record
            self._done.append(None)
        elif step is HANDLING:
            if self.slow:
                self._stop.wait(self.slow)
        elif step is Step.FAILED:
            with self._lock:
                self._report.failed += 1
        elif step is Step.BLOCKED:
            error = error_text(subject.refused or subject.error)
            with self._lock:
                self._waiting[subject.place] = Waiting(subject.place, subject.attempt, subject.since, error)
        elif step is Step.RECOVERED:
            with self._lock:
                self._waiting.pop(subject.place, None)
        elif step is Step.MEASURED:
            counts = {name: int(count) for name, count in subject.counts.items()}
            gauges = {name: float(value) for name, value in subject.gauges.items()}
            known = {name: value for name, value in gauges.items() if math.isfinite(value)}
            encode((counts, known))  # raises in the code that measures, not in the thread that sends
            with self._lock:
                self._report.counts.update(counts)
                for name in gauges.keys() - known:  # JSON has no NaN: an unknown figure is left out
                    self._report.gauges.pop(name, None)
                self._report.gauges.update(known)
        elif step is Step.ASSIGNED:
            with self._lock:
                self._assigned |= {f"{topic}/{number}" for topic, number, _ in subject}
        elif step in (Step.REVOKED, Step.LOST):
            with self._lock:
                self._assigned -= {f"{topic}/{number}" for topic, number in subject}
                if step is Step.LOST and subject:
                    self._report.lost += 1
                    self._report.away = self._unheard_since(time.time())

    def close(self) -> None:
        """Send the last word."""
        self._over.set()
        self._thread.join(2)
        self._send(self._now())
        try:
            self._producer.flush(2)
        except DeliveryFailed:
            pass  # the pod ends all the same

    def _unheard_since(self, now: float) -> float:
        stopped, went_on = self._pause
        return min(now - UNHEARD, self._awake, stopped if now - went_on < UNHEARD else now)

    def _run(self) -> None:
        sent: PodReport | None = None
        while True:
            with self._lock:
                before, self._awake = self._awake, time.time()
                if self._awake - before > 5 * INTERVAL:
                    self._pause = (before, self._awake)
            now = self._now()
            if sent is None or now.time - sent.time >= AGAIN or msgspec.structs.replace(now, time=sent.time) != sent:
                self._send(now)
                sent = now
            if self._over.wait(INTERVAL):
                return

    def _now(self) -> PodReport:
        with self._lock:
            new = len(self._done)
            del self._done[:new]
            self._report.handled += new
            return msgspec.structs.replace(
                self._report,
                time=time.time(),
                assigned=sorted(self._assigned),
                waiting=list(self._waiting.values()),
                counts=dict(self._report.counts),
                gauges=dict(self._report.gauges),
            )

    def _send(self, report: PodReport) -> None:
        try:
            self._producer.send(self.topic.name, encode(report), self._report.pod)
        except DeliveryFailed:
            pass  # it is sent again
