"""The job scheduler: a service registers an endpoint, and how often it is due; the scheduler calls it.

Lab time runs fast: a month lasts `month` seconds. If an endpoint fails, or does not answer in time, the scheduler calls
it again: that is all that a scheduler knows about retrying. A schedule that is registered twice runs once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import aiohttp
import msgspec
from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.services.calls import call
from labkit.services.http import HttpService, body, json

MONTHS = {"monthly": 1, "yearly": 12}


class Schedule(msgspec.Struct, frozen=True):
    """What a service registers: an endpoint that takes `POST {"plan": …, "period": …}`."""

    url: str
    every: Literal["monthly", "yearly"]
    first: int = 1
    """The number of the first period."""
    periods: int = 1
    """How many periods there are."""
    patience: float = 10.0
    """Seconds in which the endpoint must answer."""


class Progress(msgspec.Struct):
    """How far the scheduler has got with a schedule."""

    schedule: Schedule
    calls: int = 0
    failed: int = 0
    done: int = 0
    """Periods whose call was successful."""


def schedule(scheduler: str, wanted: Schedule) -> None:
    """Register a schedule with the scheduler at this URL, unless the same schedule is registered.

    Raises LabkitError when the scheduler does not take it.
    """
    try:
        call(f"{scheduler}/schedules", "POST", wanted)
    except OSError as error:
        raise LabkitError(f"the job scheduler at {scheduler} does not take a schedule: {error}") from error


def finished(scheduler: str, wanted: Schedule, timeout: float = 60.0) -> Progress:
    """Wait until all periods of this schedule are done. Returns how many calls that took.

    Raises TimeoutError; LabkitError when the schedule is not registered; OSError when no scheduler answers.
    """
    until = time.monotonic() + timeout
    while True:
        there = msgspec.json.decode(call(f"{scheduler}/schedules")[1], type=list[Progress])
        now = next((one for one in there if one.schedule == wanted), None)
        if now is None:
            raise LabkitError(f"the job scheduler at {scheduler} does not know {wanted}: schedule it first")
        if now.done >= wanted.periods:
            return now
        if time.monotonic() > until:
            raise TimeoutError(f"the job scheduler is not done after {timeout:g} s: {now}")
        time.sleep(0.05)  # between two questions


@dataclass(frozen=True)
class JobScheduler(HttpService):
    """`POST /schedules` registers a schedule; `GET /schedules` lists all, with the number of calls for each.

    `month` is the length of a month, `again` the time until a failed call is repeated; both in seconds.
    """

    month: float = 1.0
    again: float = 0.1

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/schedules", self.register), web.get("/schedules", self.show)]

    async def start(self, app: web.Application) -> None:
        app[JOBS], app[PROGRESS] = [], {}

    async def finish(self, app: web.Application) -> None:
        for job in app[JOBS]:
            job.cancel()
        await asyncio.gather(*app[JOBS], return_exceptions=True)

    async def register(self, request: web.Request) -> web.Response:
        schedule = await body(request, Schedule)
        if schedule in request.app[PROGRESS]:
            return web.json_response({"known": schedule.url})
        request.app[PROGRESS][schedule] = progress = Progress(schedule)
        request.app[JOBS].append(asyncio.create_task(self._keep(schedule, progress)))
        return web.json_response({"registered": schedule.url}, status=201)

    async def show(self, request: web.Request) -> web.Response:
        return json(list(request.app[PROGRESS].values()))

    async def _keep(self, schedule: Schedule, progress: Progress) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=schedule.patience)) as session:
            for period in range(schedule.first, schedule.first + schedule.periods):
                while not await self._call(progress, session, period):
                    await asyncio.sleep(self.again)
                progress.done += 1
                await asyncio.sleep(self.month * MONTHS[schedule.every])

    async def _call(self, progress: Progress, session: aiohttp.ClientSession, period: int) -> bool:
        schedule = progress.schedule
        progress.calls += 1
        with suppress(aiohttp.ClientError, TimeoutError):
            async with session.post(schedule.url, json={"plan": schedule.every, "period": period}) as answer:
                if answer.status < 300:
                    return True
        progress.failed += 1
        return False


JOBS = web.AppKey("jobs", list[asyncio.Task[None]])
PROGRESS = web.AppKey("progress", dict[Schedule, Progress])
