"""The WebSocket service: it tells each page what concerns it, and nothing else."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from labkit.kafka.consumer.steps import Measured
from labkit.kafka.errors import Unavailable
from labkit.kafka.topics import Topic
from labkit.patterns.notice_window import Bounds
from labkit.patterns.notifications import Notifications, Subscription, Told
from labkit.services.http import HttpService
from labkit.services.notifications.channels import ChannelExpired, Channels, ChannelUnknown

LONGEST = 8192  # bytes of what a page says
HELLO = 5.0  # seconds for a page to say which channel it wants
BEAT = 10.0  # seconds until a page in which nothing happens is told its position
DEAD = 30.0  # seconds from one ping to the next; a page that does not answer is gone
CLOSING = 2.0  # seconds for a page to say good-bye too
UNSENT = 65_536  # bytes that the kernel holds for a page that does not read


class CloseCode(IntEnum):
    """Why a connection was closed. Of a message that is too big, 1009; of an instance that ends, 1001; of a page that
    did not read there is none (1006). After these three it comes back with its position."""

    BAD_MESSAGE = 4400
    NOT_YOURS = 4403
    """No channel of ours, or somebody else's: open another one."""
    EXPIRED = 4410
    """Open another one."""
    TOO_MANY = 4429
    """It said more than which channel it wants."""
    UNAVAILABLE = 4503
    """The topic cannot be read now: come back later."""


class Hello(msgspec.Struct, frozen=True):
    """What a page says first, and only once."""

    channel: str
    key: str
    position: str = ""
    """Where it is: as it was told last. Without one it starts over."""


@dataclass(frozen=True)
class NotificationService(HttpService):
    """`POST /channels` opens a channel: `{"channel": …, "key": …, "position": …, "expires": …}`.

    `GET /notifications` is a WebSocket. The page says `{"channel": …, "key": …, "position": …}`. It is told
    `{"outcome": "nothing missed" | "missed" | "start over", "position": …}` and then `{"position": …, "id": …,
    "notice": …}` for each notice. When nothing happens it is told `{"position": …}` from time to time. It keeps the
    last position, and says it when it comes back, to whichever instance. It shows each id once: what was *sent* twice
    comes twice.

    Only pages of these `origins` are served, and of its own address.
    """

    topic: Topic[Any]
    secret: str = field(repr=False)
    """Signs channels: of the same in all instances, and in all services that are given channels."""
    origins: tuple[str, ...] = ()
    """Other addresses under which its page is shown, such as `https://lab.example.org`."""
    bounds: Bounds = Bounds()  # noqa: RUF009 - it never changes
    connections: int = 2000
    """Pages of one instance. One more is refused."""
    openings: float = 100.0
    """Channels that one instance opens in a second."""
    lifetime: float = 24 * 3600.0
    """Seconds for which a channel is good."""

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/channels", self._open), web.get("/notifications", self._connect)]

    async def start(self, app: web.Application) -> None:
        app[CHANNELS], app[OPENINGS], app[SOCKETS] = Channels(self.secret), Rate(self.openings), set()
        app[NOTIFICATIONS] = await asyncio.to_thread(Notifications(self.topic, self.bounds).__enter__)
        app.on_shutdown.append(self._end)

    async def finish(self, app: web.Application) -> None:
        await asyncio.to_thread(app[NOTIFICATIONS].close)

    def measured(self, app: web.Application) -> Iterable[Measured]:
        return [app[NOTIFICATIONS].measured()]

    async def _end(self, app: web.Application) -> None:
        """Send the pages to another instance."""
        closing = (one.close(code=WSCloseCode.GOING_AWAY) for one in app[SOCKETS].copy())
        await asyncio.gather(*closing, return_exceptions=True)  # one may just be opening

    def _check_origin(self, request: web.Request) -> None:
        """A browser says which page asks. The list is fixed: a page elsewhere can give this address another name."""
        own = (self.url, f"http://localhost:{self.port}")
        if request.headers.get("Origin") not in (*own, *self.origins):
            raise web.HTTPForbidden(text="only pages of this service are served: the header Origin names another one\n")

    async def _open(self, request: web.Request) -> web.Response:
        self._check_origin(request)
        if not request.app[OPENINGS].allows():
            raise web.HTTPTooManyRequests(text="too many channels at once: try again in a second\n")
        try:
            position = request.app[NOTIFICATIONS].position()
        except Unavailable as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        made = request.app[CHANNELS].make(self.lifetime)
        told = {"channel": made.id, "key": made.key, "expires": made.expires, "position": position}
        return web.json_response(told, status=201, headers={"Cache-Control": "no-store"})

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        self._check_origin(request)
        sockets = request.app[SOCKETS]
        if len(sockets) >= self.connections:
            raise web.HTTPServiceUnavailable(text=f"{self.connections} pages are connected: try again later\n")
        page = web.WebSocketResponse(heartbeat=DEAD, compress=False, max_msg_size=LONGEST, timeout=CLOSING)
        sockets.add(page)
        try:
            await page.prepare(request)
            if (line := page.get_extra_info("socket")) is not None:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT)
            await self._subscribe(request, page)
        finally:
            sockets.discard(page)
        return page

    async def _subscribe(self, request: web.Request, page: web.WebSocketResponse) -> None:
        try:
            hello = await self._hello(page)
            if hello is None:
                return
            expires = request.app[CHANNELS].check_owner(hello.channel, hello.key)
            connection = _Connection(request, page, expires)
            connection.subscription = request.app[NOTIFICATIONS].open(hello.channel, hello.position, connection.wake)
        except ChannelUnknown as error:
            await _close(page, CloseCode.NOT_YOURS, str(error))
        except ChannelExpired as error:
            await _close(page, CloseCode.EXPIRED, str(error))
        except Unavailable as error:
            await _close(page, CloseCode.UNAVAILABLE, str(error))
        else:
            try:
                await connection.run()
            finally:
                request.app[NOTIFICATIONS].leave(connection.subscription)

    async def _hello(self, page: web.WebSocketResponse) -> Hello | None:
        """What a page says first; None when the connection is closed."""
        try:
            said = await page.receive(HELLO)
        except TimeoutError:
            await _close(page, CloseCode.BAD_MESSAGE, f"say within {HELLO:g} s which channel you want")
            return None
        if said.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
            return None
        try:
            return msgspec.json.decode(said.data, type=Hello)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            await _close(page, CloseCode.BAD_MESSAGE, f"not a JSON object with channel, key and position: {error}")
            return None


