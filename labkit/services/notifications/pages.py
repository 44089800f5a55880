"""What a page and a service that notifies it say to each other, whatever way the notices come to the service.

`POST /channels` opens a channel: `{"channel": …, "key": …, "position": …, "expires": …}`.

`GET /notifications` is a WebSocket. The page says `{"channel": …, "key": …, "position": …}`. It is told

- `{"outcome": "nothing missed" | "missed" | "start over", "position": …}` first, and when the topic was made anew,
- `{"position": …, "id": …, "notice": …}` for each notice,
- `{"position": …}` from time to time, when nothing happens,
- `{"code": …, "reason": …}` before the service closes the connection for a reason (`CloseCode`).

It keeps the last position, and says it when it comes back, to whichever instance. It shows each id once: what was
*sent* twice comes twice.
"""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import IntEnum
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from labkit.kafka.errors import LabkitError, Unavailable
from labkit.patterns.notifications import Told
from labkit.services.notifications.channels import ChannelExpired, Channels, ChannelUnknown

LONGEST = 8192  # bytes of what a page says
HELLO = 5.0  # seconds for a page to say which channel it wants
BEAT = 10.0  # seconds until a page in which nothing happens is told its position
DEAD = 30.0  # seconds from one ping to the next; a page that does not answer is gone
CLOSING = 2.0  # seconds for a page to say good-bye too
SHARE = 100  # notices for one page at once, after which others have their turn
UNSENT = 65_536  # bytes that the kernel holds for a page that does not read

OTHER_FILES = 500  # that a process opens, beside its pages
CONNECTIONS = 2000  # pages of one instance. One more is refused
OPENINGS = 100.0  # channels that one instance opens in a second
LIFETIME = 24 * 3600.0  # seconds for which a channel is good

ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:]+\])(:\d+)?")
DEFAULT_PORTS = {"http": 80, "https": 443}
LOOPBACK = ("127.0.0.1", "localhost")


class CloseCode(IntEnum):
    """Why a connection was closed. Of a message that is too big, 1009; of an instance that ends, 1001; of a page that
    did not read there is none (1006). After these three it comes back with its position.

    The last message says it too: a proxy may close the connection without a code.
    """

    BAD_MESSAGE = 4400
    """It said nothing in time, or what is no hello: come back."""
    NOT_YOURS = 4403
    """No channel of ours, or somebody else's: open another one."""
    EXPIRED = 4410
    """Open another one."""
    TOO_MANY = 4429
    """It said more than which channel it wants: come back."""
    UNAVAILABLE = 4503
    """The topic cannot be read now: come back later."""


class Hello(msgspec.Struct, frozen=True):
    """What a page says first, and only once."""

    channel: str
    key: str
    position: str = ""
    """Where it is: as it was told last. Without one it starts over."""


class Listening(Protocol):
    """What waits for one page."""

    @property
    def dropped(self) -> bool:
        """Whether nothing comes any more: the page has to come back."""

    def take(self, most: int) -> list[Told]:
        """What is there, at most so many. If it is as many, there may be more."""

    def beat(self) -> Told | None:
        """The position of a page that was told all there is; None if something waits."""


L = TypeVar("L", bound=Listening)


class Source(Protocol[L]):
    """Where the notices come from."""

    def position(self) -> str:
        """That of a page that begins now. Raises Unavailable."""

    def open(self, channel: str, position: str, wake: Callable[[], object]) -> L:
        """Listen to a channel. `wake` is called, by any thread, when there is something to take, and when it was
        dropped. Raises Unavailable."""

    def leave(self, subscription: L) -> None:
        """Listen no more."""


def origins_of(addresses: Iterable[str]) -> frozenset[str]:
    """How a browser names the pages at these addresses, in its header `Origin`. This machine has two names.

    Raises LabkitError for what is no address.
    """
    found = set()
    for address in addresses:
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        host = parts.hostname or ""
        for name in LOOPBACK if host in LOOPBACK else (host,):
            name = f"[{name}]" if ":" in name else name
            origin = f"{parts.scheme}://{name}" + (
                "" if port in (None, DEFAULT_PORTS.get(parts.scheme)) else f":{port}"
            )
            if not ORIGIN.fullmatch(origin):
                raise LabkitError(f"origins: {address!r} is no address of a page, such as https://lab.example.org")
            found.add(origin)
    return frozenset(found)


