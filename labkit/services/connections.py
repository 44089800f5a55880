"""Connections to a service's PostgreSQL, for the threads of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import psycopg
from psycopg.sql import SQL, Composed


class Connections:
    """A connection for each thread that asks at the same time. Each statement commits, unless a transaction is begun.

    The object travels to a pod without connections, connects there, and makes `tables` first.
    """

    def __init__(self, dsn: str, tables: SQL | Composed) -> None:
        self.dsn, self.tables = dsn, tables
        self._free: SimpleQueue[psycopg.Connection[Any]] = SimpleQueue()

    def __reduce__(self) -> tuple[type[Connections], tuple[Any, ...]]:
        return type(self), (self.dsn, self.tables)

    @contextmanager
    def one(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection, which is closed if its use fails. Raises psycopg.Error."""
        try:
            database, fresh = self._free.get_nowait(), False
        except Empty:
            database, fresh = psycopg.connect(self.dsn, autocommit=True, connect_timeout=5), True
        try:
            if fresh:
                with database.transaction():  # or two that make the tables at once disturb each other
                    database.execute("select pg_advisory_xact_lock(hashtext('labkit services'))")
                    database.execute(self.tables)
            yield database
        except BaseException:
            database.close()
            raise
        self._free.put(database)

    def close(self) -> None:
        """Close the connections that are not in use. The object can be used again."""
        while True:
            try:
                self._free.get_nowait().close()
            except Empty:
                return


def rows(dsn: str, sql: str | SQL | Composed, *parameters: object) -> list[tuple[Any, ...]]:
    """The rows of a query, by a connection of its own; none if there is no table yet. Raises psycopg.Error."""
    with psycopg.connect(dsn, connect_timeout=5) as database:
        try:
            return database.execute(sql, parameters).fetchall()
        except psycopg.errors.UndefinedTable:
            return []
