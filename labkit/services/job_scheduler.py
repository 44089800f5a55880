"""The job scheduler: services register an endpoint and how often it is due, and it calls them.

Lab time runs fast: a month lasts as many seconds as it is told. An endpoint that fails, or does not answer in time, is
called again: that is all a scheduler knows about retrying.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import aiohttp
import msgspec
from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.services.http import HttpService

MONTHS = {"monthly": 1, "yearly": 12}


class Schedule(msgspec.Struct):
    """What a service registers: an endpoint that takes `POST {"plan": …, "period": …}`."""

    url: str
    every: Literal["monthly", "yearly"]
    first: int = 1
    """The number of the first period."""
    periods: int = 1
    """How many there are."""
    patience: float = 10.0
    """Seconds in which the endpoint promises to answer."""


def schedule(scheduler: str, wanted: Schedule) -> None:
    """Register with the scheduler at this URL. Raises LabkitError when it does not take it."""
    request = urllib.request.Request(f"{scheduler}/schedules", msgspec.json.encode(wanted))  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=5).close()  # noqa: S310 - our own service
    except OSError as error:
        raise LabkitError(f"the job scheduler at {scheduler} does not take a schedule: {error}") from error


def counts(scheduler: str) -> dict[str, int]:
    """Its figures: calls, failed calls, periods that were registered, and how many of them are done."""
    with urllib.request.urlopen(f"{scheduler}/schedules", timeout=5) as answer:  # noqa: S310 - our own service
        return dict(json.load(answer))


def finished(scheduler: str, timeout: float = 60.0) -> dict[str, int]:
    """Wait until all periods that were registered are done; its figures. Raises TimeoutError."""
    until = time.monotonic() + timeout
    while (now := counts(scheduler))["done"] < now["periods"]:
        if time.monotonic() > until:
            raise TimeoutError(f"the job scheduler is not done after {timeout:g} s: {now}")
        time.sleep(0.05)  # between two questions
    return now


@dataclass(frozen=True)
class JobScheduler(HttpService):
    """`POST /schedules` registers one; `GET /schedules` tells how many calls were made, and how many periods are done.

    `month` is how long one lasts here, `again` how soon a call that failed is repeated; in seconds.
    """

    month: float = 1.0
    again: float = 0.1

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/schedules", self.register), web.get("/schedules", self.told)]

    async def start(self, app: web.Application) -> None:
        app[JOBS], app[COUNTS] = [], {"calls": 0, "failed": 0, "periods": 0, "done": 0}

    async def finish(self, app: web.Application) -> None:
        for job in app[JOBS]:
            job.cancel()
        await asyncio.gather(*app[JOBS], return_exceptions=True)

    async def register(self, request: web.Request) -> web.Response:
        try:
            schedule = msgspec.json.decode(await request.read(), type=Schedule)
        except msgspec.DecodeError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        request.app[COUNTS]["periods"] += schedule.periods
        request.app[JOBS].append(asyncio.create_task(self._keep(request.app, schedule)))
        return web.json_response({"registered": schedule.url}, status=201)

    async def told(self, request: web.Request) -> web.Response:
        return web.json_response(request.app[COUNTS])

    async def _keep(self, app: web.Application, schedule: Schedule) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=schedule.patience)) as session:
            for period in range(schedule.first, schedule.first + schedule.periods):
                while not await self._call(app[COUNTS], session, schedule, period):
                    await asyncio.sleep(self.again)
                app[COUNTS]["done"] += 1
                await asyncio.sleep(self.month * MONTHS[schedule.every])

    async def _call(
        self, counts: dict[str, int], session: aiohttp.ClientSession, schedule: Schedule, period: int
    ) -> bool:
        counts["calls"] += 1
        with suppress(aiohttp.ClientError, TimeoutError):
            async with session.post(schedule.url, json={"plan": schedule.every, "period": period}) as answer:
                if answer.status < 300:
                    return True
        counts["failed"] += 1
        return False


JOBS = web.AppKey("jobs", list[asyncio.Task[None]])
COUNTS = web.AppKey("counts", dict[str, int])
