"""The payment provider: a real HTTP service with a ledger of its own, which misbehaves on demand.

The ledger (PostgreSQL) is the witness of every verdict: it has each charge, and each call with its time and outcome.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psycopg
from aiohttp import web
from msgspec.structs import replace

from labkit.services.calls import IDEMPOTENCY_KEY
from labkit.services.faults import FAULTS, HttpMisbehaviour, Misbehaving
from labkit.services.http import body
from labkit.services.payments.ledger import Renewal

TABLES = """
create table if not exists charges (
    id serial primary key, renewal text not null, customer text not null, cents int not null,
    idempotency_key text unique, at double precision not null);
create table if not exists calls (
    id serial primary key, renewal text not null, customer text not null, outcome text not null,
    began double precision not null, ended double precision not null);
"""


class ProviderMisbehaviour(HttpMisbehaviour, frozen=True):
    """The provider's faults. It cuts a connection only after it has charged."""

    stuck: str = ""
    """A customer whose every call ends in an error (500)."""
    declined: str = ""
    """A customer whose card is declined (402): another attempt would not help."""


@dataclass(frozen=True)
class PaymentsProvider(Misbehaving):
    """`POST /charges` charges a Renewal, once for each `Idempotency-Key`; `PUT /faults` takes a ProviderMisbehaviour.

    `dsn` is the PostgreSQL of its ledger. `takes` is how long a charge takes, in seconds.
    """

    dsn: str = ""
    takes: float = 0.01

    kind = ProviderMisbehaviour

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/charges", self.charge), *super().routes()]

    async def start(self, app: web.Application) -> None:
        await super().start(app)
        ledger = await psycopg.AsyncConnection.connect(self.dsn, autocommit=True)
        await ledger.execute("set synchronous_commit = off")  # the ledger survives the process, if not the machine
        await ledger.execute(TABLES.encode())
        app[LEDGER] = ledger

    async def finish(self, app: web.Application) -> None:
        await app[LEDGER].close()

    async def charge(self, request: web.Request) -> web.Response:
        began, faults = time.time(), request.app[FAULTS][0]
        renewal = await body(request, Renewal)
        await asyncio.sleep(self.takes + faults.delay)
        if refusal := _refusal(faults, renewal):
            outcome, answer = refusal
        elif faults.wrong:
            outcome, answer = "wrong", web.json_response({"status": "perhaps"})
        else:
            outcome, answer = await self._charge(request, renewal)
            faults = request.app[FAULTS][0]
            if outcome == "charged" and faults.cut:
                request.app[FAULTS][0] = replace(faults, cut=faults.cut - 1)
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
            (renewal.id, renewal.customer, renewal.cents, request.headers.get(IDEMPOTENCY_KEY), time.time()),
        )
        row = await cursor.fetchone()
        return ("charged" if row else "repeated"), web.json_response({"charge": renewal.id})


LEDGER = web.AppKey("ledger", psycopg.AsyncConnection[Any])


def _refusal(faults: ProviderMisbehaviour, renewal: Renewal) -> tuple[str, web.Response] | None:
    if faults.refuses():
        return "refused", web.json_response({"error": "unavailable"}, status=faults.status)
    if renewal.customer == faults.stuck:
        return "broken", web.json_response({"error": "internal error"}, status=500)
    if renewal.customer == faults.declined:
        return "declined", web.json_response({"error": "declined"}, status=402)
    return None
