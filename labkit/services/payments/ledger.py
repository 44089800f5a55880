"""What one needs of the payment provider: to ask it to charge, and to read its ledger, the witness of every verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import msgspec

from labkit.kafka.effects import Effect, Sent
from labkit.kafka.errors import LabkitError
from labkit.services.calls import post


class Renewal(msgspec.Struct, frozen=True):
    """A request to charge one period of one subscription."""

    id: str
    """The business id: subscription and period."""
    customer: str
    period: int
    cents: int


class ProviderFailed(LabkitError):
    """The provider did not answer, or not with a receipt: it may have charged or not."""


class CardDeclined(LabkitError):
    """The provider says that this card will not be charged, ever."""


def charge(url: str, renewal: Renewal, idempotency_key: str | None = None) -> dict[str, Any]:
    """Ask the provider at `url` to charge; its receipt. With a key the same charge is made once, however often asked.

    Raises ProviderFailed, CardDeclined.
    """
    who = "the payment provider"
    return receipt_of(*post(f"{url}/charges", renewal, who, ProviderFailed, idempotency_key=idempotency_key))


def receipt_of(status: int, body: bytes) -> dict[str, Any]:
    """What an answer means. Raises ProviderFailed, CardDeclined."""
    if status == 402:
        raise CardDeclined("the card is declined")
    if status != 200:
        raise ProviderFailed(f"the payment provider answers {status}")
    try:
        receipt = json.loads(body)
        if "charge" not in receipt:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise ProviderFailed("the payment provider answers something that is no receipt") from error
    return dict(receipt)


# -- Its ledger, read by a verdict -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Charge:
    """One row of the ledger."""

    id: int
    renewal: str
    customer: str
    at: float


@dataclass(frozen=True)
class Call:
    """One call, and what became of it: charged, repeated, dropped, refused, broken, declined or wrong."""

    renewal: str
    customer: str
    outcome: str
    began: float
    ended: float


def charges(dsn: str) -> list[Charge]:
    """All charges, oldest first."""
    import psycopg  # pods that only ask for charges wait for no database library

    with psycopg.connect(dsn) as ledger:
        return [Charge(*row) for row in ledger.execute("select id, renewal, customer, at from charges order by id")]


def calls(dsn: str) -> list[Call]:
    """All calls, in the order in which they were answered."""
    import psycopg  # pods that only ask for charges wait for no database library

    with psycopg.connect(dsn) as ledger:
        rows = ledger.execute("select renewal, customer, outcome, began, ended from calls order by ended, id")
        return [Call(*row) for row in rows]


def due(numbers: Iterable[int], periods: Iterable[int]) -> list[Sent]:
    """The renewals of these subscriptions for these periods: each customer's are to be charged in order."""
    pairs = product(periods, numbers)
    return [Sent(f"{number}-{period}", f"customer {number}", order) for order, (period, number) in enumerate(pairs)]


def charged(dsn: str, renewals: Iterable[Sent]) -> list[Effect]:
    """What the ledger says of these renewals: an effect for each charge, by the provider's own clock."""
    wanted = {one.id for one in renewals}
    made = (one for one in charges(dsn) if one.renewal in wanted)
    return [Effect(one.renewal, one.customer, f"charges/{one.id}", one.at) for one in made]


def early(dsn: str, renewals: Iterable[Sent], delays: Sequence[float]) -> list[str]:
    """Those of these renewals that the provider was asked for before a delay was over, by its own clock.

    `delays`: seconds that lie at least between a failed call and the next; the last one stands for all further ones.
    No delay follows a declined card: that call is not repeated, unless somebody asks for it.
    """
    failed: dict[str, list[Call]] = {one.id: [] for one in renewals}
    found = []
    for call in calls(dsn):
        if (before := failed.get(call.renewal)) is None:
            continue
        if before and call.began < before[-1].ended + delays[min(len(before), len(delays)) - 1]:
            found.append(call.renewal)
        if call.outcome not in ("charged", "repeated", "declined"):
            before.append(call)
    return found
