"""How far the imports of a channel have got, for a page that starts over: read from the store and the database."""

from __future__ import annotations

from typing import Any

import msgspec

from labkit.patterns.aggregation import ImportKey
from labkit.patterns.key_value_store import KeyValueStore
from labkit.services.contacts.importer import first_bad_rows
from labkit.services.contacts.reports import Progress

NEWEST = 20  # imports of a channel in an answer
FIRST = 1000  # bad rows of an import in an answer


class ImportState(msgspec.Struct, frozen=True):
    """An import of which at least one job has ended."""

    request: str
    total: int
    """Jobs."""
    done: int
    failed: int
    completed: bool
    bad_rows: list[dict[str, Any]]
    """Lines and reasons of the first bad rows."""
    bad_row_count: int


def states(store: KeyValueStore[Progress], dsn: str, channel: str) -> list[ImportState]:
    """The newest imports of a channel, oldest first. Raises Unavailable, psycopg.Error."""
    values = {ImportKey.parse(key).request: value for key, value in store.items() if key.startswith(f"{channel}/")}
    newest = sorted(values)[-NEWEST:]
    bad = first_bad_rows(dsn, newest, FIRST) if newest else {}

    def state(request: str) -> ImportState:
        value, (count, rows) = values[request], bad.get(request, (0, []))
        listed = [row._asdict() for row in rows]
        return ImportState(request, value.total, value.done, value.failed, value.completed, listed, count)

    return [state(request) for request in newest]
