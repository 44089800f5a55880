"""Contacts Jobs over HTTP: takes the CSV of a browser, answers at once, and sends the jobs after the answer.

An upload goes to a temporary file, so that a large one needs no memory. A file that is no CSV of contacts is refused in
the answer. An answer of 202 says that the file is here and good; notices then say how far the import is. If the process
is killed before all jobs are sent, the import stays incomplete, and its page shows that.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import IO

import msgspec
import psycopg
from aiohttp import web

from labkit.kafka.errors import DeliveryFailed, LabkitError, Unavailable
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore
from labkit.services.contacts import page
from labkit.services.contacts.jobs import ContactsJob, send, split
from labkit.services.contacts.notices import ImportNotice, Notify, request_of
from labkit.services.contacts.reports import Progress
from labkit.services.contacts.state import states
from labkit.services.http import HttpService
from labkit.services.notifications.channels import ChannelExpired, Channels, ChannelUnknown

PIECE = 1 << 16  # bytes of an upload in memory
CODE_PAGE = re.compile(r"(windows-125\d|iso-8859-\d{1,2})", re.IGNORECASE)
AGAIN = 1.0  # seconds from one attempt to send the jobs to the next


@dataclass(frozen=True)
class ContactsJobs(HttpService):
    """`GET /` is the page of imports. `POST /channels/{channel}/imports` takes a CSV as its body, and answers with an
    empty 202, whose header Import-Request has the import's name in notices. The CSV is UTF-8 or UTF-16, or in the code
    page that the request names: `Content-Type: text/csv; charset=windows-1252`.

    A refusal says why: 400 (no CSV of contacts, or it broke off), 403 (no such channel), 408 (it stalls), 410 (the
    channel's time is over), 413, 503 (too many at once, or Kafka is away). `GET` of the same path, with the channel's
    key in the header Channel-Key, answers with the state of its imports, as a JSON list: see `ImportState`.
    """

    jobs: Topic[ContactsJob]
    notify: Notify
    """Returns once the notice is safe, or raises DeliveryFailed."""
    secret: str = field(repr=False)
    """The secret that signs channels, as in the notification service."""
    imports: Topic[Progress]
    """The store in which the importers' reports are counted."""
    dsn: str
    """The importers' database."""
    notifications_port: int
    """The port of the notification service, from which the page gets notices."""
    size: int = 100
    """Rows of a job."""
    largest: int = 1 << 28
    """Bytes of a file."""
    patience: float = 20.0
    """Seconds for each 64 KiB of an upload: a slower one counts as stalled."""
    at_once: int = 4
    """Imports that one process receives or sends at the same time."""

    def routes(self) -> Iterable[web.RouteDef]:
        path = "/channels/{channel}/imports"
        return [*page.routes(self.notifications_port), web.post(path, self.take), web.get(path, self.show)]

    async def start(self, app: web.Application) -> None:
        app[FREE], app[STOPPING], app[SENDING] = asyncio.Semaphore(self.at_once), asyncio.Event(), set()
        app[CHANNELS] = Channels(self.secret)
        app[IMPORTS] = await asyncio.to_thread(KeyValueStore(self.imports).wait_ready)

    async def finish(self, app: web.Application) -> None:
        """Send the accepted files to the end; once more, if Kafka does not confirm."""
        app[STOPPING].set()
        await asyncio.gather(*app[SENDING])
        await asyncio.to_thread(app[IMPORTS].close)

    async def show(self, request: web.Request) -> web.Response:
        channel = self._channel(request, request.headers.get("Channel-Key", ""))
        try:
            found = await asyncio.to_thread(states, request.app[IMPORTS], self.dsn, channel)
        except (Unavailable, psycopg.Error) as error:
            raise web.HTTPServiceUnavailable(text=f"the state cannot be read now: {error}\n") from error
        return web.json_response(body=msgspec.json.encode(found), headers={"Cache-Control": "no-store"})

    async def take(self, request: web.Request) -> web.Response:
        channel = self._channel(request)
        if (request.content_length or 0) > self.largest:
            raise self._too_large(request.content_length or 0)
        if request.app[FREE].locked():
            text = f"{self.at_once} imports are under way: upload again in a second\n"
            raise web.HTTPServiceUnavailable(text=text, headers={"Retry-After": "1"})
        await request.app[FREE].acquire()
        with ExitStack() as held:
            held.callback(request.app[FREE].release)
            file = held.enter_context(tempfile.TemporaryFile())
            await self._receive(request, file)
            name = request_of(channel, f"{time.time_ns():016x}{secrets.token_hex(4)}")  # sorts by time
            try:
                total, made = await asyncio.to_thread(self._split, file, name)
            except LabkitError as error:
                raise web.HTTPBadRequest(text=f"{error}\n") from error
            try:
                await asyncio.to_thread(self.notify, channel, ImportNotice("accepted", name, total))
            except DeliveryFailed as error:
                raise web.HTTPServiceUnavailable(text=f"Kafka is away, upload again later: {error}\n") from error
            sending = asyncio.create_task(self._send(request.app, file, name, made, held.pop_all()))
        request.app[SENDING].add(sending)
        sending.add_done_callback(request.app[SENDING].discard)
        return web.Response(status=202, headers={"Import-Request": name})

    def _channel(self, request: web.Request, key: str | None = None) -> str:
        """The channel in the URL, if it is valid, and `key`, if there is one, is its key."""
        channel, channels = request.match_info["channel"], request.app[CHANNELS]
        try:
            if key is None:
                channels.check(channel)
            else:
                channels.check_owner(channel, key)
        except ChannelUnknown as error:
            raise web.HTTPForbidden(text=f"{error}\n") from error
        except ChannelExpired as error:
            raise web.HTTPGone(text=f"{error}\n") from error
        return channel

    async def _receive(self, request: web.Request, file: IO[bytes]) -> None:
        size, more = 0, True
        decoder = _decoder(request)
        while more:
            try:
                async with asyncio.timeout(self.patience):
                    piece = await request.content.readexactly(PIECE)
            except asyncio.IncompleteReadError as end:
                piece, more = end.partial, False
            except TimeoutError as error:
                text = f"the upload stalls: {PIECE:,} bytes must come within {self.patience:g} s\n"
                raise web.HTTPRequestTimeout(text=text) from error
            except (OSError, web.RequestPayloadError) as error:
                raise web.HTTPBadRequest(text="the upload broke off\n") from error
            size += len(piece)
            if size > self.largest:
                raise self._too_large(size)
            if decoder is not None:
                piece = _as_utf_8(decoder, piece, not more)
            await asyncio.to_thread(file.write, piece)

    def _too_large(self, size: int) -> web.HTTPException:
        text = f"the file is larger than {self.largest:,} bytes: split it\n"
        return web.HTTPRequestEntityTooLarge(self.largest, size, text=text)

    def _split(self, file: IO[bytes], request: str) -> tuple[int, Iterator[ContactsJob]]:
        """The number of jobs, and the jobs."""
        made = split(file, request, self.size)
        first = next(made)
        return first.total, chain((first,), made)

    async def _send(
        self, app: web.Application, file: IO[bytes], request: str, made: Iterator[ContactsJob], held: ExitStack
    ) -> None:
        """Send the jobs, again from the file until Kafka confirms them. A job that comes twice counts once."""
        with held:
            while True:
                last = app[STOPPING].is_set()
                try:
                    await asyncio.to_thread(send, made, self.jobs)
                    return
                except LabkitError as error:
                    then = "it stays incomplete" if last else "it is sent again"
                    print(f"import {request}: {then}: {error}", file=sys.stderr, flush=True)  # noqa: T201
                if last:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(app[STOPPING].wait(), AGAIN)
                made = split(file, request, self.size)


def _decoder(request: web.Request) -> codecs.IncrementalDecoder | None:
    """A decoder of the code page that the request names. UTF-8 and UTF-16 show in the file."""
    page = CODE_PAGE.fullmatch(request.charset or "")
    try:
        return codecs.getincrementaldecoder(page[0])() if page else None
    except LookupError as error:
        raise web.HTTPBadRequest(text=f"{error}\n") from error


def _as_utf_8(decoder: codecs.IncrementalDecoder, piece: bytes, final: bool) -> bytes:
    try:
        return decoder.decode(piece, final).encode()
    except UnicodeDecodeError as error:
        raise web.HTTPBadRequest(text=f"the file is not in the code page that the request names: {error}\n") from error


FREE = web.AppKey("free", asyncio.Semaphore)
STOPPING = web.AppKey("stopping", asyncio.Event)
SENDING = web.AppKey("sending", set[asyncio.Task[None]])
CHANNELS = web.AppKey("channels", Channels)
IMPORTS: web.AppKey[KeyValueStore[Progress]] = web.AppKey("imports", KeyValueStore)
