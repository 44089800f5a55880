"""The baseline of Delivery, Inventory and Invoices: a table of the orders that were booked, and a lock on its rows.

It is correct, whatever comes twice. It costs a transaction for each order, a row that is kept for ever, and what
`Costs` counts: a *pessimistic* lock makes the second one wait; an *optimistic* lock lets both work, and throws the work
of the second one away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg
from psycopg.sql import SQL, Composed, Identifier

from labkit.kafka.records import Record
from labkit.patterns.views import Row
from labkit.services.connections import Connections, rows

TABLES = """
create table if not exists {table} (
    order_id text not null, item text not null, amount bigint not null, cause text, pod text, at double precision);
create table if not exists {orders} (
    order_id text primary key, booked boolean not null, repeats int not null default 0,
    conflicts int not null default 0, waited double precision not null default 0)
"""
INSERT = "insert into {table} values (%s, %s, %s, %s, %s, %s)"
COSTS = "select count(*), sum(repeats)::int, sum(conflicts)::int, sum(waited) from {orders} where booked"

# Pessimistic: wait for whoever has locked the row; then the row says whether anything is left to do.
OPEN = "insert into {orders} (order_id, booked) values (%s, false) on conflict do nothing"
LOCK = "select booked from {orders} where order_id = %s for update"
CLOSE = "update {orders} set booked = true, waited = waited + %s where order_id = %s"
# Optimistic: ask before the work whether the order is booked; after it, inserting the row answers that again.
LOOK = "select booked from {orders} where order_id = %s"
CLAIM = "insert into {orders} (order_id, booked) values (%s, true) on conflict do nothing"
CONFLICT = "update {orders} set conflicts = conflicts + 1 where order_id = %s"
REPEAT = "update {orders} set repeats = repeats + 1, waited = waited + %s where order_id = %s"


class Costs(NamedTuple):
    """What a lock has cost so far."""

    orders: int
    """Rows that are kept to know which orders were booked."""
    repeats: int
    """Records whose order was booked already. Each took a transaction, and changed nothing."""
    conflicts: int
    """Bookings that were thrown away, as somebody else was first."""
    waited: float
    """Seconds of waiting for a pessimistic lock, each with a connection to the database in hand."""

    def __str__(self) -> str:
        counts = f"orders {self.orders:,}, repeats {self.repeats:,}, conflicts {self.conflicts:,}"
        return f"{counts}, waited {self.waited:.2f} s"


def costs(dsn: str, table: str) -> Costs:
    """What the lock on this table's orders has cost."""
    ((orders, repeats, conflicts, waited),) = rows(dsn, _sql(COSTS, table)) or [(0, 0, 0, 0.0)]
    return Costs(orders, repeats or 0, conflicts or 0, waited or 0.0)


class OnceEach:
    """A handler that books an order once: the rows, and the order's id, in one transaction."""

    def __init__(self, dsn: str, table: str, pessimistic: bool, rows: Callable[[Record[Any]], list[Row]]) -> None:
        self.dsn, self.table, self.pessimistic, self.rows = dsn, table, pessimistic, rows
        self.database = Connections(dsn, _sql(TABLES, table))

    def __call__(self, record: Record[Any]) -> None:
        """Book the record's order. Raises psycopg.Error while the database is away: then nothing of it is booked."""
        rows = [(record.value.id, *row) for row in self.rows(record)]
        with self.database.one() as database:
            book = self._pessimistic if self.pessimistic else self._optimistic
            if not book(database, record.value.id, rows):
                self._run(database, CONFLICT, record.value.id)  # in its own transaction: the other is rolled back

    def close(self) -> None:
        self.database.close()

    def _pessimistic(self, database: psycopg.Connection[Any], order: str, rows: list[Row]) -> bool:
        with database.transaction():
            began = time.perf_counter()
            self._run(database, OPEN, order)
            (booked,) = self._run(database, LOCK, order).fetchall()[0]
            waited = time.perf_counter() - began
            if not booked:
                self._insert(database, rows)
            self._run(database, REPEAT if booked else CLOSE, waited, order)
        return True

    def _optimistic(self, database: psycopg.Connection[Any], order: str, rows: list[Row]) -> bool:
        with database.transaction():
            if self._run(database, LOOK, order).fetchall():
                self._run(database, REPEAT, 0.0, order)
                return True
            self._insert(database, rows)
            if self._run(database, CLAIM, order).rowcount:
                return True
            raise psycopg.Rollback
        return False

    def _insert(self, database: psycopg.Connection[Any], rows: list[Row]) -> None:
        with database.cursor() as cursor:
            cursor.executemany(_sql(INSERT, self.table), rows)

    def _run(self, database: psycopg.Connection[Any], sql: str, *parameters: Any) -> psycopg.Cursor[Any]:
        return database.execute(_sql(sql, self.table), parameters)


def _sql(text: str, table: str) -> Composed:
    return SQL(text).format(table=Identifier(table), orders=Identifier(f"{table}_orders"))
