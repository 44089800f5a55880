"""Comparing what should be there with what is, id by id: a view with its source, two copies, a store after a crash."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labkit.lab.audit import COLOURS, AuditFailed

NAMED = 10  # ids named of each kind


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found. Ids are in order."""

    name: str
    expected: int
    found: int
    missing: list[str]
    unexpected: list[str]
    different: list[str]

    @property
    def ok(self) -> bool:
        """Whether both are the same."""
        return not (self.missing or self.unexpected or self.different)

    def verdict(self) -> str:
        """One line, the same for every run in which both are the same; else also the ids concerned."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "different": self.different}
        counts = " · ".join(f"{kind} {len(ids):,}" for kind, ids in kinds.items())
        lines = [f"{self.name}: {self.expected:,} expected · {self.found:,} found · {counts}"]
        for kind, ids in kinds.items():
            if ids:
                more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
                lines.append(f"  {kind}: {', '.join(ids[:NAMED])}{more}")
        return "\n".join(lines)

    def check(self) -> str:
        """The verdict, if both are the same. Raises AuditFailed with it if they are not."""
        if not self.ok:
            raise AuditFailed(f"invalid: {self.verdict()}")
        return self.verdict()

    def __repr__(self) -> str:
        return self.verdict()

    def _repr_html_(self) -> str:
        colour = COLOURS["valid" if self.ok else "invalid"]
        text = html.escape(self.verdict())
        return f'<pre style="border-left:4px solid {colour};padding-left:8px;white-space:pre-wrap">{text}</pre>'


def compare(name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Comparison:
    """Compare two mappings by id. `name` says what was looked at."""
    both = expected.keys() & found.keys()
    return Comparison(
        name,
        len(expected),
        len(found),
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
        sorted(name for name in both if expected[name] != found[name]),
    )
