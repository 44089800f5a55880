"""The answers of commands: lines for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


def say_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], none: str = "") -> str:
    """Rows in columns as wide as need be, numbers on the right; `none` if there are no rows."""
    rows = list(rows)
    if not rows:
        return none
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *texts, strict=True)]
    right = [isinstance(cell, int) for cell in rows[0]]
    lines = []
    for line in ([*heads], *texts):
        cells = (f"{text:{'>' if r else '<'}{width}}" for text, width, r in zip(line, widths, right, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
