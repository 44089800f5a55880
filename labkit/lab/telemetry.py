"""What only a pod knows: how much it handled, what it tries again, since when. It goes through a topic of its own.

Everything else a board shows is read from Kafka itself, so the picture cannot disagree with the truth.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any, TypeAlias

import msgspec

from labkit.kafka.consumer.failures import FailedRecord, Retry
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import DeliveryFailed, error_text
from labkit.kafka.producer import Producer
from labkit.kafka.records import encode
from labkit.kafka.topics import Topic

INTERVAL = 0.2  # seconds between two reports
EVENTS = 1000  # at most in one report, which must stay smaller than a record may be: the rest goes with the next ones
HANDLING, HANDLED = Step.HANDLING, Step.HANDLED  # a member of an enum is slow to look up, for every record
UNHEARD = 7.0  # seconds that a member was not heard of when it is told that it lost its partitions: a session, and more


class Waiting(msgspec.Struct):
    """A record in a lane that backs off."""

    place: str
    attempt: int
    since: float
    next_attempt: float
    error: str


class Handled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Records of one partition whose handler returned: the offsets `first` to `last`, by `time`."""

    partition: str
    """`topic/partition`."""
    first: int
    last: int
    time: float


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One failed attempt at one record."""

    place: str
    attempt: int
    time: float
    error: str
    again_after: float | None
    """Seconds until the next attempt. None: the consumer does not try it again."""


class Committed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The broker has confirmed that all of a partition before `position` is done."""

    partition: str
    position: int
    time: float


Event: TypeAlias = Handled | Failed | Committed


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
    counts: dict[str, int] = {}
    gauges: dict[str, float] = {}
    """What it measured (see `Measured`)."""
    events: list[Event] = []
    """What happened since the report before. In a report that had to be repeated, the same ones again."""


class Telemetry:
    """Collects the steps of one running pod and sends a PodReport whenever something changed.

    Once `stop` is set, nothing is held up any more: a slow pod drains as soon as another one.
    """

    def __init__(
        self, topic: Topic[PodReport], deployment: str, pod: str, process: int, stop: threading.Event | None = None
    ) -> None:
        self.topic = topic
        self._stop = stop or threading.Event()
        self.slow = 0.0
        """Seconds by which every record is held up: the fault "slow"."""
        self._report = PodReport(deployment, pod, process, time.time())
        self._handled = self._failed = self._lost = 0
        self._away = 0.0
        self._awake = time.time()  # when this process last had a say
        self._pause = (0.0, 0.0)  # the last time it was stopped, or starved: from, until
        self._waiting: dict[str, Waiting] = {}
        self._assigned: set[str] = set()
        self._counts: dict[str, int] = {}
        self._gauges: dict[str, float] = {}
        self._done: deque[tuple[str, int, int]] = deque()  # handled: appended to without the lock, for every record
        self._events: deque[Event] = deque(maxlen=10 * EVENTS)  # to be sent
        self._said: deque[Event] = deque(maxlen=10 * EVENTS)  # sent, and perhaps not delivered
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
        if step is HANDLED:  # the two that come with every record
            self._done.append((subject.topic, subject.partition, subject.offset))
        elif step is HANDLING:
            if self.slow:
                self._stop.wait(self.slow)
        elif step is Step.FAILED:
            self._note(subject)
        elif step is Step.BLOCKED:
            error = error_text(subject.refused or subject.error)
            with self._lock:
                self._waiting[subject.place] = Waiting(
                    subject.place, subject.attempt, subject.since, subject.due, error
                )
        elif step is Step.RECOVERED:
            with self._lock:
                self._waiting.pop(subject.place, None)
        elif step is Step.COMMITTED:
            with self._lock:
                now = time.time()
                self._gather(now)  # what is committed was handled before
                for (topic, number), offset in subject.items():
                    self._events.append(Committed(f"{topic}/{number}", offset, now))
        elif step is Step.MEASURED:
            counts = {name: int(count) for name, count in subject.counts.items()}
            gauges = {name: float(value) for name, value in subject.gauges.items()}
            known = {name: value for name, value in gauges.items() if math.isfinite(value)}
            encode((counts, known))  # whoever measured hears of what cannot be written, not the thread that sends it
            with self._lock:
                self._counts.update(counts)
                for name in gauges.keys() - known:  # JSON has no NaN: what is not known now is left out
                    self._gauges.pop(name, None)
                self._gauges.update(known)
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
        while True:
            last = self._now(state)
            self._send(last)
            if len(last.events) < EVENTS:
                break
        try:
            self._producer.flush(2)
        except DeliveryFailed:
            pass  # the pod ends all the same; whoever keeps it sees its exit code

    def _note(self, failed: FailedRecord) -> None:
        after = failed.decision.after if isinstance(failed.decision, Retry) else None
        with self._lock:
            self._failed += 1
            self._events.append(
                Failed(failed.place, failed.attempt, time.time(), error_text(failed.error)[:200], after)
            )

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
            if self._undelivered():
                sent = None
            now = self._now("running")
            if sent is None or msgspec.structs.replace(now, time=sent.time) != sent:
                self._send(now)
                sent = msgspec.structs.replace(now, events=[])
            if self._over.wait(INTERVAL):
                return

    def _gather(self, now: float) -> None:
        """Make events of the offsets that were handled. The lock is held."""
        done: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for _ in range(len(self._done)):
            topic, number, offset = self._done.popleft()
            done[topic, number].append(offset)
            self._handled += 1
        for (topic, number), offsets in done.items():
            for first, last in ranges(offsets):
                self._events.append(Handled(f"{topic}/{number}", first, last, now))

    def _now(self, state: str) -> PodReport:
        """A report, with the events that are to go with it."""
        with self._lock:
            now = time.time()
            self._gather(now)
            events = list(islice(self._events, EVENTS))
            for _ in events:
                self._events.popleft()
            self._said += events
            return msgspec.structs.replace(
                self._report,
                time=now,
                state=state,
                handled=self._handled,
                failed=self._failed,
                lost=self._lost,
                away=self._away,
                assigned=sorted(self._assigned),
                waiting=list(self._waiting.values()),
                counts=dict(self._counts),
                gauges=dict(self._gauges),
                events=events,
            )

    def _send(self, report: PodReport) -> None:
        try:
            self._producer.send(self.topic.name, encode(report), self._report.pod)
        except DeliveryFailed:
            pass  # see _undelivered

    def _undelivered(self) -> bool:
        """Whether a report was lost since the last look, to a broker that was away: then it is to be said again."""
        left = self._producer.unconfirmed(0)  # only so does the client tell
        lost, self._refused = self._producer.refused - self._refused, self._producer.refused
        with self._lock:
            if lost > 0:
                self._events = deque([*self._said, *self._events], self._events.maxlen)
            if lost > 0 or not left:
                self._said.clear()
        return lost > 0


