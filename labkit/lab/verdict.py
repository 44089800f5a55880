"""The verdict: what was sent against what took effect, by business id. Valid, invalid, or unknown and why.

It claims only what the evidence shows, as Jepsen's checkers do; `labkit.lab.anomalies` has the rules.
"""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from labkit.kafka.effects import Effect, Sent
from labkit.kafka.errors import LabkitError
from labkit.lab.anomalies import WRONG, Anomaly, Timeline, differences, find
from labkit.lab.metrics import clock

if TYPE_CHECKING:
    import pandas as pd

    from labkit.lab.metrics import Fault

NAMED = 10  # anomalies named in a verdict or shown in a table
COLOURS = {"valid": "#009E73", "invalid": "#D55E00", "unknown": "#E69F00"}  # Okabe–Ito
COLUMNS = ["kind", "id", "key", "place", "first_place", "pod", "time", "explanation"]
# The same words with extras and without: how many there are depends on the moment of the fault.
EXTRAS = "any extra is a redelivery after a fault, or was sent again"


class NotValid(LabkitError, AssertionError):
    """A verdict is not valid; the message is the verdict."""


class _Kind:
    """The anomalies of one kind in a verdict."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get__(self, verdict: Verdict, owner: object = None) -> list[Anomaly]:
        return verdict.of(self.kind)


@dataclass(frozen=True, repr=False)
class Verdict:
    """What `judge` found. `sent`: distinct ids confirmed; `done`: how many of them took effect."""

    result: Literal["valid", "invalid", "unknown"]
    reason: str | None  # why it is unknown
    name: str
    sent: int
    done: int
    found: list[Anomaly]
    tells: Collection[str]  # kinds that its evidence shows: their counts are told though they are 0
    extras_allowed: bool  # an id may take effect again after a fault, or when it was sent again
    unconfirmed: int  # distinct ids never confirmed
    clock_gap: float  # seconds by which the logs show times to disagree with offsets
    others: int  # ids that only other loads sent

    lost = _Kind("lost")
    duplicated = _Kind("duplicated")
    out_of_order = _Kind("out of order")
    early = _Kind("early")
    wrong = _Kind("wrong")
    unexpected = _Kind("unexpected")
    rejected = _Kind("rejected")
    redelivered = _Kind("redelivered")
    resent = _Kind("resent")

    def of(self, kind: str) -> list[Anomaly]:
        return [anomaly for anomaly in self.found if anomaly.kind == kind]

    @property
    def anomalies(self) -> pd.DataFrame:
        """Every anomaly as a row: kind, id, key, place, first_place, pod, time (UTC), explanation."""
        import pandas as pd  # only who asks for a table waits for pandas

        rows = [[getattr(one, name) for name in COLUMNS] for one in self.found]
        frame = pd.DataFrame(rows, columns=COLUMNS)
        return frame.assign(time=pd.to_datetime(frame["time"].astype("float64"), unit="s"))

    def __str__(self) -> str:
        """One line of invariants, the same for every valid run of a load; below it the ids of what was found."""
        name = f"{self.name}: " if self.name else ""
        counts = [f"{self.sent:,} sent", f"{self.done:,} took effect"]
        if self.others:
            counts.append(f"{self.others:,} of other loads not looked at")
        if self.result == "unknown":
            return f"unknown: {name}{self.reason} · {' · '.join(counts)} so far · nothing is claimed"
        below = []
        for kind in (*WRONG, "rejected"):
            found = self.of(kind)
            if found or kind in self.tells:
                counts.append(f"{kind} {len(found):,}")
            if found:
                below.append(f"  {kind}: {_named(found)}")
        if self.result == "valid" and self.extras_allowed:
            counts.append(EXTRAS)
        invalid = "invalid: " if self.result == "invalid" else ""
        return "\n".join([f"{invalid}{name}{' · '.join(counts)}", *below])

    def check(self) -> str:
        """The verdict's text, if it is valid. Raises NotValid with it if it is invalid or unknown."""
        if self.result != "valid":
            raise NotValid(str(self))
        return str(self)

    def explain(self) -> str:
        """Where every extra came from, in plain words with numbers; then what no fault explains."""
        lines = [f"Unknown: {self.reason}. Seen so far:"] if self.result == "unknown" else []
        if extras := self.redelivered:
            again = len({extra.id for extra in extras})
            lines.append(f"{again:,} ids done again by redelivery, {len(extras):,} extras in all:")
            hands: defaultdict[Fault, Counter[str]] = defaultdict(Counter)
            for extra in extras:
                if extra.fault:
                    hands[extra.fault][extra.first_pod or "a pod without a name"] += 1
            for fault, pods in sorted(hands.items(), key=lambda entry: entry[0].start):
                moment = clock(fault.start)
                held = (f"{count:,} had been in the hands of {pod}" for pod, count in pods.most_common())
                lines.append(f"  after {fault.text} at {moment}: {', '.join(held)}")
        if extras := self.resent:
            again = sum(extra.accounted for extra in extras)
            parts = [f"{again:,} sent again"] if again else []
            if once := len(extras) - again:
                parts.append(f"{once:,} sent once (a producer's retry, or a redelivery a stage before)")
            lines.append(f"{len(extras):,} extras from other source records: {', '.join(parts)}")
        for kind in (*WRONG, *(f"maybe {kind}" for kind in WRONG), "rejected"):
            if found := self.of(kind):
                lines.append(f"{len(found):,} {kind}: {_named(found)}; {found[0].id}: {found[0].explanation}")
        if self.unconfirmed:
            lines.append(f"{self.unconfirmed:,} ids never confirmed: they may have arrived or not")
        if self.clock_gap >= 1:
            off = f"times are up to {self.clock_gap:.1f} s off"
            lines.append(f"{off}: between two partitions, order is judged only beyond that")
        return "\n".join(lines) or "Nothing to explain: no extra, nothing missing."

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        names = ["kind", "id", "place", "first_place", "explanation"]
        # What is wrong first, then what is only worth knowing.
        shown = sorted(self.found, key=lambda one: one.kind in ("redelivered", "resent"))[:NAMED]
        cells = [names] if shown else []
        cells += [[str(getattr(one, name) or "") for name in names] for one in shown]
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells)
        colour = COLOURS[self.result]
        return (
            f'<div style="border-left:4px solid {colour};padding-left:8px">'
            f'<b style="color:{colour}">{self.result}</b>'
            f'<pre style="white-space:pre-wrap">{html.escape(str(self))}</pre>'
            f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"
        )


