"""Payments Subscriptions: who pays for which class, and what is due. Its endpoint is called by the job scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import aiohttp
import msgspec
import psycopg
from aiohttp import web

from labkit.kafka.topics import Topic
from labkit.services.http import HttpService
from labkit.services.payments import CardDeclined, ProviderFailed, Renewal, receipt_of

TABLES = """
create table if not exists subscriptions (
    id int primary key, customer text not null, plan text not null, cents int not null,
    paid_through int not null default 0, claimed int not null default 0, version int not null default 0);
"""
AT_ONCE = 16  # renewals that one request of the baseline works on at a time

Lock: TypeAlias = Literal["none", "pessimistic", "optimistic"]


class Due(msgspec.Struct):
    """What the scheduler says: this plan's period has begun."""

    plan: str
    period: int


def subscribe(dsn: str, count: int, plan: str = "monthly", first: int = 0) -> None:
    """Make so many subscriptions, each of a customer of its own."""
    rows = [(number, f"customer {number}", plan, 2900) for number in range(first, first + count)]
    with psycopg.connect(dsn) as database:
        database.execute(TABLES.encode())
        with database.cursor() as cursor:
            cursor.executemany("insert into subscriptions (id, customer, plan, cents) values (%s, %s, %s, %s)", rows)


@dataclass(frozen=True)
class Polling(HttpService):
    """The baseline: `POST /due` charges all that is due, one request of the scheduler doing all the work.

    Without a lock two requests that overlap charge twice. "pessimistic" holds a row locked while it charges;
    "optimistic" claims it by its version before.
    """

    dsn: str = ""
    provider: str = ""
    lock: Lock = "none"

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/due", self.due)]

    async def start(self, app: web.Application) -> None:
        app[SESSION] = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))

    async def finish(self, app: web.Application) -> None:
        await app[SESSION].close()

    async def due(self, request: web.Request) -> web.Response:
        told = msgspec.json.decode(await request.read(), type=Due)
        rows = await _due(self.dsn, told)
        turns = asyncio.Semaphore(AT_ONCE)

        async def renew(number: int, renewal: Renewal, version: int) -> float:
            async with turns:
                try:
                    return await self._renew(request.app[SESSION], number, renewal, version)
                except (ProviderFailed, CardDeclined, aiohttp.ClientError, TimeoutError):
                    return -1.0

        waited = await asyncio.gather(*(renew(*row) for row in rows))  # though the scheduler hangs up meanwhile
        left = sum(seconds < 0 for seconds in waited)
        held = sum(seconds for seconds in waited if seconds > 0)
        return web.json_response({"left": left, "waited for locks": held}, status=503 if left else 200)

    async def _renew(self, session: aiohttp.ClientSession, number: int, renewal: Renewal, version: int) -> float:
        """Seconds that it waited for a lock, or that a conflict cost."""
        waited = 0.0
        async with await psycopg.AsyncConnection.connect(self.dsn) as database:
            if self.lock == "pessimistic":
                began = time.perf_counter()
                cursor = await database.execute(
                    "select 1 from subscriptions where id = %s and paid_through < %s for update",
                    (number, renewal.period),
                )
                waited = time.perf_counter() - began
                if await cursor.fetchone() is None:
                    return waited  # somebody else has paid it meanwhile
            elif self.lock == "optimistic":
                cursor = await database.execute(
                    "update subscriptions set claimed = %s, version = version + 1 "
                    "where id = %s and version = %s and claimed < %s",
                    (renewal.period, number, version, renewal.period),
                )
                await database.commit()
                if not cursor.rowcount:
                    return 0.0  # somebody else has it; should he crash, nobody ever will
            try:
                async with session.post(f"{self.provider}/charges", data=msgspec.json.encode(renewal)) as answer:
                    receipt_of(answer.status, await answer.read())
            except BaseException:
                await database.execute("update subscriptions set claimed = paid_through where id = %s", (number,))
                await database.commit()
                raise
            await database.execute("update subscriptions set paid_through = %s where id = %s", (renewal.period, number))
        return waited


@dataclass(frozen=True)
class Requesting(HttpService):
    """The pattern: `POST /due` only asks for renewals, by a record for each, keyed by customer, and answers 202."""

    dsn: str = ""
    renewals: Topic[Renewal] | None = None

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/due", self.due)]

    async def due(self, request: web.Request) -> web.Response:
        told = msgspec.json.decode(await request.read(), type=Due)
        rows = await _due(self.dsn, told)
        await asyncio.to_thread(self._request, [renewal for _, renewal, _ in rows])
        async with await psycopg.AsyncConnection.connect(self.dsn) as database:
            # After the topic has them: a crash in between asks again, under the same ids.
            await database.execute(
                "update subscriptions set paid_through = %s where plan = %s and paid_through < %s",
                (told.period, told.plan, told.period),
            )
        return web.json_response({"requested": len(rows)}, status=202)

    def _request(self, renewals: Iterable[Renewal]) -> None:
        assert self.renewals is not None  # noqa: S101
        for renewal in renewals:
            self.renewals.send(renewal, key=renewal.customer)
        self.renewals.flush()


SESSION = web.AppKey("session", aiohttp.ClientSession)


async def _due(dsn: str, told: Due) -> list[tuple[int, Renewal, int]]:
    async with await psycopg.AsyncConnection.connect(dsn) as database:
        cursor = await database.execute(
            "select id, customer, cents, version from subscriptions where plan = %s and paid_through < %s order by id",
            (told.plan, told.period),
        )
        rows: list[tuple[Any, ...]] = await cursor.fetchall()
    return [
        (number, Renewal(f"{number}-{told.period}", customer, told.period, cents), version)
        for number, customer, cents, version in rows
    ]
