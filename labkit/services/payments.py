"""The payment provider: a real HTTP service that misbehaves when told to, and keeps a ledger of its own.

The ledger (PostgreSQL) is the witness of every audit: what was charged, and each call with its time and outcome.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psycopg
from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.services.http import HttpService

PATIENCE = 5.0  # seconds a client waits for an answer

TABLES = """
create table if not exists charges (
    id serial primary key, renewal text not null, customer text not null, cents int not null,
    idempotency_key text unique, at double precision not null);
create table if not exists calls (
    id serial primary key, renewal text not null, customer text not null, outcome text not null,
    began double precision not null, ended double precision not null);
"""


class Renewal(msgspec.Struct, frozen=True):
    """A request to charge one period of one subscription."""

    id: str
    """The business id: subscription and period."""
    customer: str
    period: int
    cents: int


class Misbehaviour(msgspec.Struct, frozen=True):
    """What the provider does to those who ask."""

    down: bool = False
    """Refuses everybody (503)."""
    slow: float = 0.0
    """Seconds before each answer."""
    flaky: float = 0.0
    """The share of calls that it refuses (503)."""
    wrong: bool = False
    """Answers 200 with something that is no receipt, and charges nothing."""
    drops: int = 0
    """So many charges are made, and the connection cut before the answer."""
    stuck: str = ""
    """This customer's calls end in an error (500), whatever is done."""
    declined: str = ""
    """This customer's card is declined (402): another attempt would not help."""


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


@dataclass(frozen=True)
class PaymentsProvider(HttpService):
    """`POST /charges` charges a Renewal, once for each `Idempotency-Key`; `PUT /faults` takes a Misbehaviour.

    `dsn` is the PostgreSQL of its ledger. `takes` is how long one charge takes it, in seconds.
    """

    dsn: str = ""
    takes: float = 0.01

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/charges", self.charge), web.get("/faults", self.told), web.put("/faults", self.tell)]

    async def start(self, app: web.Application) -> None:
        ledger = await psycopg.AsyncConnection.connect(self.dsn, autocommit=True)
        await ledger.execute("set synchronous_commit = off")  # it outlives the process, if not the machine
        await ledger.execute(TABLES.encode())
        app[LEDGER], app[FAULTS] = ledger, [Misbehaviour()]

    async def finish(self, app: web.Application) -> None:
        await app[LEDGER].close()

    async def told(self, request: web.Request) -> web.Response:
        return web.json_response(body=msgspec.json.encode(request.app[FAULTS][0]))

    async def tell(self, request: web.Request) -> web.Response:
        try:
            request.app[FAULTS][0] = msgspec.json.decode(await request.read(), type=Misbehaviour)
        except msgspec.DecodeError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        return await self.told(request)

    async def charge(self, request: web.Request) -> web.Response:
        began, faults = time.time(), request.app[FAULTS][0]
        try:
            renewal = msgspec.json.decode(await request.read(), type=Renewal)
        except msgspec.DecodeError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        await asyncio.sleep(self.takes + faults.slow)
        if refusal := _refusal(faults, renewal):
            outcome, answer = refusal
        elif faults.wrong:
            outcome, answer = "wrong", web.json_response({"status": "perhaps"})
        else:
            outcome, answer = await self._charge(request, renewal)
            faults = request.app[FAULTS][0]
            if outcome == "charged" and faults.drops:
                request.app[FAULTS][0] = msgspec.structs.replace(faults, drops=faults.drops - 1)
                outcome = "dropped"
        await request.app[LEDGER].execute(
            "insert into calls (renewal, customer, outcome, began, ended) values (%s, %s, %s, %s, %s)",
            (renewal.id, renewal.customer, outcome, began, time.time()),
        )
        if outcome == "dropped" and request.transport is not None:
            request.transport.abort()
        return answer

    async def _charge(self, request: web.Request, renewal: Renewal) -> tuple[str, web.Response]:
        cursor = await request.app[LEDGER].execute(
            "insert into charges (renewal, customer, cents, idempotency_key, at) values (%s, %s, %s, %s, %s) "
            "on conflict (idempotency_key) do nothing returning id",
            (renewal.id, renewal.customer, renewal.cents, request.headers.get("Idempotency-Key"), time.time()),
        )
        row = await cursor.fetchone()
        return ("charged" if row else "repeated"), web.json_response({"charge": renewal.id})


LEDGER = web.AppKey("ledger", psycopg.AsyncConnection[Any])
FAULTS = web.AppKey("faults", list[Misbehaviour])


def _refusal(faults: Misbehaviour, renewal: Renewal) -> tuple[str, web.Response] | None:
    if faults.down or random.random() < faults.flaky:  # noqa: S311
        return "refused", web.json_response({"error": "unavailable"}, status=503)
    if renewal.customer == faults.stuck:
        return "broken", web.json_response({"error": "internal error"}, status=500)
    if renewal.customer == faults.declined:
        return "declined", web.json_response({"error": "declined"}, status=402)
    return None


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
    with psycopg.connect(dsn) as ledger:
        return [Charge(*row) for row in ledger.execute("select id, renewal, customer, at from charges order by id")]


def calls(dsn: str) -> list[Call]:
    """All calls, in the order in which they were answered."""
    with psycopg.connect(dsn) as ledger:
        rows = ledger.execute("select renewal, customer, outcome, began, ended from calls order by ended, id")
        return [Call(*row) for row in rows]


def early_retries(log: Iterable[Call], delays: Iterable[float]) -> list[str]:
    """Renewals that were tried again sooner than so many seconds after each failure, by the provider's own clock."""
    wait, before, early = list(delays), dict[str, list[Call]](), list[str]()
    for call in log:
        earlier = before.setdefault(call.renewal, [])
        if earlier and call.began < earlier[-1].ended + wait[min(len(earlier), len(wait)) - 1]:
            early.append(call.renewal)
        if call.outcome not in ("charged", "repeated"):
            earlier.append(call)
    return early