def judge(
    sent: Iterable[Sent] | Mapping[Any, Any],
    done: Iterable[Effect] | Mapping[Any, Any],
    faults: Iterable[Fault] = (),
    *,
    name: str = "",
    exactly_once: bool = False,
    ordered: bool = True,
    early: Iterable[str] | None = None,
    rejected: Iterable[str] | None = None,
    others: Collection[str] = (),
    unknown: str | None = None,
) -> Verdict:
    """Compare what was sent with what took effect in one stage. Nothing needs to be sorted.

    A mapping `sent` gives each id the value it is to have in the end, a mapping `done` the value it has. An effect
    listed twice with the same place is one effect. `faults`: all that moves partitions or restarts pods, rebalances and
    scaling too. `exactly_once` admits no extra, unless its id was sent again. `ordered`: each key is to take effect in
    the order of sending. `early`: ids that something was done for before its time. `rejected`: ids that were set aside,
    accounted for by that. None: not asked. `others`: ids not to look at. `unknown`: why nothing can be claimed (not
    settled, a laptop asleep …). Where nothing was confirmed nothing was tested: unknown too, unless something is wrong
    all the same.

    Raises LabkitError when the two cannot be compared.
    """
    values = {str(name): value for name, value in sent.items()} if isinstance(sent, Mapping) else None
    sends = sent if not isinstance(sent, Mapping) else [Sent(str(one), None, order) for order, one in enumerate(sent)]
    wanted: dict[str, Sent] = {}
    repeats: Counter[str] = Counter()
    confirmed: set[str] = set()
    for send in sorted(sends, key=lambda send: send.order):
        if wanted.setdefault(send.id, send) is not send:
            repeats[send.id] += 1
        if send.confirmed:
            confirmed.add(send.id)
    line = Timeline([])
    if isinstance(done, Mapping):
        content = {str(name): value for name, value in done.items() if str(name) not in others}
        there: Collection[str] = content.keys()
        found = differences(wanted, confirmed, content, values)
        tells = {"lost", "unexpected"} | (set() if values is None else {"wrong"})
    elif values is not None:
        raise LabkitError("the values that ids are to have can only be compared with values: give `done` as a mapping")
    else:
        line = Timeline([effect for effect in done if effect.id not in others])
        there = line.first.keys()
        ordered = ordered and any(send.key is not None for send in wanted.values())
        found = find(wanted, repeats, confirmed, line, faults, ordered)
        tells = {"lost", "duplicated", "unexpected"} | ({"out of order"} if ordered else set())
    if exactly_once:
        found = [_strict(one) for one in found]
    for kind, ids in (("early", early), ("rejected", rejected)):
        if ids is not None:
            tells.add(kind)
            found += _listed(kind, set(map(str, ids)).difference(others), wanted)
    aside = {one.id for one in found if one.kind == "rejected"}
    found = [one for one in found if one.kind not in ("lost", "wrong") or one.id not in aside]
    bad = any(anomaly.kind in WRONG for anomaly in found)
    if unknown is not None:
        found = [_doubted(one) if one.kind in WRONG else one for one in found]
    elif not confirmed and not bad:
        unknown = "nothing was sent and confirmed, so nothing was tested"
    return Verdict(
        result="unknown" if unknown is not None else "invalid" if bad else "valid",
        reason=unknown,
        name=name,
        sent=len(confirmed),
        done=sum(name in there for name in confirmed),
        found=found,
        tells=tells,
        extras_allowed="duplicated" in tells and not exactly_once,
        unconfirmed=len(wanted) - len(confirmed),
        clock_gap=line.gap,
        others=len(others),
    )


def _strict(one: Anomaly) -> Anomaly:
    """An extra, where none is allowed."""
    extra = one.kind == "redelivered" or (one.kind == "resent" and not one.accounted)
    return replace(one, kind="duplicated") if extra else one


def _listed(kind: str, ids: Iterable[str], wanted: Mapping[str, Sent]) -> list[Anomaly]:
    """What somebody else has found, in the order of sending."""
    why = {"early": "before its time", "rejected": "set aside"}[kind]
    order = {name: place for place, name in enumerate(wanted)}
    ranked = sorted(ids, key=lambda name: (order.get(name, len(order)), name))
    return [Anomaly(kind, name, wanted[name].key if name in wanted else None, why) for name in ranked]


def _doubted(one: Anomaly) -> Anomaly:
    """Something wrong, as long as nothing is claimed."""
    so_far = "confirmed, has not taken effect so far"
    return replace(one, kind=f"maybe {one.kind}", explanation=so_far if one.kind == "lost" else one.explanation)


def _named(found: Sequence[Anomaly]) -> str:
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return ", ".join(map(str, found[:NAMED])) + more
