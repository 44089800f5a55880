"""Business Manager owns the countries: it alone writes them, over HTTP. All others read their topic."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from labkit.kafka.consumer.steps import Measured
from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore
from labkit.services.http import CONFIRM, HttpService
from labkit.services.time_zones.countries import Country, iso_countries

COUNTRIES: web.AppKey[KeyValueStore[Country]] = web.AppKey("countries", KeyValueStore)


@dataclass(frozen=True)
class BusinessManager(HttpService):
    """GET /countries: code → name. GET /countries/{code}: one name. PUT and DELETE of a code answer 204 once the change
    is in Kafka, and 503 if it may not be."""

    countries: Topic[Country]

    def routes(self) -> Iterable[web.RouteDef]:
        one = "/countries/{code}"
        return [
            web.get("/countries", self._all),
            web.get(one, self._one),
            web.put(one, self._put),
            web.delete(one, self._delete),
        ]

    async def start(self, app: web.Application) -> None:
        app[COUNTRIES] = KeyValueStore(self.countries)
        await asyncio.to_thread(app[COUNTRIES].wait_ready)

    async def finish(self, app: web.Application) -> None:
        await asyncio.to_thread(app[COUNTRIES].close)

    def measured(self, app: web.Application) -> Iterable[Measured]:
        return [app[COUNTRIES].measured()]

    async def _all(self, request: web.Request) -> web.Response:
        return web.json_response({code: country.name for code, country in request.app[COUNTRIES].items()})

    async def _one(self, request: web.Request) -> web.Response:
        if (country := request.app[COUNTRIES].get(request.match_info["code"])) is None:
            raise web.HTTPNotFound(text="no such country")
        return web.Response(text=country.name)

    async def _put(self, request: web.Request) -> web.Response:
        code = request.match_info["code"]
        if code not in iso_countries():
            raise web.HTTPBadRequest(text=f"{code!r} is no country of ISO 3166")
        return await self._written(partial(request.app[COUNTRIES].put, code, iso_countries()[code], CONFIRM))

    async def _delete(self, request: web.Request) -> web.Response:
        return await self._written(partial(request.app[COUNTRIES].delete, request.match_info["code"], CONFIRM))

    @staticmethod
    async def _written(write: Callable[[], None]) -> web.Response:
        try:
            await asyncio.to_thread(write)
        except DeliveryFailed as error:
            raise web.HTTPServiceUnavailable(text=str(error)) from error
        return web.Response(status=204)
