"""The events of Payments and of Checkout: an order that is paid, and the same order with all that is in its cart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec
from psycopg.sql import SQL

from labkit.kafka.errors import LabkitError
from labkit.services.connections import Connections

# What the shop sells, with prices in cents.
PRICES = {"cup": 900, "kettle": 4900, "saucer": 400, "spoon": 300, "tea": 1200, "teapot": 2900, "tin": 700}

TABLE = SQL("""create table if not exists carts (
    order_id text not null, item text not null, quantity int not null, cents int not null,
    primary key (order_id, item))""")


class OrderPurchaseCompleted(msgspec.Struct, frozen=True):
    """Payments says: this order is paid."""

    id: str
    """The business id."""
    customer: str
    cents: int


class CartItem(msgspec.Struct, frozen=True):
    """An item that was bought; `cents` is the price of all its pieces together."""

    item: str
    quantity: int
    cents: int


class OrderCheckoutCompleted(msgspec.Struct, frozen=True):
    """Checkout says: all this belongs to the order."""

    id: str
    customer: str
    items: list[CartItem]


class CartUnknown(LabkitError):
    """No cart belongs to this order, or its cart costs something else: another attempt would not help."""


def cart(number: int) -> list[CartItem]:
    """The cart of the order with this number: one to three items, the same for everybody."""
    names = sorted(PRICES)
    chosen = {
        names[(number * 5 + step * (number % 3 + 1)) % len(names)]: (number + step) % 2 + 1
        for step in range(number % 3 + 1)
    }
    return [CartItem(item, quantity, quantity * PRICES[item]) for item, quantity in chosen.items()]


def purchases(numbers: Iterable[int]) -> Iterator[OrderPurchaseCompleted]:
    """Payments' events for the orders with these numbers."""
    for number in numbers:
        yield OrderPurchaseCompleted(
            f"order-{number}", f"customer {number % 50}", sum(one.cents for one in cart(number))
        )


class Carts:
    """The carts, in Checkout's PostgreSQL. The object travels to pods, and connects there."""

    def __init__(self, dsn: str) -> None:
        self.database = Connections(dsn, TABLE)

    def fill(self, numbers: Iterable[int]) -> None:
        """Make carts for the orders with these numbers; existing ones stay as they are."""
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
