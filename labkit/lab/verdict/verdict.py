"""The verdict: what was sent against what took effect, by business id. Valid, invalid, or unknown and why.

It claims only what the evidence shows, as Jepsen's checkers do; `labkit.lab.verdict.anomalies` has the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from labkit.kafka.effects import Effect, Sent
from labkit.kafka.errors import LabkitError
from labkit.lab.history import clock
from labkit.lab.verdict.anomalies import HARMLESS, WRONG, Anomaly, Timeline, differences, find

if TYPE_CHECKING:
    from labkit.lab.history import Fault

NAMED = 10  # anomalies of a kind
# The same words with extras and without: how many there are depends on the moment of the fault.
EXTRAS = "any extra is a redelivery after a fault, or was sent again"


class NotValid(LabkitError, AssertionError):
    """A verdict is not valid; the message is the verdict."""


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

    def of(self, kind: str) -> list[Anomaly]:
        """The anomalies of one kind: "lost", "duplicated", "out of order", "early", "wrong", "unexpected"; "rejected",
        "redelivered", "sent again" or "resent"."""
        if kind not in (*WRONG, *HARMLESS):
            raise LabkitError(f"there is no kind {kind!r} of anomalies, but {', '.join((*WRONG, *HARMLESS))}")
        return [anomaly for anomaly in self.found if anomaly.kind == kind]

    @property
    def why(self) -> str:
        """Why it is not valid, in a few words: how many are wrong of each kind, or why nothing can be claimed."""
        wrong = [f"{kind} {len(self.of(kind)):,}" for kind in WRONG if self.of(kind)]
        return self.reason or ", ".join(wrong)

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
        if extras := self.of("redelivered"):
            again = len({extra.id for extra in extras})
            lines.append(f"{again:,} ids done again by redelivery, {len(extras):,} extras in all:")
            hands = Counter((extra.fault, extra.first_pod or "a pod without a name") for extra in extras if extra.fault)
            for (fault, pod), count in sorted(hands.items(), key=lambda entry: entry[0][0].start):
                after = f"after {fault.text} at {clock(fault.start)}"
                lines.append(f"  {after}: {count:,} had been in the hands of {pod}")
        for kind in dict.fromkeys(one.kind for one in self.found if one.kind != "redelivered"):
            found = [one for one in self.found if one.kind == kind]
            lines.append(f"{len(found):,} {kind}: {_named(found)}; {found[0].id}: {found[0].explanation}")
        if self.unconfirmed:
            lines.append(f"{self.unconfirmed:,} ids never confirmed: they may have arrived or not")
        if self.clock_gap >= 1:
            off = f"times are up to {self.clock_gap:.1f} s off"
            lines.append(f"{off}: between two partitions, order is judged only beyond that")
        return "\n".join(lines) or "Nothing to explain: no extra, nothing missing."

    def __repr__(self) -> str:
        return str(self)


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
    """Compare what was sent with what took effect in one stage, as `Lab.verdict` says. Nothing needs to be sorted.

    An effect listed twice with the same place is one effect. `faults`: all that moves partitions or restarts pods,
    rebalances and scaling too. `exactly_once` admits an extra whose id was sent again. `others`: ids not to look at.
    `unknown`: why nothing can be claimed (not settled, a laptop asleep …). Where nothing was confirmed nothing was
    tested: unknown too, unless something is wrong all the same.

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
        extras = ("redelivered", "resent")
        found = [replace(one, kind="duplicated") if one.kind in extras else one for one in found]
    rank = {name: place for place, name in enumerate(wanted)}
    for kind, ids, why in (("early", early, "before its time"), ("rejected", rejected, "set aside")):
        if ids is not None:
            tells.add(kind)
            in_order = sorted(set(map(str, ids)).difference(others), key=lambda name: (rank.get(name, len(rank)), name))
            found += [Anomaly(kind, name, None, why) for name in in_order]
    aside = {one.id for one in found if one.kind == "rejected"}
    found = [one for one in found if one.kind not in ("lost", "wrong") or one.id not in aside]
    bad = any(anomaly.kind in WRONG for anomaly in found)
    if unknown is not None:
        found = [replace(one, kind=f"maybe {one.kind}") if one.kind in WRONG else one for one in found]
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


def _named(found: Sequence[Anomaly]) -> str:
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return ", ".join(map(str, found[:NAMED])) + more
