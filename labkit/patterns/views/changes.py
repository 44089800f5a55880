"""What a view takes in: changes of its rows, in batches, and the offset that follows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from labkit.kafka.errors import LabkitError, Unavailable

AT_ONCE = 500  # rows in one statement
LARGEST_BATCH = 10_000  # records in one transaction, whose keys are looked up in one statement


class ViewOutdated(LabkitError):
    """The view was built from another topic, or for other columns: build it anew."""


class ViewTakenBack(LabkitError):
    """The view lost what this writer had put into it (its file was deleted): the writer must start again."""


class ViewUnavailable(Unavailable):
    """There is no view to read yet, or its database does not answer."""


Row = tuple[Any, ...]


class Change(NamedTuple):
    """What one record means to a view."""

    key: str
    version: int | None
    """None: the change is newer than whatever is stored, and keeps the stored version."""
    rows: Sequence[Row] | None
    """All rows of the key from now on. None: the key is deleted."""
    replaces: bool = True
    """False if the view has never had this key: then there are no rows to delete."""


class Batch(NamedTuple):
    """Changes of one partition, in order, and the offset that follows them."""

    partition: int
    after: int
    """The view had everything before this offset when the batch was begun."""
    next_offset: int
    time: float
    """When the last of its records was produced, in seconds since 1970."""
    changes: Sequence[tuple[int, Change]]
    """Each with the offset of its record."""
    rejected: Sequence[tuple[int, str]]
    """Records that could not be projected: offset and reason."""


class Checkpoint(NamedTuple):
    """How far a view has got in a partition."""

    next_offset: int
    time: float
    topic_id: str
    """The topic's UUID: in another topic of that name, offsets mean nothing."""


class Database(Protocol):
    """A connection in a transaction; parameters are marked `?`."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Any: ...


def insert(database: Database, table: str, rows: Sequence[Row], conflict: str = "") -> None:
    """Insert rows, many in one statement: at each statement SQLite lets other threads run, and then waits for its turn.

    `conflict` says what to do about rows that exist already ("do nothing").
    """
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        values = ", ".join([f"({placeholders(part[0])})"] * len(part))
        sql = f"insert into {table} values {values}" + (f" on conflict {conflict}" if conflict else "")
        database.execute(sql, [value for row in part for value in row])


def placeholders(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def newest(changes: Iterable[Change], stored: Mapping[str, int]) -> list[Change]:
    """For each key the last change that is newer than the stored version; `stored` has these versions."""
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
