"""Payments Subscriptions knows who pays for which class, and what is due. The job scheduler calls its endpoint."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import psycopg
from aiohttp import web

from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.topics import Topic
from labkit.services.calls import call
from labkit.services.http import CONFIRM, HttpService, body, json
from labkit.services.payments.ledger import CardDeclined, ProviderFailed, Renewal, receipt_of

TABLES = """
create table if not exists subscriptions (
    id int primary key, customer text not null, plan text not null, cents int not null,
    paid_through int not null default 0, claimed int not null default 0, version int not null default 0);
"""
AT_ONCE = 8  # renewals on which one request of the baseline works at a time

LOCKS = ("none", "pessimistic", "optimistic")


class Due(msgspec.Struct):
    """The scheduler's call: a period of this plan has begun."""

    plan: str
    period: int


def subscribe(dsn: str, numbers: Iterable[int], plan: str) -> None:
    """Make subscriptions with these numbers, each with a customer of its own; existing ones stay as they are."""
    rows = [(number, f"customer {number}", plan, 2900) for number in numbers]
    with psycopg.connect(dsn) as database:
        database.execute(TABLES.encode())
        with database.cursor() as cursor:
            cursor.executemany(
                "insert into subscriptions (id, customer, plan, cents) values (%s, %s, %s, %s) on conflict do nothing",
                rows,
            )


@dataclass(frozen=True)
class Polling(HttpService):
    """The baseline: `POST /due` charges all that is due; one request of the scheduler does all the work.

    Without a lock two requests that overlap charge twice. `?lock=pessimistic` holds a row locked while it charges;
    `?lock=optimistic` claims the row first, by its version. `GET /due?lock=…` tells what a lock costs.
    """

    dsn: str = ""
    provider: str = ""

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/due", self.due), web.get("/due", self.show_costs)]

    async def start(self, app: web.Application) -> None:
        app[COSTS] = {lock: Costs() for lock in LOCKS}
        app[SESSION] = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))

    async def finish(self, app: web.Application) -> None:
        await app[SESSION].close()

    async def show_costs(self, request: web.Request) -> web.Response:
        return json(request.app[COSTS][_lock(request)])

    async def due(self, request: web.Request) -> web.Response:
        due, lock = await body(request, Due), _lock(request)
        costs, turns = request.app[COSTS][lock], asyncio.Semaphore(AT_ONCE)

        async def renew(number: int, renewal: Renewal, version: int) -> bool:
            async with turns:
                try:
                    await self._renew(request.app, lock, number, renewal, version)
                except (ProviderFailed, CardDeclined, aiohttp.ClientError, TimeoutError, psycopg.Error):
                    return False
                return True

        costs.under_way += 1
        try:
            rows = await _due(self.dsn, due)
            renewed = await asyncio.gather(*(renew(*row) for row in rows))  # even if the scheduler hangs up meanwhile
        finally:
            costs.under_way -= 1
        left = renewed.count(False)
        return web.json_response({"left": left}, status=503 if left else 200)

    async def _renew(self, app: web.Application, lock: str, number: int, renewal: Renewal, version: int) -> None:
        costs = app[COSTS][lock]
        async with await psycopg.AsyncConnection.connect(self.dsn) as database:
            if lock == "pessimistic":
                began = time.perf_counter()
                cursor = await database.execute(
                    "select 1 from subscriptions where id = %s and paid_through < %s for update",
                    (number, renewal.period),
                )
                costs.waited += time.perf_counter() - began
                if await cursor.fetchone() is None:
                    return  # somebody else has paid it meanwhile
            elif lock == "optimistic":
                cursor = await database.execute(
                    "update subscriptions set claimed = %s, version = version + 1 "
                    "where id = %s and version = %s and claimed < %s",
                    (renewal.period, number, version, renewal.period),
                )
                await database.commit()
                if not cursor.rowcount:
                    costs.conflicts += 1
                    return  # somebody else has claimed it; if he crashes, nobody ever charges it
            try:
                async with app[SESSION].post(f"{self.provider}/charges", data=msgspec.json.encode(renewal)) as answer:
                    receipt_of(answer.status, await answer.read())
            except BaseException:
                await database.execute("update subscriptions set claimed = paid_through where id = %s", (number,))
                await database.commit()
                raise
            await database.execute("update subscriptions set paid_through = %s where id = %s", (renewal.period, number))


class Costs(msgspec.Struct):
    """What a lock has cost the baseline so far."""

    under_way: int = 0
    """Requests under way now, also those whose caller has hung up."""
    waited: float = 0.0
    """Seconds that requests waited for locked rows, each holding a connection to the database."""
    conflicts: int = 0
    """Rows that somebody else had claimed first."""


def costs(polling: str, lock: str, timeout: float = 30.0) -> Costs:
    """The costs of this lock, from the service at this URL, once no request with it is under way.

    Raises TimeoutError when that takes longer than `timeout` seconds.
    """
    until = time.monotonic() + timeout
    while True:
        found = msgspec.json.decode(call(f"{polling}/due?lock={lock}")[1], type=Costs)
        if not found.under_way:
            return found
        if time.monotonic() > until:
            raise TimeoutError(f"{found.under_way} requests are still under way after {timeout:g} s")
        time.sleep(0.02)  # between two questions


@dataclass(frozen=True)
class Requesting(HttpService):
    """The pattern: `POST /due` only sends a record for each renewal, keyed by customer, and answers 202.

    It answers 503 if Kafka does not confirm all of them: then none counts as requested, and the scheduler calls again.
    """

    dsn: str = ""
    renewals: Topic[Renewal] | None = None

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/due", self.due)]

    async def due(self, request: web.Request) -> web.Response:
        due = await body(request, Due)
        rows = await _due(self.dsn, due)
        try:
            await asyncio.to_thread(self._request, [renewal for _, renewal, _ in rows])
        except DeliveryFailed as error:
            raise web.HTTPServiceUnavailable(text=f"Kafka does not confirm all renewals: {error}\n") from error
        async with await psycopg.AsyncConnection.connect(self.dsn) as database:
            # After the topic has them: after a crash in between, the same ids are requested again.
            await database.execute(
                "update subscriptions set paid_through = %s where id = any(%s) and paid_through < %s",
                (due.period, [number for number, _, _ in rows], due.period),
            )
        return web.json_response({"requested": len(rows)}, status=202)

    def _request(self, renewals: Iterable[Renewal]) -> None:
        assert self.renewals is not None  # noqa: S101
        self.renewals.deliver(((renewal, renewal.customer, None) for renewal in renewals), CONFIRM)


COSTS = web.AppKey("costs", dict[str, Costs])
SESSION = web.AppKey("session", aiohttp.ClientSession)


def _lock(request: web.Request) -> str:
    lock = request.query.get("lock", "none")
    if lock not in LOCKS:
        raise web.HTTPBadRequest(text=f"a lock is one of {', '.join(LOCKS)}")
    return lock


async def _due(dsn: str, due: Due) -> list[tuple[int, Renewal, int]]:
    async with await psycopg.AsyncConnection.connect(dsn) as database:
        cursor = await database.execute(
            "select id, customer, cents, version from subscriptions where plan = %s and paid_through < %s order by id",
            (due.plan, due.period),
        )
        rows: list[tuple[Any, ...]] = await cursor.fetchall()
    return [
        (number, Renewal(f"{number}-{due.period}", customer, due.period, cents), version)
        for number, customer, cents, version in rows
    ]
