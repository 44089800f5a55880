"""The shop: what downstream services book, what keeps them from booking twice and what does not, and a mail service."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest
from consuming import Member, Process, fresh_group, fresh_topic, put
from processes import wait_until
from psycopg.sql import SQL

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import end_offsets
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.lab.pods.travel import pack, unpack
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import RetryingConsumer, dead_letter
from labkit.runtime.broker import free_ports
from labkit.services import orders
from labkit.services.clients import ask
from labkit.services.connections import Connections
from labkit.services.orders import Downstream, OrderCheckoutCompleted, OrderPurchaseCompleted
from labkit.services.orders.downstream import Guard
from labkit.services.orders.locks import OnceEach
from labkit.services.orders.mail import MailFailed

ORDERS = range(30)


@pytest.fixture
def carts(dsn: str) -> Iterator[orders.Carts]:
    with closing(orders.Carts(dsn)) as carts:
        carts.fill(ORDERS)
        yield carts


@pytest.fixture
def checkouts(cluster: Cluster) -> Topic[OrderCheckoutCompleted]:
    return fresh_topic(cluster, 2, OrderCheckoutCompleted)


@contextmanager
def running(service: Downstream, group: str = "") -> Iterator[Member]:
    """A member that books; its connections are closed when it has ended."""
    consumer = service.consumer(group or fresh_group())
    handler: Any = consumer.handler
    with closing(handler if isinstance(handler, OnceEach) else handler.__self__.view), Member(consumer) as member:
        yield member


def check_out(carts: orders.Carts, checkouts: Topic[OrderCheckoutCompleted], times: int = 1) -> None:
    """All orders, each so many times in a row."""
    for purchase in orders.purchases(ORDERS):
        put(checkouts, *[encode(carts.check_out(purchase))] * times, key=purchase.id)


def booked(service: Downstream, bookings: int) -> Counter[str]:
    """How often each order was booked, once so many bookings are there."""
    wait_until(lambda: len(service.bookings()) >= bookings, 20, f"{bookings} bookings in {service.table}")
    return Counter(booking.id for booking in service.bookings())


def ends(topic: Topic[Any]) -> dict[int, int]:
    """Where its partitions that have records end."""
    return {number: end for (_, number), end in end_offsets(topic.cluster, [topic.name]).items() if end}


# -- what is booked ----------------------------------------------------------------------------------------------------


def test_what_is_paid_becomes_parcels_movements_and_invoices(
    cluster: Cluster, dsn: str, carts: orders.Carts, checkouts: Topic[OrderCheckoutCompleted]
) -> None:
    paid = fresh_topic(cluster, 2, OrderPurchaseCompleted)

    def checkout(record: Record[OrderPurchaseCompleted]) -> None:
        checkouts.send(carts.check_out(record.value), record.key)

    services = [made(checkouts, dsn) for made in (orders.delivery, orders.inventory, orders.invoices)]
    assert [service.bookings() for service in services] == [[], [], []]
    for purchase in orders.purchases(ORDERS):
        paid.send(purchase, purchase.id)
    paid.flush()
    with Member(Consumer(paid, checkout, fresh_group())):
        delivery, inventory, invoices = services
        with running(delivery), running(inventory), running(invoices):
            for service in services:
                assert booked(service, len(ORDERS)) == Counter({f"order-{number}": 1 for number in ORDERS})
                assert service.amounts() == service.expected(orders.purchases(ORDERS))
    assert sum(delivery.amounts().values()) == -sum(inventory.amounts().values()) > 0
    assert sum(invoices.amounts().values()) == sum(one.cents for one in orders.purchases(ORDERS))
    first = delivery.bookings()[0]
    assert (first.place, first.where, first.key) == ("parcels/0", "parcels", None)
    with Reader(checkouts) as reader:
        sources = {record.value.id: record.place.rpartition(".")[2] for record in reader.read_to_end()}
    assert {booking.id: booking.cause for booking in delivery.bookings()} == sources


def test_an_order_without_its_cart_goes_to_the_dead_letters(cluster: Cluster, carts: orders.Carts) -> None:
    paid = fresh_topic(cluster, 1, OrderPurchaseCompleted)
    done: list[str] = []

    def checkout(record: Record[OrderPurchaseCompleted]) -> None:
        done.append(carts.check_out(record.value).id)

    for purchase in (*orders.purchases([0, 100]), OrderPurchaseCompleted("order-1", "customer 1", 1)):
        paid.send(purchase, purchase.id)
    paid.flush()
    consumer = RetryingConsumer(paid, checkout, fresh_group(), retry=dead_letter(non_retriable=(orders.CartUnknown,)))
    with Member(consumer) as member:
        member.wait_committed({0: 3})
    assert done == ["order-0"]
    with DeadLetters(paid, consumer.group) as letters:
        assert sorted((letter.key, letter.error) for letter in letters.values()) == [
            ("order-1", "CartUnknown: 1 cents were paid for order-1, whose cart costs 6,700"),
            ("order-100", "CartUnknown: no cart belongs to order-100"),
        ]


# -- what keeps them from booking twice, and what does not -------------------------------------------------------------


@pytest.mark.parametrize(
    ("guard", "times"),
    [
        ("offset", 2),
        pytest.param("none", 2, marks=pytest.mark.long),
        ("pessimistic", 1),
        pytest.param("optimistic", 1, marks=pytest.mark.long),
    ],
)
def test_two_records_for_one_order(
    dsn: str, carts: orders.Carts, checkouts: Topic[OrderCheckoutCompleted], guard: Guard, times: int
) -> None:
    """Only who knows the orders sees that it is the same one: for an offset they are two records."""
    delivery = orders.delivery(checkouts, dsn, guard)
    check_out(carts, checkouts, times=2)
    with running(delivery) as member:
        member.wait_committed(ends(checkouts))
    assert booked(delivery, times * len(ORDERS)) == Counter({f"order-{number}": times for number in ORDERS})
    expected = delivery.expected(orders.purchases(ORDERS))
    assert delivery.amounts() == {item: times * amount for item, amount in expected.items()}
    if times == 1:
        costs = delivery.costs()
        assert (costs.orders, costs.repeats, costs.conflicts) == (30, 30, 0)
        assert (costs.waited > 0) == (guard == "pessimistic")


@pytest.mark.parametrize(
    ("guard", "times"),
    [
        ("offset", 1),
        ("none", 2),
        pytest.param("pessimistic", 1, marks=pytest.mark.long),
        pytest.param("optimistic", 1, marks=pytest.mark.long),
    ],
)
def test_killed_when_it_has_booked_and_not_committed(
    dsn: str, carts: orders.Carts, checkouts: Topic[OrderCheckoutCompleted], guard: Guard, times: int
) -> None:
    check_out(carts, checkouts)
    delivery = orders.delivery(checkouts, dsn, guard)
    with Delivery(checkouts, fresh_group(), dsn=dsn, guard=guard, crash_at=Step.COMMITTING.value) as killed:
        killed.ends()
        assert not killed.of(Step.COMMITTED)
    carts.close()
    wait_until(lambda: not others(dsn), 20, "the end of what the killed one had the database do")
    before = Counter(booking.id for booking in delivery.bookings())
    assert before
    # Another group begins where this one would go on, which has committed nothing; and need not wait for its session.
    with running(delivery) as member:
        member.wait_committed(ends(checkouts))
    after = Counter({f"order-{number}": 1 for number in ORDERS})
    assert booked(delivery, len(ORDERS)) == (after if times == 1 else after + before)
    assert (delivery.amounts() == delivery.expected(orders.purchases(ORDERS))) == (times == 1)


class Delivery(Process):
    """Delivery, as a process."""

    script = "order_member.py"


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("guard", ["pessimistic", "optimistic"])
def test_two_that_book_one_order_at_once(
    dsn: str, carts: orders.Carts, checkouts: Topic[OrderCheckoutCompleted], guard: Guard, done: bool
) -> None:
    """Somebody else is in the middle of his transaction, which he then commits, or not."""
    delivery = orders.delivery(checkouts, dsn, guard)
    for purchase in orders.purchases([0, 1]):
        checkouts.send(carts.check_out(purchase), purchase.id)
    checkouts.flush()
    with Reader(checkouts) as reader:
        other, record = sorted(reader.read_to_end(), key=lambda record: record.value.id, reverse=True)
    handler: Any = delivery.consumer("group").handler
    with closing(handler):
        handler(other)  # it makes the tables
        with psycopg.connect(dsn) as somebody:
            somebody.execute("insert into parcels_orders (order_id, booked) values (%s, true)", (record.value.id,))
            second = threading.Thread(target=handler, args=(record,))
            second.start()
            wait_until(lambda: others(dsn, "Lock"), 20, "the second one to wait for the first")
            (somebody.commit if done else somebody.rollback)()
        second.join(20)
    costs, booked_here = delivery.costs(), [booking.id for booking in delivery.bookings()]
    assert booked_here == [other.value.id, *([] if done else [record.value.id])]
    assert costs.orders == 2
    assert costs.repeats == (guard == "pessimistic" and done)
    assert costs.conflicts == (guard == "optimistic" and done)


def others(dsn: str, state: str = "%") -> int:
    """How many other connections there are to this database, all or those that wait for such a thing."""
    sql = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    with psycopg.connect(dsn) as database:
        return int(database.execute(sql + " and coalesce(wait_event_type, '') like %s", (state,)).fetchall()[0][0])


def test_what_books_travels_without_its_connections(
    dsn: str, carts: orders.Carts, checkouts: Topic[OrderCheckoutCompleted]
) -> None:
    purchase = next(orders.purchases([3]))
    with closing(unpack(pack(carts))) as there:
        assert there.check_out(purchase) == carts.check_out(purchase)
    for guard in orders.GUARDS:
        service = orders.inventory(checkouts, dsn, guard)
        assert unpack(pack(service)) == service
        assert isinstance(unpack(pack(service.consumer("group"))), Consumer)


def test_what_makes_no_sense_is_refused(dsn: str, checkouts: Topic[OrderCheckoutCompleted]) -> None:
    with pytest.raises(LabkitError, match="one of offset, none, pessimistic, optimistic, not 'hope'"):
        orders.delivery(checkouts, dsn, "hope")  # type: ignore[arg-type]
    with pytest.raises(LabkitError, match="cannot be a name in a view"):
        orders.delivery(checkouts, dsn, table="parcels; drop table carts")
    for guard in ("offset", "none"):
        with pytest.raises(LabkitError, match="no lock: 'pessimistic' and 'optimistic' have costs"):
            orders.delivery(checkouts, dsn, guard).costs()  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'ship'"):
        _ = orders.ship


def test_a_connection_that_is_lost_is_made_again(
    dsn: str, carts: orders.Carts, checkouts: Topic[OrderCheckoutCompleted]
) -> None:
    inventory = orders.inventory(checkouts, dsn, "pessimistic")
    first, second = orders.purchases([0, 1])
    with running(inventory) as member:
        put(checkouts, encode(carts.check_out(first)), key=first.id)
        assert booked(inventory, 1) == {first.id: 1}
        with psycopg.connect(dsn) as database:
            rest = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            database.execute(f"select pg_terminate_backend(pid, 20000) {rest}".encode())
        with pytest.raises(psycopg.OperationalError):
            carts.check_out(second)
        put(checkouts, encode(carts.check_out(second)), key=second.id)
        assert booked(inventory, 2) == {first.id: 1, second.id: 1}
        assert member.journal.of(Step.FAILED)


# -- mail --------------------------------------------------------------------------------------------------------------


def test_a_mail_leaves_again_unless_it_has_a_key(dsn: str) -> None:
    service = orders.MailService(free_ports()[0], dsn)
    with pytest.raises(MailFailed, match="no answer"):
        orders.send_mail(service.url, "order-1", "customer 1")
    stop, up = threading.Event(), threading.Event()
    thread = threading.Thread(target=service.run, args=(stop, lambda *_: up.set()))
    thread.start()
    try:
        assert up.wait(20)
        for key in (None, None, "order-1", "order-1", "order-2"):
            orders.send_mail(service.url, "order-1", "customer 1", key)
        for body in (b"", b"{}", b'{"order": 1, "to": "x"}', b"\xff"):
            status, said = ask(f"{service.url}/mails", "POST", body)
            assert status == 400, said
        with pytest.raises(MailFailed, match="answers 400"):
            orders.send_mail(service.url, 1, "customer 1")  # type: ignore[arg-type]
    finally:
        stop.set()
        thread.join(20)
    assert [(mail.order, mail.to) for mail in orders.mails(dsn)] == [("order-1", "customer 1")] * 4


def test_a_connection_whose_tables_cannot_be_made_is_closed(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a PostgreSQL that is killed just then: nobody else would close it."""
    made: list[psycopg.Connection[Any]] = []
    connect = psycopg.connect

    def kept(*args: Any, **settings: Any) -> psycopg.Connection[Any]:
        made.append(connect(*args, **settings))
        return made[-1]

    monkeypatch.setattr(psycopg, "connect", kept)
    with pytest.raises(psycopg.errors.SyntaxError), Connections(dsn, SQL("no statement")).one():
        pass
    assert [one.closed for one in made] == [True]
