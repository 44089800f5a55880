"""The audit: what was sent against what took effect, by business id. Valid, invalid, or unknown and why.

It claims only what the evidence shows, as Jepsen's checkers do; `labkit.lab.anomalies` has the rules.
"""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from labkit.kafka.errors import LabkitError
from labkit.lab.anomalies import WRONG, Anomaly, Effect, Sent, Timeline, find
from labkit.lab.metrics import clock

if TYPE_CHECKING:
    import pandas as pd

    from labkit.lab.metrics import Fault

NAMED = 10  # anomalies named in a verdict or shown in a table
COLOURS = {"valid": "#009E73", "invalid": "#D55E00", "unknown": "#E69F00"}  # Okabe–Ito
COLUMNS = ["kind", "id", "key", "place", "first_place", "pod", "time", "explanation"]

__all__ = ["Anomaly", "Audit", "AuditFailed", "Effect", "Sent", "audit"]


class AuditFailed(LabkitError, AssertionError):
    """The audit is not valid; the message is its verdict."""


@dataclass(frozen=True, repr=False)
class Audit:
    """What an audit found. `sent`: distinct ids confirmed; `done`: how many of them took effect."""

    result: Literal["valid", "invalid", "unknown"]
    reason: str | None  # why it is unknown
    sent: int
    done: int
    found: list[Anomaly]
    unconfirmed: int  # distinct ids never confirmed
    clock_gap: float  # seconds by which the logs show times to disagree with offsets
    others: int = 0  # ids that only other loads sent

    def of(self, kind: str) -> list[Anomaly]:
        return [anomaly for anomaly in self.found if anomaly.kind == kind]

    @property
    def lost(self) -> list[Anomaly]:
        return self.of("lost")

    @property
    def duplicated(self) -> list[Anomaly]:
        return self.of("duplicated")

    @property
    def out_of_order(self) -> list[Anomaly]:
        return self.of("out of order")

    @property
    def unexpected(self) -> list[Anomaly]:
        return self.of("unexpected")

    @property
    def redelivered(self) -> list[Anomaly]:
        return self.of("redelivered")

    @property
    def resent(self) -> list[Anomaly]:
        return self.of("resent")

    @property
    def anomalies(self) -> pd.DataFrame:
        """Every anomaly as a row: kind, id, key, place, first_place, pod, time (UTC), explanation."""
        import pandas as pd  # only who asks for a table waits for pandas

        rows = [[getattr(one, name) for name in COLUMNS] for one in self.found]
        frame = pd.DataFrame(rows, columns=COLUMNS)
        return frame.assign(time=pd.to_datetime(frame["time"].astype("float64"), unit="s"))

    def wrong(self, exactly_once: bool = False) -> dict[str, list[Anomaly]]:
        """What makes it invalid, by kind. Exactly once admits no extra, unless its id was sent again."""
        wrong = {kind: self.of(kind) for kind in WRONG}
        if exactly_once and self.result != "unknown":
            wrong["duplicated"] += self.redelivered + [extra for extra in self.resent if not extra.accounted]
        return wrong

    def verdict(self, exactly_once: bool = False) -> str:
        """One line of invariants, the same for every valid run of a load; if invalid, ids and places too."""
        counts = f"{self.sent:,} sent · {self.done:,} done"
        if self.others:
            counts += f" · {self.others:,} of other loads not looked at"
        if self.result == "unknown":
            return f"unknown: {self.reason} · {counts} so far · nothing is claimed"
        named = []
        for kind, found in self.wrong(exactly_once).items():
            if found or kind != "unexpected":
                counts += f" · {kind} {len(found):,}"
            if found:
                named.append(f"  {kind}: {_named(found)}")
        if named:
            return "\n".join([f"invalid: {counts}", *named])
        if exactly_once:
            return f"{counts} · each send took effect once"
        # The same words with extras and without: how many there are depends on the moment of the fault.
        return f"{counts} · any extra is a redelivery after a fault, or was sent again"

    def check(self, exactly_once: bool = False) -> str:
        """The verdict, if valid. Raises AuditFailed with it if invalid or unknown."""
        verdict = self.verdict(exactly_once)
        if self.result == "unknown" or any(self.wrong(exactly_once).values()):
            raise AuditFailed(verdict)
        return verdict

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
        for kind in [*WRONG, *(f"maybe {kind}" for kind in WRONG)]:
            if found := self.of(kind):
                lines.append(f"{len(found):,} {kind}: {_named(found)}; {found[0].id}: {found[0].explanation}")
        if self.unconfirmed:
            lines.append(f"{self.unconfirmed:,} ids never confirmed: they may have arrived or not")
        if self.clock_gap >= 1:
            off = f"times are up to {self.clock_gap:.1f} s off"
            lines.append(f"{off}: between two partitions, order is judged only beyond that")
        return "\n".join(lines) or "Nothing to explain: no extra, nothing missing."

    def __repr__(self) -> str:
        return self.verdict()

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
            f'<pre style="white-space:pre-wrap">{html.escape(self.verdict())}</pre>'
            f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"
        )


def audit(
    sent: Iterable[Sent], effects: Iterable[Effect], faults: Iterable[Fault], *, unknown: str | None = None
) -> Audit:
    """Compare what was sent with what took effect in one stage. Nothing needs to be sorted.

    `faults`: all that moves partitions or restarts pods, rebalances and scaling too. An effect listed twice
    with the same place is one effect. `unknown`: why nothing can be claimed (not settled, a laptop asleep …).
    Where nothing was confirmed nothing was tested: unknown too, unless something is wrong all the same.
    """
    wanted: dict[str, Sent] = {}
    repeats: Counter[str] = Counter()
    confirmed: set[str] = set()
    for send in sorted(sent, key=lambda send: send.order):
        if wanted.setdefault(send.id, send) is not send:
            repeats[send.id] += 1
        if send.confirmed:
            confirmed.add(send.id)
    line = Timeline(list(effects))
    found = find(wanted, repeats, confirmed, line, faults)
    bad = any(anomaly.kind in WRONG for anomaly in found)
    if unknown is not None:
        found = [_doubted(one) if one.kind in WRONG else one for one in found]
    elif not confirmed and not bad:
        unknown = "nothing was sent and confirmed, so nothing was tested"
    return Audit(
        result="unknown" if unknown is not None else "invalid" if bad else "valid",
        reason=unknown,
        sent=len(confirmed),
        done=sum(name in line.first for name in confirmed),
        found=found,
        unconfirmed=len(wanted) - len(confirmed),
        clock_gap=line.gap,
    )


def _doubted(one: Anomaly) -> Anomaly:
    """Something wrong, as long as nothing is claimed."""
    so_far = "confirmed, has not taken effect so far"
    return replace(one, kind=f"maybe {one.kind}", explanation=so_far if one.kind == "lost" else one.explanation)


def _named(found: Sequence[Anomaly]) -> str:
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return ", ".join(map(str, found[:NAMED])) + more
