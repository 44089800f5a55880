"""One record's life: who made it, who had it in hand, what befell them, what it led to, and who committed it.

Put together from three witnesses: the lab's topics (a record names its cause and the pod that made it), what pods said
of themselves, and the faults. A pod that is killed takes its last 0.2 s of words with it; then what it sent still shows
that it had the record. Nothing is told that none of them shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.kafka.errors import LabkitError
from labkit.kafka.reader import Reader
from labkit.kafka.records import CAUSE, CORRELATION, MADE_BY
from labkit.kafka.topics import Topic, short_name
from labkit.lab.load import identifier
from labkit.lab.metrics import Fault
from labkit.lab.sampler import undecodable
from labkit.lab.telemetry import INTERVAL, Committed, Event, Failed, Handled, PodReport

if TYPE_CHECKING:
    import pandas as pd

ORDER = ("produced", "failed", "handled", "redelivered", "took effect", "committed")  # of what has the same time
AWAY = ("freeze", "eviction", "sleep")  # kinds of faults after which a pod goes on with what others have done meanwhile
EVERYBODY = ("Kafka", "machine")  # targets of faults that meet every pod


class Seen(NamedTuple):
    """A record of one of the lab's topics."""

    place: str
    time: float
    correlation: str | None = None
    cause: str | None = None
    pod: str | None = None


class Row(NamedTuple):
    """One line of a life. `time` is in Unix seconds."""

    time: float
    event: str
    place: str
    pod: str
    detail: str


@dataclass
class Hand:
    """A process that had a record in hand: since when at the latest, and how it ended, if it told."""

    pod: str
    process: int
    began: float
    returned: float | None = None
    failed: Failed | None = None

    @property
    def who(self) -> tuple[str, int]:
        return self.pod, self.process

    @property
    def ended(self) -> float:
        return self.failed.time if self.failed else self.returned or inf


@dataclass
class Witness:
    """What a deployment told of one record."""

    deployment: str
    hands: list[Hand] = field(default_factory=list)
    committed: tuple[str, int, Committed] | None = None
    born: dict[tuple[str, int], float] = field(default_factory=dict)
    """When each process of a pod first spoke."""
    held: list[tuple[str, float, float]] = field(default_factory=list)
    """Which pod had the record's partition: from, until."""


def trace(
    business_id: object, by: str | Callable[[Any], Any], topics: Collection[Topic[Any]], telemetry: Topic[PodReport]
) -> tuple[list[Seen], list[PodReport]]:
    """The records that belong to an id, and what the pods have said. Raises LabkitError when no record has the id."""
    identify, wanted, trouble = identifier(by), str(business_id), ""
    everything: list[Seen] = []
    found: set[str] = set()
    for topic in topics:
        with Reader(topic) as reader:
            for record in reader.rest():
                headers = record.headers
                get = headers.get
                everything.append(Seen(record.place, record.timestamp, get(CORRELATION), get(CAUSE), get(MADE_BY)))
                try:
                    if record.value is not None and identify(record.value) == wanted:
                        found.add(record.place)
                except LabkitError:
                    pass  # it has no such id; what led to it may
            trouble += f"; {undecodable(reader)}" if reader.poison else ""
    if not found:
        names = ", ".join(topic.short for topic in topics) or "none: lab.topic(…) makes one"
        named = f"{by} {wanted}" if isinstance(by, str) else f"id {wanted}"
        raise LabkitError(f"no record with {named} was ever sent. Looked in these topics of the lab: {names}{trouble}")
    with Reader(telemetry) as reports:
        return related(everything, found), [record.value for record in reports.rest()]


def related(records: Sequence[Seen], places: Collection[str]) -> list[Seen]:
    """The records at these places, those with their correlation ids, and all that any of them caused."""
    known = set(places)
    correlations = {one.correlation for one in records if one.place in known} - {None}
    known |= {one.place for one in records if one.correlation in correlations}
    while more := {one.place for one in records if one.cause in known} - known:
        known |= more
    return [one for one in records if one.place in known]


