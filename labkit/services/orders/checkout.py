"""Payments' event and Checkout's: an order that is paid, and the same order with all that is in its cart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec
from psycopg.sql import SQL

from labkit.kafka.errors import LabkitError
from labkit.services.connections import Connections

# What the shop sells, and for how many cents.
PRICES = {"cup": 900, "kettle": 4900, "saucer": 400, "spoon": 300, "tea": 1200, "teapot": 2900, "tin": 700}

TABLE = SQL("""create table if not exists carts (
    order_id text not null, item text not null, quantity int not null, cents int not null,
    primary key (order_id, item))""")


class OrderPurchaseCompleted(msgspec.Struct, frozen=True):
    """Payments: this order is paid."""

    id: str
    """The business id."""
    customer: str
    cents: int


class CartItem(msgspec.Struct, frozen=True):
    """Something that was bought, so many times; `cents` for all of them."""

    item: str
    quantity: int
    cents: int


class OrderCheckoutCompleted(msgspec.Struct, frozen=True):
    """Checkout: this is all that belongs to the order."""

    id: str
    customer: str
    items: list[CartItem]


class CartUnknown(LabkitError):
    """No cart belongs to this order, or one that costs something else: another attempt would not help."""


def cart(number: int) -> list[CartItem]:
    """What is in the cart of the order of this number: one to three items, the same for everybody."""
    names = sorted(PRICES)
    chosen = {
        names[(number * 5 + step * (number % 3 + 1)) % len(names)]: (number + step) % 2 + 1
        for step in range(number % 3 + 1)
    }
    return [CartItem(item, quantity, quantity * PRICES[item]) for item, quantity in chosen.items()]


def purchases(numbers: Iterable[int]) -> Iterator[OrderPurchaseCompleted]:
    """Orders of these numbers, paid."""
    for number in numbers:
        yield OrderPurchaseCompleted(
            f"order-{number}", f"customer {number % 50}", sum(one.cents for one in cart(number))
        )


class Carts:
    """The carts, in Checkout's PostgreSQL. An object travels to pods and connects where it is asked."""

    def __init__(self, dsn: str) -> None:
        self.database = Connections(dsn, TABLE)

    def fill(self, numbers: Iterable[int]) -> None:
        """Carts for the orders of these numbers; those that are there stay as they are."""
        lines = ((f"order-{number}", one.item, one.quantity, one.cents) for number in numbers for one in cart(number))
        with self.database.one() as database, database.cursor() as cursor:
            while part := list(islice(lines, 1000)):
                cursor.executemany("insert into carts values (%s, %s, %s, %s) on conflict do nothing", part)

    def check_out(self, purchase: OrderPurchaseCompleted) -> OrderCheckoutCompleted:
        """The order with its items. Raises CartUnknown; psycopg.Error while the database is away."""
        sql = "select item, quantity, cents from carts where order_id = %s order by item"
        with self.database.one() as database:
            items = [CartItem(*row) for row in database.execute(sql, (purchase.id,))]
        if not items:
            raise CartUnknown(f"no cart belongs to {purchase.id}")
        if (cents := sum(one.cents for one in items)) != purchase.cents:
            raise CartUnknown(f"{purchase.cents:,} cents were paid for {purchase.id}, whose cart costs {cents:,}")
        return OrderCheckoutCompleted(purchase.id, purchase.customer, items)

    def close(self) -> None:
        self.database.close()
