"""Events says at what local time something begins. It has the time zones of Bookings in its own memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from aiohttp import web

from labkit.kafka.consumer.steps import Measured
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore
from labkit.services.faults import ServiceFaults
from labkit.services.http import Handler, HttpService
from labkit.services.time_zones.countries import Zone

ZONES: web.AppKey[KeyValueStore[Zone]] = web.AppKey("zones", KeyValueStore)


@dataclass(frozen=True)
class Events(HttpService):
    """GET /zones: all zones, with their offsets in minutes. GET /zones/{name}: one zone.

    GET /local/{name}?utc=2026-03-29T09:00: the local time at that moment, unless clocks are put forward or back between
    now and then: the memory has a zone's present offset, and none of its rules.
    """

    zones: Topic[Zone]
    faults: ServiceFaults | None = None

    def routes(self) -> Iterable[web.RouteDef]:
        one = r"{name:[\w/+-]+}"
        return [
            web.get("/zones", self._all),
            web.get(f"/zones/{one}", self._one),
            web.get(f"/local/{one}", self._local),
        ]

    async def start(self, app: web.Application) -> None:
        app[ZONES] = KeyValueStore(self.zones)
        await asyncio.to_thread(app[ZONES].wait_ready)
        if self.faults is not None:
            await asyncio.to_thread(self.faults.wait_ready)
            app.middlewares.append(self._misbehave)

    async def finish(self, app: web.Application) -> None:
        await asyncio.to_thread(app[ZONES].close)

    def measured(self, app: web.Application) -> Iterable[Measured]:
        return [app[ZONES].measured()]

    @web.middleware
    async def _misbehave(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every request meets the fault that stands, also one whose answer would be 404."""
        if self.faults is not None:
            await self.faults.meet("events")
        return await handler(request)

    async def _all(self, request: web.Request) -> web.Response:
        return web.json_response({name: zone.offset for name, zone in request.app[ZONES].items()})

    async def _one(self, request: web.Request) -> web.Response:
        zone = self._zone(request)
        return web.json_response({"country": zone.country, "offset": zone.offset, "abbreviation": zone.abbreviation})

    async def _local(self, request: web.Request) -> web.Response:
        ahead = timedelta(minutes=self._zone(request).offset)
        try:
            utc = datetime.fromisoformat(request.query["utc"])
            if utc.tzinfo is not None:  # the answer would take it for UTC
                raise ValueError("it has an offset")
            local = utc + ahead
        except (KeyError, ValueError, OverflowError) as error:
            what = "utc must be a time like 2026-03-29T09:00, in UTC and without an offset or Z"
            raise web.HTTPBadRequest(text=what) from error
        return web.Response(text=local.isoformat(timespec="minutes"))

    @staticmethod
    def _zone(request: web.Request) -> Zone:
        name = request.match_info["name"]
        if (zone := request.app[ZONES].get(name)) is None:
            raise web.HTTPNotFound(text=f"no time zone {name!r}")
        return zone
