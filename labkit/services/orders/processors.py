"""The steps of an order: charge, reserve, ship, invoice. Each has tables of its own.

A step stores what has become of each order, in the transaction of its effect. So a processor that was killed in between
may ask again, and the effect is there once. A step does not know who asks: a mediator, or an event (see `event_chain`).

    charge = steps(dsn)["charge"]
    mediator.processor("charge", do=charge.do, cancel=charge.cancel, undo=charge.undo)
    event_processor(charge, placed, charged, failed, undone)
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import msgspec
import psycopg
from psycopg.sql import SQL, Composed, Identifier

from labkit.kafka.effects import Effect
from labkit.kafka.producer import POD
from labkit.patterns.mediator import Refused
from labkit.services.connections import Connections
from labkit.services.orders.checkout import CartItem, cart
from labkit.services.orders.downstream import cents, pieces, taken

TABLES = """
create table if not exists {effects} (
    number serial primary key, order_id text not null, what text not null, amount bigint not null, pod text,
    at double precision not null);
create table if not exists {memory} (order_id text primary key, state text not null)
"""
FIRST = "insert into {memory} values (%s, %s) on conflict do nothing"  # waits while another transaction does the same
UNDO = "update {memory} set state = 'undone' where order_id = %s and state = 'done'"
LOOK = "select state from {memory} where order_id = %s"
EFFECT = "insert into {effects} (order_id, what, amount, pod, at) values (%s, %s, %s, %s, %s)"
DONE = "select order_id, what, amount, pod, at from {effects} order by number"
KNOWN = "select order_id from {memory}"

What = Literal["done", "undone"]


class OrderPlaced(msgspec.Struct, frozen=True):
    """The initial event: a customer has placed this order."""

    id: str
    customer: str
    items: list[CartItem]


def placed_orders(numbers: Iterable[int]) -> Iterator[OrderPlaced]:
    """The orders with these numbers, the same for everybody."""
    for number in numbers:
        yield OrderPlaced(f"order-{number}", f"customer {number % 50}", cart(number))


class Done(NamedTuple):
    """An effect of a step."""

    order: str
    what: What
    amount: int
    pod: str | None
    at: float


def nothing(order: OrderPlaced) -> bool:
    """The `refuses` of a step that takes every order."""
    return False


@dataclass(frozen=True)
class OrderStep:
    """A step of an order, in two tables of a PostgreSQL that are named after it. Plain data, so it can travel to a pod.

    `amount` is what an item of an order counts. `refuses` says for which orders the step fails for good.
    """

    name: str
    dsn: str
    amount: Callable[[CartItem], int] = pieces
    refuses: Callable[[OrderPlaced], bool] = nothing

    def do(self, order_id: str, order: OrderPlaced) -> None:
        """Do the step, unless it was done. Raises Refused if it must never be done, as it was refused, cancelled or
        undone; psycopg.Error while the database is away."""
        refused = self.refuses(order)
        state = self._first(order_id, "cancelled") if refused else self._first(order_id, "done", self._amount(order))
        if state != "done":
            raise Refused(f"{self.name} does not take {order_id}" if refused else f"{self.name} is {state}")

    def cancel(self, order_id: str) -> Literal["done", "cancelled"]:
        """Say that it was done; otherwise make sure that it never will be."""
        return "done" if self._first(order_id, "cancelled") == "done" else "cancelled"

    def undo(self, order_id: str, order: OrderPlaced) -> None:
        """Take the effect back, if there is one."""
        with self._connections.one() as database, database.transaction():
            if self._run(database, UNDO, order_id).rowcount:
                self._add(database, order_id, "undone", -self._amount(order))

    def state(self, order_id: str) -> str | None:
        """What has become of an order: done, cancelled, undone, or None."""
        with self._connections.one() as database:
            return self._look(database, order_id)

    def all(self) -> list[Done]:
        """All effects of the step, in order. If an order was done twice, it is there twice."""
        with self._connections.one() as database:
            return [Done(*row) for row in self._run(database, DONE).fetchall()]

    def effects(self) -> list[Effect]:
        """The effects that stand, for a verdict: one that was taken back is left out, and so is its undoing."""
        found: dict[str, list[Effect]] = {}
        for number, one in enumerate(self.all()):
            if one.what == "done":
                place = f"{self.name}/{number}"
                found.setdefault(one.order, []).append(Effect(one.order, None, place, one.at, None, one.pod))
            else:
                found[one.order].pop()
        return [effect for effects in found.values() for effect in effects]

    def known(self) -> set[str]:
        """The orders of which the step has stored anything."""
        with self._connections.one() as database:
            return {order for (order,) in self._run(database, KNOWN)}

    def close(self) -> None:
        self._connections.close()

    # -- inside

    def _first(self, order_id: str, state: str, amount: int | None = None) -> str | None:
        """Store this state of an order, and its effect, unless a state is stored. Returns the stored state."""
        with self._connections.one() as database, database.transaction():
            if self._run(database, FIRST, order_id, state).rowcount and amount is not None:
                self._add(database, order_id, "done", amount)
            return self._look(database, order_id)

    def _amount(self, order: OrderPlaced) -> int:
        return sum(map(self.amount, order.items))

    def _add(self, database: psycopg.Connection[Any], order_id: str, what: What, amount: int) -> None:
        self._run(database, EFFECT, order_id, what, amount, os.environ.get(POD), time.time())

    def _look(self, database: psycopg.Connection[Any], order_id: str) -> str | None:
        row = self._run(database, LOOK, order_id).fetchone()
        return row[0] if row else None

    def _run(self, database: psycopg.Connection[Any], sql: str, *parameters: Any) -> psycopg.Cursor[Any]:
        return database.execute(self._sql(sql), parameters)

    def _sql(self, text: str) -> Composed:
        return SQL(text).format(effects=Identifier(self.name), memory=Identifier(f"{self.name}_orders"))

    @cached_property
    def _connections(self) -> Connections:
        return Connections(self.dsn, self._sql(TABLES))


def steps(dsn: str) -> dict[str, OrderStep]:
    """The steps of an order, in sequence: they charge and invoice cents, reserve from stock, ship pieces."""
    amounts = {"charge": cents, "reserve": taken, "ship": pieces, "invoice": cents}
    return {name: OrderStep(name, dsn, amount) for name, amount in amounts.items()}


def outcomes(steps: Mapping[str, OrderStep], ids: Iterable[str]) -> dict[str, str]:
    """The ends of these orders, by id: "completed" if each step has had its effect once, "taken back" if no effect
    stands; otherwise which steps stand ("charge, ship 2 times"). An order that no step knows has no end."""
    standing = {name: Counter(effect.id for effect in step.effects()) for name, step in steps.items()}
    known = {order for step in steps.values() for order in step.known()}.union(*standing.values())
    found = {}
    for order in known.intersection(ids):
        times = {name: counts[order] for name, counts in standing.items() if counts[order]}
        if not times:
            found[order] = "taken back"
        elif times == dict.fromkeys(steps, 1):
            found[order] = "completed"
        else:
            found[order] = ", ".join(name if many == 1 else f"{name} {many} times" for name, many in times.items())
    return found
