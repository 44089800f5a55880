"""What only a pod knows: how much it handled, what it tries again, since when. It goes through a topic of its own.

Everything else a board shows is read from Kafka itself, so the picture cannot disagree with the truth.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec

from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.producer import Producer
from labkit.kafka.records import encode
from labkit.kafka.steps import Failure, Retry, Step
from labkit.kafka.topics import Topic

INTERVAL = 0.2  # seconds between two reports
UNHEARD = 7.0  # seconds that a member was not heard of when it is told that it lost its partitions: a session, and more


class Waiting(msgspec.Struct):
    """A record in a lane that backs off."""

    place: str
    attempt: int
    since: float
    next_attempt: float
    error: str


class PodReport(msgspec.Struct):
    """What a pod is doing. Counts are since this process started."""

    deployment: str
    pod: str
    process: int
    time: float
    state: str = "running"
    handled: int = 0
    failed: int = 0
    lost: int = 0
    """How often its partitions were given to others because it was not heard of."""
    away: float = 0.0
    """Since when it was not heard of, the last time."""
    assigned: list[str] = []
    waiting: list[Waiting] = []


class Telemetry:
    """Collects the steps of one running pod and sends a PodReport whenever something changed."""

    def __init__(self, topic: Topic[PodReport], deployment: str, pod: str, process: int) -> None:
        self.topic = topic
        self.slow = 0.0
        """Seconds by which every record is held up: the fault "slow"."""
        self._report = PodReport(deployment, pod, process, time.time())
        self._handled = self._failed = self._lost = 0
        self._away = 0.0
        self._awake = time.time()  # when this process last had a say
        self._pause = (0.0, 0.0)  # the last time it was stopped, or starved: from, until
        self._waiting: dict[str, Waiting] = {}
        self._assigned: set[str] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        # A producer of its own: a telemetry record that is not delivered must not hold up a commit. Not idempotent: the
        # first report, by which a pod counts as running, would wait for up to a second; and the newest one wins anyway.
        self._producer = Producer(topic.cluster, timeout=5.0, idempotent=False)
        self._refused = 0
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def __call__(self, step: Step, subject: Any) -> None:
        """The pod's `report`."""
        if step is Step.HANDLING:
            if self.slow:
                self._over.wait(self.slow)
        elif step is Step.HANDLED:
            with self._lock:
                self._handled += 1
        elif step is Step.FAILED:
            self._note(subject)
        elif step is Step.RECOVERED:
            with self._lock:
                self._waiting.pop(subject.place, None)
        elif step is Step.ASSIGNED:
            with self._lock:
                self._assigned |= {f"{topic}/{number}" for topic, number, _ in subject}
        elif step in (Step.REVOKED, Step.LOST):
            with self._lock:
                self._assigned -= {f"{topic}/{number}" for topic, number in subject}
                if step is Step.LOST and subject:
                    self._lost, self._away = self._lost + 1, self._unheard_since(time.time())

    def close(self, state: str) -> None:
        """Send the last word: "stopped" or "failed"."""
        self._over.set()
        self._thread.join(2)
        self._send(state)
        try:
            self._producer.flush(2)
        except DeliveryFailed:
            pass  # the pod ends all the same; whoever keeps it sees its exit code

    def _note(self, failure: Failure) -> None:
        with self._lock:
            self._failed += 1
            if isinstance(failure.decision, Retry):
                error = f"{type(failure.error).__name__}: {failure.error}"[:500]
                due = time.time() + failure.decision.after
                self._waiting[failure.place] = Waiting(failure.place, failure.attempt, failure.since, due, error)

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
            now = self._now("running")
            if self._undelivered():
                sent = None
            if sent is None or msgspec.structs.replace(now, time=sent.time) != sent:
                self._send("running")
                sent = now
            if self._over.wait(INTERVAL):
                return

    def _now(self, state: str) -> PodReport:
        with self._lock:
            return msgspec.structs.replace(
                self._report,
                time=time.time(),
                state=state,
                handled=self._handled,
                failed=self._failed,
                lost=self._lost,
                away=self._away,
                assigned=sorted(self._assigned),
                waiting=list(self._waiting.values()),
            )

    def _send(self, state: str) -> None:
        try:
            self._producer.send(self.topic.name, encode(self._now(state)), self._report.pod)
        except DeliveryFailed:
            pass  # see _undelivered

    def _undelivered(self) -> bool:
        """Whether a report was lost since the last look, to a broker that was away: then it is to be said again."""
        self._producer.unconfirmed(0)  # only so does the client tell
        lost, self._refused = self._producer.refused - self._refused, self._producer.refused
        return lost > 0
