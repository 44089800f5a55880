"""The read side of a projection: an HTTP service over a view, which asks nobody else.

It answers while the writer, Kafka, and the owner of the objects are down, and every answer says how old it may be.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.kafka.records import encode
from labkit.kafka.topics import Topic
from labkit.patterns.projection import Staleness
from labkit.patterns.views import View, ViewUnavailable
from labkit.services.http import Handler, HttpService

LOOK = 0.5  # seconds between two looks at how far the view is behind
PAGE, LARGEST_PAGE = 100, 1000  # keys in one answer
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = ("GET", "HEAD")
JSON = {"Content-Type": "application/json"}
STALENESS, LOOKING = web.AppKey("staleness", Staleness), web.AppKey("looking", asyncio.Task[None])


@dataclass(frozen=True)
class ViewReader(HttpService):
    """Reads `view`, which is made of `topic`. As long as the view does not exist, it answers 503.

    `GET /site/site-000017` (the name of the view's key): the rows of that key; 404 if there are none.
    `GET /app/stores?limit=50` (an indexed column): the keys with that value, and `next`, the key after which the next
    page begins: `?page=site-000017`.
    Every answer has `stale`: how many records and seconds the view is behind. A refusal says why, in `error`.
    """

    view: View
    topic: Topic[Any]

    async def start(self, app: web.Application) -> None:
        staleness = Staleness(self.topic, copy(self.view))  # its own connection: a look delays no answer
        app[STALENESS], app[LOOKING] = staleness, asyncio.create_task(self._look(staleness))

    async def finish(self, app: web.Application) -> None:
        app[LOOKING].cancel()
        with suppress(asyncio.CancelledError):
            await app[LOOKING]
        self.view.close()
        app[STALENESS].view.close()

    async def _look(self, staleness: Staleness) -> None:
        while True:
            try:
                await asyncio.to_thread(staleness.look)
            except LabkitError:
                pass  # no view yet, or no Kafka: the last look grows older, and answers say so
            await asyncio.sleep(LOOK)

    def handler(self, app: web.Application) -> Handler:
        staleness = app[STALENESS]

        def with_staleness(found: dict[str, Any]) -> bytes:
            seconds = staleness.seconds
            age = None if seconds is None else round(seconds, 3)
            return encode({**found, "stale": {"records": staleness.records, "seconds": age}})

        async def answer(request: web.BaseRequest) -> web.Response:
            try:
                return web.Response(body=with_staleness(self._found(request)), headers=JSON)
            except web.HTTPException as refused:
                # "There is no such site" may be as old as any other answer.
                refused.body = with_staleness({"error": (refused.text or "").strip()})
                refused.content_type = "application/json"
                raise

        return answer

    def _found(self, request: web.BaseRequest) -> dict[str, Any]:
        if request.method not in METHODS:
            raise web.HTTPMethodNotAllowed(request.method, METHODS)
        asked, _, value = request.path[1:].partition("/")
        if asked != self.view.key and asked not in self.view.indexes:
            raise web.HTTPNotFound
        checked_name(value)
        try:
            return self._rows(value) if asked == self.view.key else self._page(asked, value, request)
        except ViewUnavailable as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        except LabkitError as error:  # text where the column has numbers, say
            raise web.HTTPBadRequest(text=f"{error}\n") from error

    def _rows(self, key: str) -> dict[str, Any]:
        found = self.view.rows(key)
        if found is None:
            raise web.HTTPNotFound(text=f"there is no {self.view.key} {key}\n")
        rows = [dict(zip(self.view.columns, row, strict=True)) for row in found]
        return {self.view.key: key, "rows": rows}

    def _page(self, column: str, value: str, request: web.BaseRequest) -> dict[str, Any]:
        limit, after = self._limit(request), request.query.get("page", "")
        if after and not NAME.fullmatch(after):
            raise web.HTTPBadRequest(text=f"page is the key after which it begins, as `next` has it, not {after!r}\n")
        found = self.view.keys(column, value, after, limit + 1)
        page = found[:limit]
        return {column: value, f"{self.view.key}s": page, "next": page[-1] if len(found) > limit else None}

    def _limit(self, request: web.BaseRequest) -> int:
        wanted = request.query.get("limit", str(PAGE))
        if not re.fullmatch(r"[0-9]{1,9}", wanted) or not 1 <= int(wanted) <= LARGEST_PAGE:
            raise web.HTTPBadRequest(text=f"limit is a number from 1 to {LARGEST_PAGE}, not {wanted!r}\n")
        return int(wanted)


def checked_name(text: str) -> str:
    """The text, if it may be a key or a value in a URL. Raises the answer 400."""
    if not NAME.fullmatch(text):
        raise web.HTTPBadRequest(text=f"{text!r} is no name: letters, digits and . _ - make one, at most 64\n")
    return text