def life(records: Sequence[Seen], reports: Iterable[PodReport], faults: Sequence[Fault]) -> list[Row]:
    """What happened to these records, oldest first."""
    reports = sorted(reports, key=lambda report: report.time)
    places = {one.place for one in records}
    rows: dict[Row, None] = {}  # a fault may have met several of them
    first, last = min(one.time for one in records), 0.0
    for one in records:
        rows[_made(one, places)] = None
        witnesses = list(_witnesses(one, [effect for effect in records if effect.cause == one.place], reports))
        for witness in witnesses:
            rows.update(dict.fromkeys(_told(one, witness, faults)))
            end = witness.committed[2].time if witness.committed else inf
            last = max(last, end)
            for fault in faults:
                if _met(fault, one, witness, end):
                    pod = "" if fault.target == witness.deployment else fault.target
                    rows[_of_fault(fault, short_name(one.place), pod, first)] = None
    last = max(last or inf, *(row.time for row in rows))
    for fault in faults:
        if fault.target in EVERYBODY and fault.start <= last and _end(fault) >= first:
            rows[_of_fault(fault, "", fault.target, first)] = None
    rank = {event: number for number, event in enumerate(ORDER)}
    return sorted(rows, key=lambda row: (row.time, rank.get(row.event, 0.5)))


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """A life as a table: time (UTC), seconds since its first event, event, place, pod, detail."""
    import pandas as pd

    made = pd.DataFrame(rows, columns=Row._fields)
    made.insert(1, "seconds", (made["time"] - made["time"].iloc[0]).round(3))
    return made.assign(time=pd.to_datetime(made["time"], unit="s").dt.round("ms"))


def _made(one: Seen, places: Collection[str]) -> Row:
    if one.cause in places and one.cause is not None:
        return Row(one.time, "took effect", short_name(one.place), one.pod or "", f"caused by {short_name(one.cause)}")
    detail = f"{'' if one.pod else 'by a load or the notebook, '}correlation-id {one.correlation or 'none'}"
    return Row(one.time, "produced", short_name(one.place), one.pod or "", detail)


def _witnesses(one: Seen, effects: Sequence[Seen], reports: Sequence[PodReport]) -> Iterator[Witness]:
    """What each deployment that had the record, or its partition, told of it; `reports` are in the order of time."""
    partition, _, number = one.place.rpartition("/")
    offset = int(number)
    found: dict[str, Witness] = {}
    events: dict[tuple[str, str, int, Event], None] = {}  # some reports had to be repeated
    holds: dict[str, tuple[str, float]] = {}
    for report in reports:
        witness = found.setdefault(report.deployment, Witness(report.deployment))
        witness.born.setdefault((report.pod, report.process), report.time)
        if report.pod in holds:
            name, since = holds.pop(report.pod)
            found[name].held.append((report.pod, since, report.time))
        if partition in report.assigned and report.state == "running":  # it got them since it looked last
            holds[report.pod] = report.deployment, report.time - 2 * INTERVAL
        for event in report.events:
            match event:
                case Handled(at, low, high) if at == partition and low <= offset <= high:
                    pass
                case Failed(place) if place == one.place:
                    pass
                case Committed(at, position) if at == partition and position > offset:
                    pass
                case _:
                    continue
            events[report.deployment, report.pod, report.process, event] = None
    for pod, (name, since) in holds.items():
        found[name].held.append((pod, since, inf))
    for name, pod, process, event in sorted(events, key=lambda each: each[3].time):
        witness = found[name]
        match event:
            case Handled():
                witness.hands.append(Hand(pod, process, event.time, returned=event.time))
            case Failed():
                witness.hands.append(Hand(pod, process, event.time, failed=event))
            case Committed():
                witness.committed = witness.committed or (pod, process, event)
    for effect in sorted(effects, key=lambda each: each.time):
        name = (effect.pod or "").rpartition("-")[0]
        if effect.pod and name:
            _shown(effect.pod, effect.time, found.setdefault(name, Witness(name)))
    return (each for each in found.values() if each.hands or each.committed or each.held)


