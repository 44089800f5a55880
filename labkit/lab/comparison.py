"""What each way to do a notebook's work costs, as the notebook has measured it.

Each notebook writes a row into a file beside itself, and the last notebook shows all rows as one table.
"""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from labkit.kafka.errors import LabkitError, error_text

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "comparison"  # beside the notebooks, where their kernels run
ELSEWHERE = "LABKIT_COMPARISON"  # environment variable: another folder, for tests
NOTEBOOKS = ("01", "02", "03", "04", "05", "06", "07")  # the titles of their rows begin so
NONE = "–"


class Way(msgspec.Struct, frozen=True):
    """One way to do a notebook's work, with what it costs. None: it does not apply, or nobody has measured it."""

    name: str
    polls: float | None = None
    """Requests and queries that ask whether there is something new, or due."""
    locks: float | None = None
    """Rows that are locked or claimed, so that nobody else does the same."""
    lines: float | None = None
    """Of code: see `lines_of`."""
    failed: float | None = None
    """Services that gave no answer, or a wrong one, because another one had failed. A late answer is no failure."""
    consumer: float | None = None
    """Requests or messages that one more consumer costs the producer."""


COLUMNS = {
    "polls": "polls",
    "locks": "locks",
    "lines": "lines of code",
    "failed": "others that fail",
    "consumer": "one more consumer",
}


class _Row(msgspec.Struct):
    title: str
    ways: list[Way]


def lines_of(*code: Callable[..., Any] | ModuleType) -> int:
    """Lines of code of functions, of a notebook's cells too, and of a package's classes and modules.

    A statement is one line, however it is broken; comments, docstrings and blank lines are none. Raises LabkitError for
    what has no source, as a class that a cell defines.
    """
    return sum(map(_statements, code))


def write(notebook: str, title: str, ways: Sequence[Way]) -> pd.DataFrame:
    """Keep this row in place of the notebook's earlier one, and show it. If it cannot be kept, print the reason."""
    row = _Row(title, [Way(way.name, *(_number(getattr(way, column)) for column in COLUMNS)) for way in ways])
    path = _folder() / f"{notebook}.json"
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(row))
        os.replace(temporary, path)
    except OSError as error:  # which names the file
        fix = "Make the folder writable, and run this cell again."
        print(f"Notebook 07 will miss this row: {error_text(error)}. {fix}")  # noqa: T201
    return _table([row])


def read() -> pd.DataFrame:
    """All rows. Print which are missing, or cannot be read."""
    rows = []
    for path in sorted(_folder().glob("*.json")):
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            rows.append(msgspec.json.decode(path.read_bytes(), type=_Row))
    there = {row.title[:2] for row in rows}
    if missing := [number for number in NOTEBOOKS if number not in there]:
        books, whose = ("notebooks", "their rows") if missing[1:] else ("notebook", "its row")
        print(f"Missing: run {books} {', '.join(missing)} for {whose}.")  # noqa: T201
    return _table(sorted(rows, key=lambda row: row.title))


def _folder() -> Path:
    return Path(os.environ.get(ELSEWHERE) or FOLDER).absolute()


def _table(rows: Sequence[_Row]) -> pd.DataFrame:
    import pandas as pd

    told = [
        (row.title, way.name, *(_told(getattr(way, column)) for column in COLUMNS)) for row in rows for way in row.ways
    ]
    return pd.DataFrame(told, columns=["notebook", "way", *COLUMNS.values()]).set_index(["notebook", "way"])


def _number(figure: float | None) -> float | None:
    return None if figure is None else float(figure)  # of NumPy's too, and whether something has failed


def _told(figure: float | None) -> str:
    if figure is None or figure != figure:  # NaN: a figure before its first sample
        return NONE
    return f"{figure:,.1f}".removesuffix(".0")


def _statements(code: Callable[..., Any] | ModuleType) -> int:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError) as error:
        what = "give functions, or classes and modules of a package"
        raise LabkitError(f"the source of {code!r} is not available: {what}") from error
    return sum(map(bool, map(str.strip, ast.unparse(_Bare().visit(tree)).splitlines())))


class _Bare(ast.NodeTransformer):
    """Removes docstrings, those of fields too."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node
