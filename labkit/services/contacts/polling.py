"""The baseline of showing progress: everybody asks, again and again.

The browser asks a front service, which keeps a table of progress. The front service asks the service downstream, to
which the importers report. The costs are counted: requests and queries, most of which find that nothing has changed;
and the time from a change until the browser sees it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import psycopg
from aiohttp import web
from psycopg.sql import SQL

from labkit.kafka.consumer.steps import Measured, Report, Step
from labkit.services.calls import LONG_PATIENCE, ask
from labkit.services.connections import Connections
from labkit.services.contacts.jobs import Job
from labkit.services.http import TELL, HttpService, Latency, json

TABLE = SQL(
    "create table if not exists import_progress "
    "(request text primary key, total int not null, finished int not null, changed float8 not null)"
)
READ = "select total, finished, changed from import_progress where request = %s"
ADD = "insert into import_progress values (%s, %s, 0, 0) on conflict do nothing"
UNFINISHED = "select request from import_progress where finished < total"
CHANGE = "update import_progress set finished = %s, changed = %s where request = %s"


class Polled(msgspec.Struct, frozen=True):
    """How many jobs have finished, and when the last one did, in seconds since 1970."""

    finished: int = 0
    changed: float = 0.0


class PolledProgress(Polled, frozen=True, kw_only=True):
    """How many jobs have finished, of how many."""

    total: int


class DownstreamService(HttpService):
    """Takes the report of each finished job by `POST /imports/YYY`; `GET` answers with their number. In one process."""

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/imports/{request:.+}", self.add), web.get("/imports/{request:.+}", self.show)]

    async def start(self, app: web.Application) -> None:
        app[FINISHED] = {}

    async def add(self, request: web.Request) -> web.Response:
        jobs = request.app[FINISHED].setdefault(request.match_info["request"], {})
        jobs.setdefault(await request.text(), time.time())
        return web.Response()

    async def show(self, request: web.Request) -> web.Response:
        jobs = request.app[FINISHED].get(request.match_info["request"], {})
        return json(Polled(len(jobs), max(jobs.values(), default=0.0)))


FINISHED: web.AppKey[dict[str, dict[str, float]]] = web.AppKey("finished", dict)


@dataclass(frozen=True)
class ReportsDownstream:
    """The `report` of importers, to the service at `url`."""

    url: str

    def __call__(self, job: Job, failed: bool = False) -> None:
        """Report a job. Raises OSError while nobody answers."""
        ask(f"{self.url}/imports/{job.request}", "POST", str(job.number).encode())


@dataclass(frozen=True)
class PolledFront(HttpService):
    """`PUT /imports/YYY/100` begins an import of 100 jobs; `GET /imports/YYY` shows its progress, from the table.

    Reports the count `queries`, beside the counts of its requests.
    """

    dsn: str
    downstream: str
    """The URL of the service to ask about each unfinished import."""
    every: float = 1.0
    """Seconds between two rounds of questions."""

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.put(r"/imports/{request:.+}/{total:\d+}", self.begin), web.get("/imports/{request:.+}", self.show)]

    async def start(self, app: web.Application) -> None:
        app[TABLES] = _Table(self.dsn)
        app[LOOKING] = asyncio.create_task(self._look(app[TABLES]))

    async def finish(self, app: web.Application) -> None:
        app[LOOKING].cancel()
        with suppress(asyncio.CancelledError):
            await app[LOOKING]
        app[TABLES].connections.close()

    def measured(self, app: web.Application) -> Iterable[Measured]:
        return [Measured({"queries": app[TABLES].queries}, {})]

    async def begin(self, request: web.Request) -> web.Response:
        await asyncio.to_thread(
            request.app[TABLES].ask, ADD, request.match_info["request"], request.match_info["total"]
        )
        return web.Response(status=202)

    async def show(self, request: web.Request) -> web.Response:
        found = await asyncio.to_thread(request.app[TABLES].ask, READ, request.match_info["request"])
        if not found:
            raise web.HTTPNotFound(text="there is no such import\n")
        total, finished, changed = found[0]
        return json(PolledProgress(finished, changed, total=total))

    async def _look(self, table: _Table) -> None:
        """Ask downstream about each unfinished import, and store what has changed."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LONG_PATIENCE)) as session:
            known: dict[str, int] = {}
            while True:
                with suppress(aiohttp.ClientError, TimeoutError, psycopg.Error):  # the next round may succeed
                    for (request,) in await asyncio.to_thread(table.ask, UNFINISHED):
                        async with session.get(f"{self.downstream}/imports/{request}") as answer:
                            found = msgspec.json.decode(await answer.read(), type=Polled)
                        if known.get(request) != found.finished:
                            await asyncio.to_thread(table.ask, CHANGE, found.finished, found.changed, request)
                            known[request] = found.finished
                await asyncio.sleep(self.every)


class _Table:
    """The table of progress, and the number of queries."""

    def __init__(self, dsn: str) -> None:
        self.connections = Connections(dsn, TABLE)
        self.queries = 0

    def ask(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        self.queries += 1
        with self.connections.one() as database:
            cursor = database.execute(sql.encode(), parameters)
            return cursor.fetchall() if cursor.description else []


TABLES: web.AppKey[_Table] = web.AppKey("tables", _Table)
LOOKING: web.AppKey[asyncio.Task[None]] = web.AppKey("looking", asyncio.Task)


@dataclass(frozen=True)
class PollingBrowsers:
    """Browsers that ask the front service at `url`: one for each of these imports, until the import is completed.

    Reports the counts `requests` and `changes` (answers with something new), and, as gauges, how old the newest change
    in an answer was when the browser saw it.
    """

    url: str
    requests: tuple[str, ...]
    every: float = 1.0
    """Seconds from one question to the next."""

    def run(self, stop: threading.Event, report: Report) -> None:
        """Ask until all imports are completed; report what it took until `stop` is set."""
        asyncio.run(self._run(stop, report))

    async def _run(self, stop: threading.Event, report: Report) -> None:
        seen = _Seen()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LONG_PATIENCE)) as session:
            asking = [asyncio.create_task(self._ask(session, request, seen)) for request in self.requests]
            while not stop.is_set():
                report(Step.MEASURED, seen.measured())
                await asyncio.sleep(TELL)
            for one in asking:
                one.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        report(Step.MEASURED, seen.measured())

    async def _ask(self, session: aiohttp.ClientSession, request: str, seen: _Seen) -> None:
        finished = 0
        while True:
            with suppress(aiohttp.ClientError, TimeoutError, msgspec.DecodeError):  # the browser asks again
                seen.requests += 1
                async with session.get(f"{self.url}/imports/{request}") as answer:
                    found = msgspec.json.decode(await answer.read(), type=PolledProgress)
                if found.finished > finished:
                    seen.changes += 1
                    seen.age.add(time.time() - found.changed)
                    finished = found.finished
                if finished == found.total:
                    return
            await asyncio.sleep(self.every)


class _Seen:
    """What browsers have asked and seen."""

    def __init__(self) -> None:
        self.requests = self.changes = 0
        self.age = Latency()

    def measured(self) -> Measured:
        return Measured({"requests": self.requests, "changes": self.changes}, self.age.gauges())