class _Connection:
    """One page. What is told to it waits in its subscription, and is taken from there as fast as the page reads."""

    subscription: Subscription

    def __init__(self, request: web.Request, page: web.WebSocketResponse, expires: int) -> None:
        self._request, self._page, self._expires = request, page, expires
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There is something to be told. Called by the thread that follows the topic, or by another connection."""
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self.subscription.dropped and (transport := self._request.transport) is not None:
            transport.abort()  # what was written and not read is given up too; a `send` that waits fails
        self._woken.set()

    async def run(self) -> None:
        """Tell the page what there is, until one of the two closes the connection."""
        telling = asyncio.create_task(self._tell())
        try:
            said = await self._page.receive()
            if said.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                await _close(self._page, CloseCode.TOO_MANY, "a page says which channel it wants, and nothing else")
        finally:
            telling.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await telling

    async def _tell(self) -> None:
        self._woken.set()  # the outcome is there
        while time.time() < self._expires:
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT):
                    await self._woken.wait()
            self._woken.clear()
            told = self.subscription.take()
            if not told and (beat := self.subscription.beat()) is not None:
                told = [beat]
            while told:
                for one in told:
                    await self._page.send_frame(_text(one), WSMsgType.TEXT)
                await asyncio.sleep(0)  # a page that reads fast leaves time to the others
                told = self.subscription.take()
        await _close(self._page, CloseCode.EXPIRED, "the time of this channel is over: open another one")


class Rate:
    """So many a second; after a pause, twice as many at once."""

    def __init__(self, a_second: float) -> None:
        self._a_second = a_second
        self._left, self._at = 2 * a_second, time.monotonic()

    def allows(self) -> bool:
        """Whether one more is not too many."""
        now = time.monotonic()
        self._left = min(2 * self._a_second, self._left + (now - self._at) * self._a_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _text(told: Told) -> bytes:
    """As JSON."""
    position = told.position.encode()
    if told.notice is not None:
        return b'{"position":"%b","id":%b,"notice":%b}' % (position, msgspec.json.encode(told.id), told.notice)
    if told.outcome is not None:
        return b'{"outcome":"%b","position":"%b"}' % (told.outcome.value.encode(), position)
    return b'{"position":"%b"}' % position


async def _close(page: web.WebSocketResponse, code: CloseCode, why: str) -> None:
    await page.close(code=code, message=why.encode()[:120].decode(errors="ignore").encode())  # 123 fit


CHANNELS: web.AppKey[Channels] = web.AppKey("channels", Channels)
NOTIFICATIONS: web.AppKey[Notifications[Any]] = web.AppKey("notifications", Notifications)
OPENINGS: web.AppKey[Rate] = web.AppKey("openings", Rate)
SOCKETS: web.AppKey[set[web.WebSocketResponse]] = web.AppKey("sockets", set)
