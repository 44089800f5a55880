"""MetaSite: the service that owns the sites, and that everybody asks.

A site is one large object in MetaSite's PostgreSQL. Whatever a client asks for, MetaSite reads the object, takes it
apart, and answers with a piece. So it has a high load, and clients that only want the installed apps should read
elsewhere.

A change gets into the table and into the topic in one of three ways. With `dual_write` MetaSite does the one, then the
other, and loses an event if it ends in between. Otherwise it only sends the change, and `table_writer` makes the row of
it: so table and topic cannot disagree. Without a topic MetaSite only stores rows, as it always did; then change data
capture can make a topic of its table.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import psycopg
from aiohttp import web

from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import DeliveryFailed, PoisonRecord, place_of
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.patterns.projection import VERSION, version_of
from labkit.services.http import CONFIRM, HttpService, body, json
from labkit.services.sites.content import Site
from labkit.services.sites.view_reader import NAME, no_name

TABLE = "create table if not exists sites (id text primary key, version bigint not null, object jsonb)"
# A deleted site keeps its row and its version, without an object.
UPSERT = """insert into sites values (%s, %s, %s) on conflict (id) do update
set version = excluded.version, object = excluded.object where sites.version < excluded.version"""
OBJECT = "select object::text from sites where id = %s and object is not null"
NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # in JSON; PostgreSQL has no such text
REFUSED = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)  # for good
LIMIT = 100  # sites in one answer
FREE = web.AppKey("free", asyncio.Queue)  # unused connections to the database, and None for each that may still be made
_site = msgspec.json.Decoder(Site)


@dataclass(frozen=True)
class MetaSite(HttpService):
    """MetaSite's HTTP APIs, on the PostgreSQL at `dsn`. Changes go to `topic`, or without one into the table."""

    dsn: str
    topic: Topic[Site] | None = None
    connections: int = 4
    dual_write: bool = False
    between: Callable[[Site], object] = lambda site: None
    """A dual write calls this between storing the row and sending the event: here the baseline crashes."""

    def routes(self) -> Iterable[web.RouteDef]:
        yield web.get("/sites/{id}", self.whole)
        for part in ("apps", "pages", "owner", "name"):
            yield web.get(f"/sites/{{id}}/{part}", self.part(part))
        yield web.get("/apps/{app}/sites", self.with_app)
        yield web.put("/sites/{id}", self.put)
        yield web.delete("/sites/{id}", self.delete)

    async def start(self, app: web.Application) -> None:
        app[FREE] = asyncio.Queue()
        for _ in range(self.connections):
            app[FREE].put_nowait(None)

    async def finish(self, app: web.Application) -> None:
        while not app[FREE].empty():
            if (connection := app[FREE].get_nowait()) is not None:
                await connection.close()

    # -- reading

    async def whole(self, request: web.Request) -> web.Response:
        return json(await self._object(request))

    def part(self, name: str) -> Any:
        async def part(request: web.Request) -> web.Response:
            site = _site.decode(await self._object(request))
            return json({"id": site.id, "version": site.version, name: getattr(site, name)})

        return part

    async def with_app(self, request: web.Request) -> web.Response:
        """The sites that have an app: to find them, every object is looked at."""
        wanted = encode([{"name": _name(request, "app")}]).decode()
        sql = "select id from sites where object->'apps' @> %s::jsonb order by id limit %s"
        return json([row[0] for row in await self._ask(request, sql, (wanted, LIMIT))])

    async def _object(self, request: web.Request) -> bytes:
        name = _name(request)
        found = await self._ask(request, OBJECT, (name,))
        if not found:
            raise web.HTTPNotFound(text=f"there is no site {name}\n")
        return bytes(found[0][0].encode())

    # -- writing

    async def put(self, request: web.Request) -> web.Response:
        """Create or change a site: the body is its whole next version."""
        name = _name(request)
        site = await body(request, Site)
        if site.id != name:
            raise web.HTTPBadRequest(text=f"the site in the body is {site.id}, not {name}\n")
        if not 0 <= site.version < 2**63 or NUL.search(encode(site)):
            raise web.HTTPBadRequest(text="a site has a version from 0 to 2^63 - 1, and no NUL in its texts\n")
        if self.dual_write or self.topic is None:
            stored = await self._ask(request, f"{UPSERT} returning id", _row(site))
            if not stored:
                return web.Response(text="nothing to do: this version, or a newer one, is stored\n")
            self.between(site)
        return web.Response() if self.topic is None else await self._sent(self.topic, site, name)

    async def delete(self, request: web.Request) -> web.Response:
        """Delete a site: `?version=8` is the version in which it is gone."""
        name, version = _name(request), request.query.get(VERSION, "")
        if not re.fullmatch(r"[0-9]{1,19}", version) or int(version) >= 2**63:
            raise web.HTTPBadRequest(text=f"say in which version the site is gone: ?{VERSION}=8\n")
        if self.topic is None:
            await self._ask(request, f"{UPSERT} returning id", (name, int(version), None))
            return web.Response()
        return await self._sent(self.topic, None, name, {VERSION: version})

    @staticmethod
    async def _sent(
        topic: Topic[Site], site: Site | None, name: str, headers: Mapping[str, str] | None = None
    ) -> web.Response:
        try:
            await asyncio.to_thread(topic.deliver, [(site, name, headers)], CONFIRM)
        except DeliveryFailed as error:
            raise web.HTTPServiceUnavailable(text=f"Kafka does not confirm the change of {name}: {error}\n") from error
        return web.Response(status=202)

    async def _ask(self, request: web.Request, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The rows of a query, by the next free connection. Raises the answer 503 while the database is away."""
        free = request.app[FREE]
        connection: psycopg.AsyncConnection[Any] | None = await free.get()
        try:
            if connection is None or connection.broken:
                connection = None
                connection = await psycopg.AsyncConnection.connect(self.dsn, autocommit=True, connect_timeout=2)
            cursor = await connection.execute(sql, parameters)
            return await cursor.fetchall()
        except psycopg.OperationalError as error:
            raise web.HTTPServiceUnavailable(text=f"the database does not answer: {error}\n") from error
        finally:
            free.put_nowait(connection)


def _name(request: web.Request, part: str = "id") -> str:
    name = request.match_info[part]
    if not NAME.fullmatch(name):
        raise web.HTTPBadRequest(text=f"{no_name(name)}\n")
    return name


def _row(site: Site) -> tuple[str, int, str]:
    return site.id, site.version, encode(site).decode()


def _write(dsn: str, batch: Sequence[Record[Site] | PoisonRecord]) -> None:
    """The handler of `table_writer`."""
    rows = []
    for record in batch:
        try:
            rows.append(_row_of(record))
        except Exception as error:
            _pass_over(record, error)
    with psycopg.connect(dsn, connect_timeout=5) as connection, connection.cursor() as cursor:
        cursor.execute(TABLE)  # one of two that make it at once is refused, and its records come again
        connection.commit()
        try:
            cursor.executemany(UPSERT, rows)
        except REFUSED as error:
            if len(batch) > 1:
                raise  # the consumer hands them over again, one by one
            connection.rollback()
            _pass_over(batch[0], error)


def _row_of(record: Record[Site] | PoisonRecord) -> tuple[str | None, int, str | None]:
    if isinstance(record, PoisonRecord):
        raise record
    version = version_of(record)
    if version is None:
        raise ValueError("it does not say in which version the site was deleted")
    return record.key, version, None if record.value is None else encode(record.value).decode()


def _pass_over(record: Record[Site] | PoisonRecord, error: Exception) -> None:
    place = place_of(record.topic, record.partition, record.offset)
    print(f"passed over: {place}: {error}", file=sys.stderr)  # noqa: T201 - a pod's log is its stderr


def table_writer(sites: Topic[Site], dsn: str, batch: int = 100) -> Consumer:
    """The consumer that makes rows of the topic's records. A version that is stored already changes nothing, so a
    record that comes twice does no harm. A record that is no site, or that the database refuses, is passed over, with a
    line in the log. If the database is away, the consumer waits."""
    return Consumer(sites, partial(_write, dsn), batch=batch)


def fill(dsn: str, sites: Iterable[Site]) -> None:
    """Store these sites as rows, as it was before there was a topic."""
    with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(TABLE)
        with cursor.copy("copy sites from stdin") as copy:
            for site in sites:
                copy.write_row(_row(site))


def stored(dsn: str) -> Iterator[tuple[str, int, Site | None]]:
    """Every row of the table: id, version, and the site, or None if it is deleted. Streamed."""
    with psycopg.connect(dsn) as connection, connection.cursor("every_row") as cursor:
        cursor.itersize = 200
        cursor.execute("select id, version, object::text from sites order by id")
        for name, version, text in cursor:
            yield name, version, None if text is None else _site.decode(text)


def backfill(dsn: str, sites: Topic[Site]) -> int:
    """Send every row to the topic; returns how many.

    Changes must go through the topic already, so that none is missed. A change may overtake the row that was read
    before it: then the row has the older version, and views pass it over. (Until they have, the topic must not be
    compacted: compaction keeps what was sent last.)
    """
    count = 0
    for count, (name, version, site) in enumerate(stored(dsn), 1):  # noqa: B007 - the last one counts
        sites.send(site, name, None if site is not None else {VERSION: str(version)})
    sites.flush()
    return count