class Pages(Generic[L]):
    """The pages that are connected to one instance of a service.

    Only pages of these `origins` are served. The list is fixed: a page elsewhere can give this address another name.
    """

    def __init__(
        self,
        source: Source[L],
        secret: str,
        origins: frozenset[str],
        connections: int = CONNECTIONS,
        openings: float = OPENINGS,
        lifetime: float = LIFETIME,
    ) -> None:
        self.source, self.channels, self.origins = source, Channels(secret), origins
        self.connections, self.lifetime = connections, lifetime
        self._openings = Rate(openings)
        self._sockets: set[web.WebSocketResponse] = set()
        self._woken: deque[_Connection] = deque()
        self._is_waking = False
        allow_files(connections + OTHER_FILES)

    def open(self, request: web.Request) -> web.Response:
        # Without `Access-Control-Allow-Origin` a page of another port cannot read the answer.
        headers = {"Access-Control-Allow-Origin": self._origin(request), "Vary": "Origin", "Cache-Control": "no-store"}
        if not self._openings.allows():
            raise web.HTTPTooManyRequests(text="too many channels at once: try again in a second\n", headers=headers)
        try:
            position = self.source.position()
        except Unavailable as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n", headers=headers) from error
        made = self.channels.make(self.lifetime)
        told = {"channel": made.id, "key": made.key, "expires": made.expires, "position": position}
        return web.json_response(told, status=201, headers=headers)

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Tell a page what there is, until one of the two closes the connection."""
        self._origin(request)
        if len(self._sockets) >= self.connections:
            raise web.HTTPServiceUnavailable(text=f"{self.connections} pages are connected: try again later\n")
        page = web.WebSocketResponse(
            heartbeat=DEAD, compress=False, max_msg_size=LONGEST, timeout=CLOSING, writer_limit=0
        )
        self._sockets.add(page)
        try:
            await page.prepare(request)
            if (line := page.get_extra_info("socket")) is not None:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT)
            await self._subscribe(request, page)
        finally:
            self._sockets.discard(page)
            if (transport := request.transport) is not None and transport.get_write_buffer_size():
                transport.abort()  # else the connection would stay until the page has read all of it
        return page

    async def end(self) -> None:
        """Send the pages to another instance."""
        closing = (one.close(code=WSCloseCode.GOING_AWAY) for one in self._sockets.copy())
        await asyncio.gather(*closing, return_exceptions=True)  # one may just be opening

    def _origin(self, request: web.Request) -> str:
        """A browser says which page asks."""
        origin = request.headers.get("Origin")
        if origin not in self.origins:
            raise web.HTTPForbidden(text="only pages of this service are served: the header Origin names another one\n")
        return origin

    async def _subscribe(self, request: web.Request, page: web.WebSocketResponse) -> None:
        try:
            hello = await self._hello(page)
            if hello is None:
                return
            expires = self.channels.check_owner(hello.channel, hello.key)
            connection = _Connection(request, page, expires)
            wake = partial(self._wake, connection, asyncio.get_running_loop())
            connection.subscription = self.source.open(hello.channel, hello.position, wake)
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
                self.source.leave(connection.subscription)

    def _wake(self, connection: _Connection, loop: asyncio.AbstractEventLoop) -> None:
        """There is something to be told. Called by the thread that follows the topic, or by another connection. It is
        the loop that wakes them: many at once, as each call into it takes as long as a notice."""
        self._woken.append(connection)
        if not self._is_waking:
            self._is_waking = True
            loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        self._is_waking = False  # first: whoever comes from now on calls again
        while self._woken:
            self._woken.popleft().wake()

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

    subscription: Listening

    def __init__(self, request: web.Request, page: web.WebSocketResponse, expires: int) -> None:
        self._request, self._page, self._expires = request, page, expires
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._told_at = self._loop.time()
        self._beats: asyncio.TimerHandle

    def wake(self) -> None:
        """There is something to be told, or it was dropped."""
        if self.subscription.dropped and (transport := self._request.transport) is not None:
            transport.abort()  # what was written and not read is given up too; a `send` that waits fails
        self._woken.set()

    async def run(self) -> None:
        """Tell the page what there is, until one of the two closes the connection."""
        self._beat()
        telling = asyncio.create_task(self._tell())
        try:
            said = await self._page.receive()
            if said.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                await _close(self._page, CloseCode.TOO_MANY, "a page says which channel it wants, and nothing else")
        finally:
            self._beats.cancel()
            telling.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await telling

    def _beat(self) -> None:
        """Wake the page if it was told nothing for a while. A timeout of each wait would take longer than a notice."""
        now = self._loop.time()
        if now >= self._told_at + BEAT:
            self._told_at = now
            self._woken.set()
        self._beats = self._loop.call_at(self._told_at + BEAT, self._beat)

    async def _tell(self) -> None:
        self._woken.set()  # the outcome is there
        while time.time() < self._expires:
            await self._woken.wait()
            self._woken.clear()
            told = self.subscription.take(SHARE)
            if not told and (beat := self.subscription.beat()) is not None:
                told = [beat]
            while told:
                await self._write([_text(one) for one in told])
                if len(told) < SHARE:
                    break  # what comes now wakes it again
                await asyncio.sleep(0)  # a page that reads fast leaves time to the others
                told = self.subscription.take(SHARE)
            self._told_at = self._loop.time()
        await _close(self._page, CloseCode.EXPIRED, "the time of this channel is over: open another one")

    async def _write(self, texts: list[bytes]) -> None:
        """In one write, which takes a tenth of the time of as many calls of aiohttp. While the page does not read, the
        first text goes through aiohttp, which waits until it does, and says that the connection is over."""
        if self._is_over() or self._request.protocol.writing_paused:
            await self._page.send_frame(texts[0], WSMsgType.TEXT)
            texts = texts[1:]
        if texts and not self._is_over():
            assert self._request.transport is not None  # noqa: S101
            self._request.transport.write(b"".join(map(_frame, texts)))

    def _is_over(self) -> bool:
        """Nothing may be said any more: the page is gone, or was told good-bye."""
        transport = self._request.transport
        return transport is None or transport.is_closing() or self._page.closed


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


def _frame(text: bytes) -> bytes:
    """As a WebSocket has a text that a server says."""
    size = len(text)
    if size < 126:
        return b"\x81%c%b" % (size, text)
    if size < 1 << 16:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), text)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), text)


def _text(told: Told) -> bytes:
    """As JSON."""
    position = told.position.encode()
    if told.notice is not None:
        return b'{"position":"%b","id":%b,"notice":%b}' % (position, msgspec.json.encode(told.id), told.notice)
    if told.outcome is not None:
        return b'{"outcome":"%b","position":"%b"}' % (told.outcome.value.encode(), position)
    return b'{"position":"%b"}' % position


def allow_files(wanted: int) -> None:
    """A connection is a file, and many shells let a process open 1,024, unless it asks for more."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


async def _close(page: web.WebSocketResponse, code: CloseCode, why: str) -> None:
    with suppress(ConnectionError):  # it is gone
        await page.send_json({"code": code, "reason": why})
    await page.close(code=code, message=why.encode()[:120].decode(errors="ignore").encode())  # 123 fit


async def _open(request: web.Request) -> web.Response:
    return request.app[PAGES].open(request)


async def _connect(request: web.Request) -> web.StreamResponse:
    return await request.app[PAGES].connect(request)


PAGES: web.AppKey[Pages[Any]] = web.AppKey("pages", Pages)
ROUTES = (web.post("/channels", _open), web.get("/notifications", _connect))
"""What a page asks of a service that has put its `Pages` into its application."""
