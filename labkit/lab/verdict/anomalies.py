"""How a verdict judges: it classifies, by evidence, each difference between what was sent and what took effect.

- In a partition the offset says what came first, whatever the clocks say. Between two partitions only clocks can
  tell. The logs show by how much clocks disagree, and no order is claimed within that time.
- A redelivery has a cause: something (a crash, a freeze, a rebalance …) between a record's two handlings.
- A send that was never confirmed may have arrived or not: it is neither lost nor unexpected.
"""

from __future__ import annotations

import reprlib
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.kafka.effects import Effect, Sent

if TYPE_CHECKING:
    from labkit.lab.history import Fault

WRONG = ("lost", "duplicated", "out of order", "early", "wrong", "unexpected")  # in the order of a verdict's line
# "sent again": `sent` lists its id often enough. "resent": it does not, but another source record made it.
HARMLESS = ("rejected", "redelivered", "sent again", "resent")
# For so many seconds after its end a fault still moves partitions: the group's session has to end (6 s), then the pod
# restarts with back-off and joins again, each with a rebalance.
AFTERMATH = 30.0
# One pod does a record twice only if it was restarted, or lost its partition, in between; otherwise one handling sent
# twice. So the fault has to lie between the two. One second more, because a fault is noted before it acts.
SAME_POD = 1.0
NOTED = 0.2  # seconds from the moment at which a fault is noted until it acts
STRIKE = ("kill", "death", "freeze", "eviction", "restart")  # and not "slow", which takes nothing away


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One difference. `place`: of the effect in question; `first_…`: of the effect that it is compared with."""

    kind: str  # one of WRONG (as "maybe lost" … in an unknown verdict), or of HARMLESS
    id: str
    key: str | None
    explanation: str
    place: str | None = None
    first_place: str | None = None
    first_pod: str | None = None
    fault: Fault | None = None  # what explains a redelivery

    def __str__(self) -> str:
        places = [self.place, self.first_place and f"first {self.first_place}"]
        return f"{self.id} ({', '.join(filter(None, places))})" if self.place else self.id


class _Moment(NamedTuple):
    """An effect's place in time: these sort in the order things took effect."""

    at: float  # never earlier than a lower offset of the same log
    log: str
    offset: int
    number: int  # unique, so that effects are never compared
    effect: Effect


class Timeline:
    """Effects in the order of time: the first of each id, and all effects of ids that have several."""

    def __init__(self, effects: Sequence[Effect]) -> None:
        self.effects, self.gap = effects, 0.0  # gap: by how many seconds clocks disagree at most
        self.first: dict[str, _Moment] = {}
        self.several: dict[str, list[_Moment]] = {}
        logs: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, effect in enumerate(effects):
            log, _, offset = effect.place.rpartition("/")
            if not (offset.isdecimal() and log.rpartition("/")[2].isdecimal()):
                log, offset = effect.place, "0"  # a row is a log of its own
            logs[log].append((int(offset), number))
        for log, entries in logs.items():
            latest = float("-inf")
            for position, number in sorted(entries):
                effect = effects[number]
                self.gap, latest = max(self.gap, latest - effect.time), max(latest, effect.time)
                moment = _Moment(latest, log, position, number, effect)
                if (first := self.first.setdefault(effect.id, moment)) is not moment:
                    self.several.setdefault(effect.id, [first]).append(moment)
        for name, moments in self.several.items():
            moments[:] = sorted({moment.effect.place: moment for moment in moments}.values())
            self.first[name] = moments[0]


def find(
    wanted: Mapping[str, Sent],
    repeats: Mapping[str, int],
    confirmed: set[str],
    line: Timeline,
    faults: Iterable[Fault],
    ordered: bool,
) -> list[Anomaly]:
    """All anomalies. `wanted`: the first send of each id, in order; `repeats`: how often more."""
    found = _lost(wanted, confirmed, line.first)
    found += _extras(line, wanted, repeats, sorted(faults, key=lambda fault: fault.start))
    found += _disorder(line, wanted) if ordered else []
    unknown = line.first.keys() - wanted.keys()
    strange = sorted(moment for name in unknown for moment in line.several.get(name, [line.first[name]]))
    return found + [_anomaly("unexpected", moment.effect, "an id that was never sent") for moment in strange]


def differences(
    wanted: Mapping[str, Sent],
    confirmed: set[str],
    content: Mapping[str, Any],
    values: Mapping[str, Any] | None,
) -> list[Anomaly]:
    """The anomalies of a content, by id. `values`: the expected values, if they are known."""
    found = _lost(wanted, confirmed, content)
    for name, value in (values or {}).items():
        if name in content and content[name] != value:
            why = f"{reprlib.repr(content[name])} instead of {reprlib.repr(value)}"
            found.append(Anomaly("wrong", name, None, why))
    never = "an id that was never sent, or was deleted"
    return found + [Anomaly("unexpected", name, None, never) for name in content if name not in wanted]


def _lost(wanted: Mapping[str, Sent], confirmed: set[str], there: Container[str]) -> list[Anomaly]:
    missing = (send for send in wanted.values() if send.id in confirmed and send.id not in there)
    return [Anomaly("lost", send.id, send.key, "confirmed, has not taken effect") for send in missing]