def ranges(offsets: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first and last of each unbroken run among `offsets`, in their order."""
    run: tuple[int, int] | None = None
    for offset in sorted(offsets):
        if run is not None and offset <= run[1] + 1:
            run = (run[0], offset)
        else:
            if run is not None:
                yield run
            run = (offset, offset)
    if run is not None:
        yield run


class Repeats:
    """Counts what pods handled again, from their reports. What a pod did not tell before it died is not known."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """By deployment: records whose handler had returned before, in whatever pod."""
        self._runs: dict[tuple[str, str], list[tuple[int, int]]] = {}  # handled; apart from each other, and in order
        self._heard: dict[tuple[str, str, int], dict[Handled, None]] = {}  # by process: its newest events

    def add(self, report: PodReport) -> None:
        """Take in a report. Events that were told before, as their delivery was in doubt, count once."""
        process = (report.deployment, report.pod, report.process)
        heard = self._heard.setdefault(process, {})
        for event in report.events:
            if isinstance(event, Handled) and event not in heard:
                heard[event] = None
                runs = self._runs.setdefault((report.deployment, event.partition), [])
                again = merge(runs, event.first, event.last)
                self.counts[report.deployment] = self.counts.get(report.deployment, 0) + again
        for old in list(islice(heard, max(0, len(heard) - 10 * EVENTS))):  # as many as a pod tells again
            del heard[old]


def merge(runs: list[tuple[int, int]], first: int, last: int) -> int:
    """Add a run of offsets to `runs`, which are apart from each other and in order; how many were in there already."""
    low = bisect_left(runs, first - 1, key=itemgetter(1))
    high = bisect_right(runs, last + 1, key=itemgetter(0))
    again = sum(max(0, min(last, end) - max(first, begin) + 1) for begin, end in runs[low:high])
    if low < high:
        first, last = min(first, runs[low][0]), max(last, runs[high - 1][1])
    runs[low:high] = [(first, last)]
    return again
