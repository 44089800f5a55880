"""What a view is given: changes of its rows, in batches, and how far it has got with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from labkit.kafka.errors import LabkitError, Unavailable

AT_ONCE = 500  # rows in one statement
LARGEST_BATCH = 10_000  # records in one transaction, whose keys are looked up in one statement


class ViewOutdated(LabkitError):
    """The view was made of another topic, or for other columns: it must be built anew."""


class ViewTakenBack(LabkitError):
    """The view lost what this writer had put into it (its file was deleted): the writer has to start again."""


class ViewUnavailable(Unavailable):
    """There is no view to be read (yet), or its database does not answer."""


Row = tuple[Any, ...]


class Change(NamedTuple):
    """What one record means to a view."""

    key: str
    version: int | None
    """None: newer than whatever is there, whose version it keeps."""
    rows: Sequence[Row] | None
    """Replace all rows of the key. None: the key is deleted."""
    replaces: bool = True
    """False if the view has never had this key: then there are no rows to be taken away."""


class Batch(NamedTuple):
    """Changes of one partition, in order, and how far the view has got with them."""

    partition: int
    after: int
    """The view had everything before this offset when the batch was begun."""
    next_offset: int
    time: float
    """When the last of its records was produced, in seconds since 1970."""
    changes: Sequence[tuple[int, Change]]
    """With the offsets of their records."""
    rejected: Sequence[tuple[int, str]]
    """Records that could not be projected: offset and reason."""


class Checkpoint(NamedTuple):
    """How far a view has got in a partition."""

    next_offset: int
    time: float
    topic_id: str
    """Of another topic of that name, offsets say nothing."""


class Database(Protocol):
    """A connection in a transaction; parameters are marked `?`."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Any: ...


def insert(database: Database, table: str, rows: Sequence[Row], conflict: str = "") -> None:
    """Insert rows, many in one statement: SQLite lets other threads in at each, and waits to be let in again.

    `conflict` says what becomes of those that are there already ("do nothing").
    """
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        values = ", ".join([f"({placeholders(part[0])})"] * len(part))
        sql = f"insert into {table} values {values}" + (f" on conflict {conflict}" if conflict else "")
        database.execute(sql, [value for row in part for value in row])


def placeholders(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def newest(changes: Iterable[Change], stored: Mapping[str, int]) -> list[Change]:
    """Of each key the last change that is newer than what is there; `stored` has the versions that are."""
    versions = dict(stored)
    kept: dict[str, Change] = {}
    for change in changes:
        known = versions.get(change.key)
        if change.version is None:
            change = change._replace(version=-1 if known is None else known)
        elif known is not None and change.version <= known:
            continue
        versions[change.key] = cast(int, change.version)
        if change.key not in stored:
            change = Change(change.key, change.version, change.rows, replaces=False)
        kept[change.key] = change
    return list(kept.values())
