"""One record's life: who made it, who handled it, what it led to, and what was done to the lab meanwhile.

The evidence is in the lab's topics (a record names its cause and the pod that made it) and in its faults. A handling
shows by what it sent; what leaves no evidence is not told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.kafka.errors import LabkitError
from labkit.kafka.reader import Reader
from labkit.kafka.records import CAUSE, CORRELATION, MADE_BY
from labkit.kafka.topics import Topic, short_name
from labkit.lab.history import Fault
from labkit.lab.load import identifier

if TYPE_CHECKING:
    import pandas as pd

AWAY = ("freeze", "eviction")  # after these a pod goes on with work that others have done meanwhile
ENDS = ("kill", "death", "restart", "redeploy")  # after these a pod of the same name is another process


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


def trace(
    business_id: object, by: str | Callable[[Any], Any], topics: Collection[Topic[Any]], faults: Sequence[Fault]
) -> pd.DataFrame:
    """The life of the records that belong to an id: time (UTC), seconds since its first row, event, place, pod, detail.

    Raises LabkitError when no record has the id.
    """
    import pandas as pd

    made = pd.DataFrame(life(_belonging(business_id, by, topics), faults), columns=Row._fields)
    made.insert(1, "seconds", (made["time"] - made["time"].iloc[0]).round(3))
    return made.assign(time=pd.to_datetime(made["time"], unit="s").dt.round("ms"))


def _belonging(business_id: object, by: str | Callable[[Any], Any], topics: Collection[Topic[Any]]) -> list[Seen]:
    identify, wanted, trouble = identifier(by), str(business_id), ""
    everything: list[Seen] = []
    found: set[str] = set()
    for topic in topics:
        with Reader(topic) as reader:
            for record in reader.read_to_end():
                get = record.headers.get
                everything.append(Seen(record.place, record.timestamp, get(CORRELATION), get(CAUSE), get(MADE_BY)))
                try:
                    if record.value is not None and identify(record.value) == wanted:
                        found.add(record.place)
                except LabkitError:
                    pass  # it has no such id; what led to it may
            trouble += f"; {reader.undecodable}" if reader.poison else ""
    if not found:
        names = ", ".join(topic.short for topic in topics) or "none: lab.topic(…) makes one"
        named = f"{by} {wanted}" if isinstance(by, str) else f"id {wanted}"
        raise LabkitError(f"no record with {named} was ever sent. Looked in these topics of the lab: {names}{trouble}")
    return related(everything, found)


def related(records: Sequence[Seen], places: Collection[str]) -> list[Seen]:
    """The records at these places, those with the same correlation ids, and all that these caused."""
    known = set(places)
    correlations = {one.correlation for one in records if one.place in known} - {None}
    known |= {one.place for one in records if one.correlation in correlations}
    while more := {one.place for one in records if one.cause in known} - known:
        known |= more
    return [one for one in records if one.place in known]


def life(records: Iterable[Seen], faults: Sequence[Fault]) -> list[Row]:
    """What happened to these records, oldest first, and every fault that stood meanwhile."""
    records = sorted(records, key=lambda one: (one.time, one.cause is not None))
    rows: list[Row] = []
    handlings: dict[tuple[str, str], dict[str, float]] = {}  # by cause and deployment: when each pod sent last
    for one in records:
        place, pod = short_name(one.place), one.pod or ""
        if one.cause is None:
            by = "" if pod else "by a load or the notebook, "
            rows.append(Row(one.time, "produced", place, pod, f"{by}correlation-id {one.correlation or 'none'}"))
            continue
        cause = short_name(one.cause)
        sent = handlings.setdefault((one.cause, _deployment(pod)), {})
        if handling := _handling(pod, one.time, sent, faults):
            event, detail = handling
            rows.append(Row(one.time, event, cause, pod, detail))
        sent[pod] = one.time
        rows.append(Row(one.time, "took effect", place, pod, f"caused by {cause}"))
    first, last = records[0].time, records[-1].time if handlings else inf  # a record without outputs may still wait
    for fault in faults:
        if fault.start <= last and _end(fault) >= first:
            rows.append(Row(fault.start, fault.kind, "", fault.target, _told(fault)))
    return sorted(rows, key=lambda row: row.time)


def _handling(pod: str, at: float, sent: Mapping[str, float], faults: Sequence[Fault]) -> tuple[str, str] | None:
    """The handling that a pod's output at this time shows: event and detail. None: it has been shown before."""
    if not sent:
        return "handled", ""
    if pod in sent:
        ends = [fault.end for fault in faults if fault.kind in ENDS and fault.target in (pod, _deployment(pod))]
        restarted = any(end is not None and sent[pod] <= end <= at for end in ends)
        return ("redelivered", f"again: {pod} had it before") if restarted else None
    other, since = next(iter(sent.items()))
    # A pod that was away may only now finish a record that it began before the other pod: no second delivery.
    for fault in faults:
        if fault.kind in AWAY and fault.target == pod and fault.start <= since <= _end(fault):
            return "handled", f"late: it was away when {other} had it"
    return "redelivered", f"again: {other} had it before"


def _deployment(pod: str) -> str:
    return pod.rpartition("-")[0]


def _told(fault: Fault) -> str:
    if fault.instant:
        return fault.text
    return f"{fault.text}, still stands" if fault.end is None else f"{fault.text}, for {fault.end - fault.start:.1f} s"


def _end(fault: Fault) -> float:
    return inf if fault.end is None else fault.end