def _shown(pod: str, at: float, witness: Witness) -> None:
    """A record that `pod` sent shows that it had the cause of it in hand, whether it told of that or not."""
    lives = [(born, process) for (name, process), born in witness.born.items() if name == pod and born <= at]
    process = max(lives)[1] if lives else 0
    later = [hand for hand in witness.hands if hand.who == (pod, process) and hand.ended >= at]
    hand = min(later, key=lambda hand: hand.ended, default=None)
    if hand is None:
        witness.hands.append(Hand(pod, process, at))
    elif not hand.failed:  # sent in an attempt that failed: its row tells
        hand.began = min(hand.began, at)


def _told(one: Seen, witness: Witness, faults: Sequence[Fault]) -> Iterator[Row]:
    """The rows of one deployment."""
    place, hands = short_name(one.place), witness.hands
    for each in hands:
        if failed := each.failed:
            after = "not tried again" if failed.again_after is None else f"again in {failed.again_after:g} s"
            yield Row(failed.time, "failed", place, each.pod, f"attempt {failed.attempt}, {after}: {failed.error}")
            continue
        before = [hand for hand in hands if hand.began < each.began and (hand.returned or hand.who != each.who)]
        first = min(before, key=lambda hand: hand.began, default=None)
        # A pod that had been away may only now be done with what it had in hand before the other: no second delivery.
        late = first is not None and any(_away(fault, each.pod, first.began) for fault in faults)
        details = []
        if first is not None:
            had = f"late: it was away when {first.pod} had it" if late else f"again: {first.pod} had it before"
            details.append(had)
        if each.returned is None:
            details.append("shown by what it sent: it did not tell that the handler returned")
        elif each.returned - each.began > 2 * INTERVAL:
            details.append(f"the handler returned {each.returned - each.began:.1f} s later")
        yield Row(each.began, "redelivered" if first and not late else "handled", place, each.pod, "; ".join(details))
    if witness.committed:
        pod, process, done = witness.committed
        if any(hand.who == (pod, process) for hand in hands):
            yield Row(done.time, "committed", place, pod, "")
        else:
            told = f"at the latest then: {pod} committed all before {short_name(done.partition)}/{done.position}"
            yield Row(done.time, "committed", place, "", told)


def _met(fault: Fault, one: Seen, witness: Witness, end: float) -> bool:
    """Whether a fault met a pod of this deployment while it had the record in hand: sent, and not committed."""
    since, until = max(fault.start, one.time), min(_end(fault), end)
    if since > until:
        return False
    held = list(witness.held)
    for hand in witness.hands:
        later = [born for (pod, _), born in witness.born.items() if pod == hand.pod and born > hand.began]
        held.append((hand.pod, hand.began, min(later, default=inf)))
    holders = {pod for pod, low, high in held if low <= until and high >= since}
    return fault.target in holders or (fault.target == witness.deployment and bool(holders))


def _of_fault(fault: Fault, place: str, pod: str, first: float) -> Row:
    told = [fault.text]
    if fault.start < first:
        told.append(f"since {_clock(fault.start)}")
    if not fault.instant:
        told.append("still stands" if fault.end is None else f"until {_clock(fault.end)}")
    return Row(max(fault.start, first), fault.kind, place, pod, ", ".join(told))


def _away(fault: Fault, pod: str, at: float) -> bool:
    return fault.kind in AWAY and fault.target in (pod, "machine") and fault.start <= at <= _end(fault)


def _end(fault: Fault) -> float:
    return inf if fault.end is None else fault.end


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(moment))
