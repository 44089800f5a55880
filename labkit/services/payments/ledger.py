"""The provider's clients: `charge` asks it to charge; verdicts read its ledger, their witness."""

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
    """The provider did not answer, or not with a receipt: it may have charged, or not."""


class CardDeclined(LabkitError):
    """The provider says that it will never charge this card."""


def charge(url: str, renewal: Renewal, idempotency_key: str | None = None) -> dict[str, Any]:
    """Ask the provider at `url` to charge. Returns its receipt. With a key, it charges once, however often it is asked.

    Raises ProviderFailed, CardDeclined.
    """
    who = "the payment provider"
    return receipt_of(*post(f"{url}/charges", renewal, who, ProviderFailed, idempotency_key=idempotency_key))


def receipt_of(status: int, body: bytes) -> dict[str, Any]:
    """The receipt in an answer. Raises ProviderFailed, CardDeclined."""
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
    import psycopg  # here: pods that only ask for charges need not wait for it

    with psycopg.connect(dsn) as ledger:
        return [Charge(*row) for row in ledger.execute("select id, renewal, customer, at from charges order by id")]


def calls(dsn: str) -> list[Call]:
    """All calls, in the order in which they were answered."""
    import psycopg  # here: pods that only ask for charges need not wait for it

    with psycopg.connect(dsn) as ledger:
        rows = ledger.execute("select renewal, customer, outcome, began, ended from calls order by ended, id")
        return [Call(*row) for row in rows]


def due(numbers: Iterable[int], periods: Iterable[int]) -> list[Sent]:
    """The renewals of these subscriptions for these periods. Those of one customer must be charged in order."""
    pairs = product(periods, numbers)
    return [Sent(f"{number}-{period}", f"customer {number}", order) for order, (period, number) in enumerate(pairs)]


def charged(dsn: str, renewals: Iterable[Sent]) -> list[Effect]:
    """The effects of these renewals in the ledger: one for each charge, by the provider's own clock."""
    wanted = {one.id for one in renewals}
    made = (one for one in charges(dsn) if one.renewal in wanted)
    return [Effect(one.renewal, one.customer, f"charges/{one.id}", one.at) for one in made]


def early(dsn: str, renewals: Iterable[Sent], delays: Sequence[float]) -> list[str]:
    """The renewals that were asked for again before a delay was over, by the provider's own clock.

    `delays` are the least seconds between a failed call and the next one; the last of them holds for all further calls.
    No delay follows a declined card: such a call is repeated only if a person wants it.
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
