"""The retry console: each of its buttons does what its method does, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lab_helpers import Order, Shipped, orders, values, wait_ready
from processes import wait_until

from labkit import Lab
from labkit.kafka.records import Record
from labkit.lab.retry_console import RetryConsole
from labkit.patterns.blocked_lanes import Skip
from labkit.patterns.retries import Policy, RetryingConsumer, blocking, dead_letter
from labkit.runtime.which_kafka import Connection


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("console")
    yield lab
    lab._end(0)


def press(console: Any, label: str) -> str:
    """Click it, and wait for what it says."""
    console.say("")
    console.refresh()
    buttons = [one for row in console.widget.children for one in getattr(row, "children", ())]
    (button,) = [one for one in buttons if getattr(one, "description", "") == label]
    button.click()
    wait_until(lambda: "></div>" not in console._says.value, 20, f"an answer to {label}")
    return str(console._says.value)


def failing(lab: Lab, retry: Policy) -> tuple[RetryConsole, Any]:
    """A deployment that refuses order 1 and all from 5 on."""
    source, target = lab.topic("orders", 1, Order), lab.topic("shipped", 1, Shipped)

    def ship(record: Record[Order]) -> None:
        if record.value.id == 1 or record.value.id >= 5:
            raise ConnectionError("no answer")
        target.send(Shipped(record.value.id), key=record.key)

    shop = lab.deploy("shop", RetryingConsumer(source, ship, retry=retry))
    wait_ready(shop)
    return lab.retry_console(shop), source


@pytest.mark.long  # test_blocked_lanes.py has what they do
def test_the_buttons_of_what_is_blocked(lab: Lab) -> None:
    console, source = failing(lab, blocking(300))
    assert "Nothing is blocked" in press(console.unblock, "Skip this record")
    assert "Failures block already" in press(console.unblock, "Resume")
    lab.load(source, orders(3), rate=1000).wait()
    first = console.wait_blocked()
    console.unblock.refresh()
    console.unblock._choice.value = first.place
    assert f"Skipped {first.place.rsplit('.', 1)[-1]}" in press(console.unblock, "Skip this record")
    wait_until(lambda: [one.id for one in values(lab.topics["shipped"])] == [0, 2], 20, "what was behind it")
    assert "until you resume" in press(console.unblock, "Skip all that fails")
    lab.load(source, orders(3, first=5), rate=1000).wait()
    assert lab.settle(20), lab.settle(0)
    assert "blocks again" in press(console.unblock, "Resume")
    old = f"skip {source.name}/0/0"  # the pod takes it back once it has heard all that was said before
    console.lanes.store.put(old, Skip("me", 0.0))
    wait_until(lambda: old not in console.lanes.store, 20, "the pod to hear of it")
    lab.load(source, orders(1, first=9), rate=1000).wait()
    assert console.wait_blocked().value == '{"id":9,"customer":"customer 9"}'
    assert len(list(console.lanes.skipped())) == 4


@pytest.mark.long
def test_the_buttons_of_dead_letters(lab: Lab) -> None:
    console, source = failing(lab, dead_letter())
    lab.load(source, orders(4, first=5), rate=1000).wait()
    wait_until(lambda: len(console.letters) == 4, 20, "four dead letters")
    review = console.review
    assert "Select dead letters first" in press(review, "Replay selected")
    review._choice.value = (first := next(iter(console.letters)),)
    assert "no answer" in review._shows.value
    assert first in review._shows.value
    assert "1 put back" in press(review, "Replay selected")
    wait_until(lambda: console.letters[first].attempts == 2, 20, "its second attempt")
    assert "4 put back" in press(review, "Replay all")
    again = lambda: min(one.attempts for one in console.letters.values()) >= 2  # noqa: E731
    wait_until(lambda: again() and console.letters[first].attempts == 3, 20, "another attempt of each")
    review.refresh()
    review._choice.value = (first,)
    assert "tick the box" in press(review, "Purge selected")
    assert len(console.letters) == 4
    console._sure.value = True
    assert "1 removed" in press(review, "Purge selected")
    assert console._sure.value is False
    wait_until(lambda: first not in console.letters, 20, "its end")
    assert len(console.table()) == 3


@pytest.mark.long
def test_a_console_says_in_one_line_what_is_on_it(connection: Connection) -> None:
    with Lab("console") as lab:
        orders = lab.topic("orders", 1, Order)

        def refuse(record: Record[Order]) -> None:
            raise ConnectionError("503")

        shop = lab.deploy("shop", RetryingConsumer(orders, refuse, retry=blocking(300)))
        lab.wait_ready(shop)
        console = lab.retry_console(shop)
        assert repr(console) == "Retries of shop: 0 blocked · 0 dead letters"
        orders.send(Order(1))
        orders.flush()
        console.wait_blocked()
        assert repr(console) == "Retries of shop: 1 blocked · 0 dead letters"
    assert repr(console).startswith("Retries of shop: ")
