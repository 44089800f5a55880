"""The baselines of counting finished jobs. Each is a `report` for importers, and knows how many it has counted.

Both count a job twice that is reported twice. A restart, or a second pod, shows what else is wrong with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from aiohttp import web
from psycopg.sql import SQL

from labkit.kafka.errors import LabkitError
from labkit.services.calls import ask
from labkit.services.connections import Connections
from labkit.services.contacts.jobs import Job
from labkit.services.http import HttpService

TABLE = SQL("create table if not exists imports (request text primary key, finished int not null)")
READ = "select finished from imports where request = %s"
WRITE = "insert into imports values (%s, %s) on conflict (request) do update set finished = excluded.finished"


class CounterService(HttpService):
    """Counts in its memory: `POST /imports/YYY` adds one, and `GET` answers with the count.

    After a restart of its pod it begins at 0. Of several pods, each has a count of its own.
    """

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/imports/{request}", self.add), web.get("/imports/{request}", self.show)]

    async def start(self, app: web.Application) -> None:
        app[COUNTS] = Counter()

    async def add(self, request: web.Request) -> web.Response:
        request.app[COUNTS][request.match_info["request"]] += 1
        return await self.show(request)

    async def show(self, request: web.Request) -> web.Response:
        return web.json_response(request.app[COUNTS][request.match_info["request"]])


COUNTS: web.AppKey[Counter[str]] = web.AppKey("counts", Counter)


@dataclass(frozen=True)
class InMemory:
    """Reports to the CounterService at `url`."""

    url: str

    def __call__(self, job: Job, failed: bool = False) -> None:
        """Count a job. Raises LabkitError, OSError when it was not counted, as far as one can tell."""
        self._ask("POST", job.request)

    def counted(self, request: str) -> int:
        """How many jobs of a request are finished, according to the service."""
        return self._ask("GET", request)

    def _ask(self, method: str, request: str) -> int:
        status, said = ask(f"{self.url}/imports/{quote(request, safe='')}", method)
        if status != 200:
            raise LabkitError(f"the counter answers {status}: {said}")
        return int(said)


class SharedRow:
    """Reads the count of a request from its row in PostgreSQL, adds one, and writes it: so it may overwrite another's.

    `between` is called between reading and writing, when another pod may count, too.
    """

    def __init__(self, dsn: str, between: Callable[[], object] = lambda: None) -> None:
        self.between = between
        self.database = Connections(dsn, TABLE)

    def __call__(self, job: Job, failed: bool = False) -> None:
        """Count a job. Raises psycopg.Error while the database is away."""
        with self.database.one() as database:
            row: Any = database.execute(READ, (job.request,)).fetchone()
            self.between()
            database.execute(WRITE, (job.request, 1 + (row[0] if row else 0)))

    def counted(self, request: str) -> int:
        """How many jobs of a request are finished, according to its row."""
        with self.database.one() as database:
            row: Any = database.execute(READ, (request,)).fetchone()
            return row[0] if row else 0

    def close(self) -> None:
        self.database.close()
