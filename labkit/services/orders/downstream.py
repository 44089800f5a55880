"""Delivery, Inventory and Invoices: each makes rows of its own of every checked-out order, in one transaction an order.

A service's *guard* keeps it from booking an order twice:

- `offset`: the rows and the offset of their record are one transaction, as in every view (pattern 1). A crash cannot
  come between them. But two *records* for one order are booked twice.
- `none`: the rows are in one place, the group's offset in another. After a crash in between, the order is booked again.
- `pessimistic`, `optimistic`: a table of the orders that were booked, with a lock (see `locks`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from psycopg.sql import SQL, Identifier

from labkit.kafka.consumer import Consumer
from labkit.kafka.effects import Effect
from labkit.kafka.errors import LabkitError
from labkit.kafka.producer import POD
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic, short_name
from labkit.patterns.projection import Projection
from labkit.patterns.views import Batch, Database, PostgresView, Row
from labkit.services.connections import rows
from labkit.services.orders import locks
from labkit.services.orders.checkout import CartItem, OrderCheckoutCompleted, OrderPurchaseCompleted, cart

Guard = Literal["offset", "none", "pessimistic", "optimistic"]
GUARDS: tuple[Guard, ...] = get_args(Guard)

# A row for each item of an order, with its origin, for the audit.
COLUMNS = {"item": "text", "amount": "bigint", "cause": "text", "pod": "text", "at": "double precision"}


class Ledger(PostgresView):
    """A table to which rows are only added. With `guarded=False` it ignores its own offset."""

    adds_up = True

    def __init__(self, dsn: str, table: str, guarded: bool = True) -> None:
        self.guarded = guarded
        super().__init__(dsn, table, COLUMNS, key="order_id")

    def _claim(self, database: Database, batch: Batch) -> int:
        return super()._claim(database, batch) if self.guarded else 0


class Booking(NamedTuple):
    """A booking of an order by a service: a verdict counts it as an effect."""

    id: str
    key: str | None
    place: str
    """Its table, and its number there."""
    time: float
    cause: str | None
    """The record that led to it."""
    pod: str | None
    where: str
    items: tuple[tuple[str, int], ...]
    """Items and amounts."""


@dataclass(frozen=True)
class Downstream:
    """A service that books checked-out orders, in `table` of its PostgreSQL. Plain data, so it can travel to a pod.

    `amount` is what an item counts there. Each guard needs a table of its own.
    """

    checkouts: Topic[OrderCheckoutCompleted]
    dsn: str
    table: str
    amount: Callable[[CartItem], int]
    guard: Guard = "offset"

    def __post_init__(self) -> None:
        if self.guard not in GUARDS:
            raise LabkitError(f"the guard of {self.table} is one of {', '.join(GUARDS)}, not {self.guard!r}")
        Ledger(self.dsn, self.table)  # refuses what cannot be the name of a table

    def consumer(self, group: str = "") -> Consumer:
        """The consumer that books, in one process or many."""
        if self.guard in ("pessimistic", "optimistic"):
            once = locks.OnceEach(self.dsn, self.table, self.guard == "pessimistic", self.rows)
            return Consumer(self.checkouts, once, group, order="key")
        guarded = self.guard == "offset"
        ledger = Ledger(self.dsn, self.table, guarded)
        made = Projection(self.checkouts, self.rows, ledger, version=in_order_of_the_topic).consumer(group)
        return made if guarded else replace(made, positions=None)

    def rows(self, record: Record[OrderCheckoutCompleted]) -> list[Row]:
        """The rows that are booked for a record."""
        source, pod, now = short_name(record.place), os.environ.get(POD), time.time()
        return [(one.item, self.amount(one), source, pod, now) for one in record.value.items]

    # -- what a verdict reads

    def bookings(self) -> list[Booking]:
        """All bookings, in order: an order that was booked twice is there twice."""
        found: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
        for order, item, amount, *made in self._read():
            found.setdefault((order, *made), []).append((item, amount))
        return [
            Booking(order, None, f"{self.table}/{number}", at, cause, pod, self.table, tuple(sorted(items)))
            for number, ((order, cause, pod, at), items) in enumerate(found.items())
        ]

    def effects(self) -> list[Effect]:
        """The bookings for a verdict: `lab.verdict(orders, delivery.effects)`."""
        return [Effect(*booking[:6]) for booking in self.bookings()]

    def amounts(self) -> dict[str, int]:
        """The sum of what was booked, by item: for Inventory, by how much the stock has changed."""
        return _sums((item, amount) for _, item, amount, *_ in self._read())

    def expected(self, orders: Iterable[OrderPurchaseCompleted]) -> dict[str, int]:
        """What `amounts` should be after these orders."""
        carts = (cart(int(order.id.rpartition("-")[2])) for order in orders)
        return _sums((one.item, self.amount(one)) for items in carts for one in items)

    def costs(self) -> locks.Costs:
        """What the lock has cost. Raises LabkitError for a service without a lock."""
        if self.guard not in ("pessimistic", "optimistic"):
            raise LabkitError(
                f"the guard of {self.table} is {self.guard!r}, which is no lock: 'pessimistic' and 'optimistic' "
                "have costs"
            )
        return locks.costs(self.dsn, self.table)

    def _read(self) -> list[Row]:
        """All rows; none if there is no table yet."""
        sql = SQL("select order_id, item, amount, cause, pod, at from {} order by at, order_id")
        return rows(self.dsn, sql.format(Identifier(self.table)))


def delivery(
    checkouts: Topic[OrderCheckoutCompleted], dsn: str, guard: Guard = "offset", table: str = "parcels"
) -> Downstream:
    """Delivery ships: a parcel for each item of an order."""
    return Downstream(checkouts, dsn, table, pieces, guard)


def inventory(
    checkouts: Topic[OrderCheckoutCompleted], dsn: str, guard: Guard = "offset", table: str = "movements"
) -> Downstream:
    """Inventory takes from stock: a movement for each item. An item's level is the sum of its movements."""
    return Downstream(checkouts, dsn, table, taken, guard)


def invoices(
    checkouts: Topic[OrderCheckoutCompleted], dsn: str, guard: Guard = "offset", table: str = "invoices"
) -> Downstream:
    """Invoices bills: a line for each item."""
    return Downstream(checkouts, dsn, table, cents, guard)


def pieces(one: CartItem) -> int:
    """What Delivery ships."""
    return one.quantity


def taken(one: CartItem) -> int:
    """By how much the stock changes."""
    return -one.quantity


def cents(one: CartItem) -> int:
    """What Invoices bills."""
    return one.cents


def in_order_of_the_topic(record: Record[Any]) -> None:
    """The version of every record: none, so that each record counts."""


def _sums(booked: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for item, amount in booked:
        found[item] += amount
    return dict(sorted(found.items()))