def _extras(
    line: Timeline, wanted: Mapping[str, Sent], repeats: Mapping[str, int], faults: Sequence[Fault]
) -> list[Anomaly]:
    """Every effect but the first of its id, classified by its cause and by what happened in between."""
    found = []
    made: defaultdict[str | None, set[str]] = defaultdict(set)  # the ids that one source record made
    for effect in line.effects if line.several else ():
        made[effect.cause].add(effect.id)
    for name in sorted(line.several.keys() & wanted.keys(), key=lambda name: wanted[name].order):
        first, *extras = line.several[name]
        last, seen, spare = first, {first.effect.cause: first}, repeats[name]
        for moment in extras:
            effect = moment.effect
            # An unknown cause is taken for the same record, because nothing shows another one.
            earlier = last if effect.cause is None else seen.get(effect.cause, seen.get(None))
            before = (earlier or first).effect
            if earlier is None:
                spare -= 1
                kind = "sent again" if spare >= 0 else "resent"
                why = f"source records {before.cause} and {effect.cause}"
                if spare < 0 and made[before.cause] != made[effect.cause]:
                    kind, why = "duplicated", f"mixed up: {why} made different ids"
                found.append(_anomaly(kind, effect, why, before))
            else:
                at = moment.at if moment.log == earlier.log else moment.at + line.gap
                if fault := _explaining(faults, before, effect, at):
                    found.append(_anomaly("redelivered", effect, _since(fault, effect), before, fault))
                else:
                    why = f"pod {effect.pod}, {effect.time - before.time:.1f} s later: no fault in between"
                    found.append(_anomaly("duplicated", effect, why, before))
            seen[effect.cause] = last = moment
    return found


def _explaining(faults: Sequence[Fault], before: Effect, effect: Effect, at: float) -> Fault | None:
    """The fault that could have caused the redelivery: the last one that struck the pod which handled the record first,
    else the last one within reach."""
    reach = SAME_POD if effect.pod is not None and effect.pod == before.pod else AFTERMATH
    since = min(before.time, effect.time)

    def ended(fault: Fault) -> float:
        return float("inf") if fault.end is None else fault.end

    near = [fault for fault in faults if fault.start <= at and ended(fault) + reach >= since]
    struck = [fault for fault in near if ended(fault) + NOTED >= since and _strikes(fault, before.pod)]
    return struck[-1] if struck else near[-1] if near else None


def _strikes(fault: Fault, pod: str | None) -> bool:
    """Whether a fault takes away from a pod the records that it handles."""
    if pod is None:
        return False
    everywhere = fault.target in ("Kafka", "machine") or fault.target == pod.rpartition("-")[0]
    return everywhere or (fault.target == pod and fault.kind in STRIKE)


def _since(fault: Fault, effect: Effect) -> str:
    over = fault.end is not None and fault.start < fault.end < effect.time
    after, since = ("after the end of", fault.end or 0.0) if over else ("after", fault.start)
    return f"pod {effect.pod}, {max(effect.time - since, 0.0):.1f} s {after}: {fault.text}"


def _disorder(line: Timeline, wanted: Mapping[str, Sent]) -> list[Anomaly]:
    """The smallest set of first effects that would have to move so that each key is in the order of sending."""
    keys: defaultdict[str, list[_Moment]] = defaultdict(list)
    for send in wanted.values():
        if send.key is not None and send.confirmed and send.id in line.first:
            keys[send.key].append(line.first[send.id])
    found = []
    for key, moments in keys.items():
        logs: defaultdict[str, list[_Moment]] = defaultdict(list)
        for moment in moments:
            logs[moment.log].append(moment)
        pairs = [pair for log in logs.values() for pair in _misplaced(log, [moment.offset for moment in log])]
        wrong = {moment for moment, _ in pairs}
        rest = [moment for moment in moments if moment not in wrong]
        between = _misplaced(rest, [moment.at for moment in rest])
        pairs += [(moment, other) for moment, other in between if abs(moment.at - other.at) > line.gap]
        for (*_, effect), (*_, before) in pairs:
            late = wanted[effect.id].order < wanted[before.id].order
            why = f"done after {before.id}, sent later" if late else f"done before {before.id}, sent earlier"
            found.append(_anomaly("out of order", effect._replace(key=key), why, before))
    return found


def _misplaced(moments: Sequence[_Moment], ranks: Sequence[float]) -> Iterator[tuple[_Moment, _Moment]]:
    """The moments outside the longest rising run of `ranks`, each with one of the run that it is late or early for."""
    if all(a <= b for a, b in pairwise(ranks)):
        return
    tops: list[float] = []  # the lowest rank that ends a run of each length, and its owner
    ends: list[int] = []
    previous = []
    for index, rank in enumerate(ranks):
        length = bisect_right(tops, rank)
        previous.append(ends[length - 1] if length else -1)
        tops[length : length + 1], ends[length : length + 1] = [rank], [index]
    run = [ends[-1]]
    while previous[run[-1]] >= 0:
        run.append(previous[run[-1]])
    run.reverse()
    for index in sorted(set(range(len(ranks))) - set(run)):
        place = bisect_left(run, index)
        late = place < len(run) and ranks[run[place]] < ranks[index]
        yield moments[index], moments[run[place if late else place - 1]]


def _anomaly(kind: str, effect: Effect, why: str, first: Effect | None = None, fault: Fault | None = None) -> Anomaly:
    places = effect.place, first and first.place
    return Anomaly(kind, effect.id, effect.key, why, *places, first and first.pod, fault)
