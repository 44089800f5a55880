"""What one needs of the payment provider: to ask it to charge, and to read its ledger, the witness of every audit."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from labkit.kafka.errors import LabkitError

PATIENCE = 5.0  # seconds a client waits for an answer


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
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json"}
    if idempotency_key is not None:
        headers["Idempotency-Key"] = idempotency_key
    try:
        connection.request("POST", "/charges", msgspec.json.encode(renewal), headers)
        answer = connection.getresponse()
        status, body = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ProviderFailed(f"no answer from the payment provider: {type(error).__name__}") from error
    finally:
        connection.close()
    return receipt_of(status, body)


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


# -- Its ledger, read by an audit --------------------------------------------------------------------------------------


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


ANSWERED = ("charged", "repeated")


@dataclass(frozen=True)
class Account:
    """What the provider's ledger says of renewals that were due: ids by what is wrong with them."""

    due: int
    charged: int
    not_charged: list[str]
    charged_twice: list[str]
    answered_twice: list[str]
    out_of_order: list[str] | None
    """None: no order was asked for."""
    early: list[str]

    def __str__(self) -> str:
        wrong: dict[str, list[str] | None] = {
            name.replace("_", " "): ids for name, ids in vars(self).items() if name not in ("due", "charged")
        }
        counts = [f"{name} not asked" if ids is None else f"{name} {len(ids):,}" for name, ids in wrong.items()]
        named = [f"  {name}: {', '.join(ids[:10])}" for name, ids in wrong.items() if ids]
        return "\n".join([" · ".join([f"{self.due:,} due", f"{self.charged:,} charged", *counts]), *named])

    def check(self) -> str:
        """The account, if nothing is wrong. Raises Unaccounted with it."""
        if any(isinstance(ids, list) and ids for ids in vars(self).values()):
            raise Unaccounted(f"invalid: {self}")
        return str(self)


class Unaccounted(LabkitError, AssertionError):
    """Something is wrong with an account; the message names the renewals."""


def account(
    dsn: str, due: Collection[str], delays: Sequence[float], ordered: bool = True, redelivered: bool = False
) -> Account:
    """Compare the renewals that were due with the ledger. Each is to be charged once, by one answer.

    `delays`: seconds that lie at least between a failed call and the next, by the provider's own clock; the last one
    stands for all further ones. `ordered`: each customer's periods were to be charged in order. `redelivered`: a pod
    died or lost its partitions, so a renewal may have been answered again (not charged again).
    """
    wanted = set(due)
    log = [call for call in calls(dsn) if call.renewal in wanted]
    made = Counter(charge.renewal for charge in charges(dsn) if charge.renewal in wanted)
    answered = Counter(call.renewal for call in log if call.outcome in ANSWERED)
    failed: dict[str, list[Call]] = {}
    latest: dict[str, int] = {}
    early, disordered = [], []
    for call in log:
        before = failed.setdefault(call.renewal, [])
        if before and call.began < before[-1].ended + delays[min(len(before), len(delays)) - 1]:
            early.append(call.renewal)
        if call.outcome not in ANSWERED:
            before.append(call)
            continue
        period = int(call.renewal.rpartition("-")[2])
        if period < latest.get(call.customer, 0):
            disordered.append(call.renewal)
        latest[call.customer] = max(period, latest.get(call.customer, 0))
    return Account(
        due=len(wanted),
        charged=len(made),
        not_charged=sorted(wanted - made.keys()),
        charged_twice=sorted(name for name, count in made.items() if count > 1),
        answered_twice=[] if redelivered else sorted(name for name, count in answered.items() if count > 1),
        out_of_order=sorted(set(disordered)) if ordered else None,
        early=sorted(set(early)),
    )
