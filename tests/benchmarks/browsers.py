"""Pages that listen, the service that tells them, and a bare server that tells them the same: processes of their own.

`python browsers.py ROLE`, options as JSON on stdin, one line of JSON on stdout for each thing that is reached.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from itertools import count
from typing import Any

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from labkit.kafka.cluster import Cluster
from labkit.kafka.topics import Topic
from labkit.patterns.notice_window import Bounds
from labkit.services.notifications.pages import allow_files
from labkit.services.notifications.websocket import NotificationService

encode = msgspec.json.Encoder().encode
HOST = "127.0.0.1"
STAMP = re.compile(rb"~(\d+)~")  # nanoseconds of the monotonic clock: of this machine, and so of all its processes
PLENTY = 10**9


class Note(msgspec.Struct, frozen=True):
    """A notice. Its text holds a stamp."""

    id: str
    text: str


def note(number: int, stamp: int) -> Note:
    """Of 130 bytes, as notices of an import are."""
    return Note(f"failed row/import/{number}", f"~{stamp}~ not an e-mail address: it has no @".ljust(80, "."))


def say(what: Any) -> None:
    print(json.dumps(what), flush=True)


def service(port: int, bootstrap: str, topic: str, partitions: int) -> None:
    """The service under test, without those of its limits that only a benchmark reaches."""
    notices = Topic(Cluster(bootstrap), topic, partitions, Note)
    bounds = Bounds(waiting=PLENTY, waiting_bytes=PLENTY)
    ready = threading.Event()

    def report(*_: object) -> None:
        if not ready.is_set():
            ready.set()
            say("ready")

    served = NotificationService(port, notices, "not a secret at all", bounds=bounds, connections=10_000, openings=1e9)
    served.run(threading.Event(), report)


def bare(port: int, notices: int) -> None:
    """What one would write by hand, without Kafka: it sends what it has to who is there."""
    allow_files(10_000)
    sockets: list[web.WebSocketResponse] = []
    numbers = count()

    async def open_channel(_: web.Request) -> web.Response:
        return web.json_response({"channel": f"channel-{next(numbers)}", "key": "", "position": ""})

    async def connect(request: web.Request) -> web.WebSocketResponse:
        page = web.WebSocketResponse(compress=False)
        await page.prepare(request)
        await page.receive()
        await page.send_str('{"outcome": "nothing missed"}')
        sockets.append(page)
        await page.receive()
        return page

    async def tell(_: web.Request) -> web.Response:
        began = time.monotonic()
        for number, told in enumerate(notices_told):
            await sockets[number % len(sockets)].send_str(encode(told).decode())
        return web.json_response({"began": began})

    async def serve() -> None:
        app = web.Application()
        app.add_routes(
            [web.post("/channels", open_channel), web.get("/notifications", connect), web.post("/tell", tell)]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()
        say("ready")
        await asyncio.Event().wait()

    notices_told = []
    for number in range(notices):
        told = {"position": f"{'x' * 22}.4.1:{number}", "id": note(number, 0).id, "notice": note(number, 0)}
        notices_told.append(told)
    uvloop.run(serve())


class Page(asyncio.Protocol):
    """A WebSocket by hand: a client that takes more time than the server would be measured instead of it."""

    def __init__(self, hello: bytes, times: list[int]) -> None:
        self.hello, self.times = hello, times
        self.buffer = b""
        self.upgraded = False
        self.listens = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        headers = f"Host: {HOST}\r\nOrigin: {options['url']}\r\nUpgrade: websocket\r\nConnection: Upgrade"
        key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
        transport.write(f"GET /notifications HTTP/1.1\r\n{headers}\r\n{key}\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.upgraded:
            if b"\r\n\r\n" in self.buffer:
                assert self.buffer.startswith(b"HTTP/1.1 101"), self.buffer
                self.upgraded = True
                self.buffer = self.buffer.partition(b"\r\n\r\n")[2]
                mask = bytes(4)  # that changes nothing
                self.transport.write(b"\x81\xfe" + len(self.hello).to_bytes(2, "big") + mask + self.hello)
        elif not self.listens.done():
            if b'"outcome"' in self.buffer:
                self.listens.set_result(None)
        else:
            now, end = time.monotonic_ns(), 0
            for found in STAMP.finditer(self.buffer):
                self.times.append(now - int(found[1]))
                end = found.end()
            self.buffer = self.buffer[end:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.listens.done():
            self.listens.set_exception(ConnectionError(self.buffer.decode()))


async def listen(url: str, pages: int, notices: int) -> None:
    """Open channels, which are told; connect; count what comes; and tell how long it took from its stamp."""
    allow_files(pages + 100)
    loop = asyncio.get_running_loop()
    times: list[int] = []
    async with aiohttp.ClientSession() as session:
        opened: list[dict[str, Any]] = []
        for _ in range(pages):
            async with session.post(f"{url}/channels", headers={"Origin": url}) as answer:
                opened.append(await answer.json())
    for one in opened:
        hello = json.dumps({name: one[name] for name in ("channel", "key", "position")}).ljust(126).encode()
        _, page = await loop.create_connection(
            lambda hello=hello: Page(hello, times), HOST, int(url.rpartition(":")[2])
        )
        await page.listens
    say([one["channel"] for one in opened])
    while len(times) < notices:
        await asyncio.sleep(0.001)
    ended = time.monotonic()
    times.sort()
    p50, p99 = (times[round(part * (len(times) - 1))] / 1e6 for part in (0.5, 0.99))
    say({"ended": ended, "notices": len(times), "p50 ms": p50, "p99 ms": p99})


options: dict[str, Any] = {}


def main() -> None:
    options.update(json.loads(sys.stdin.readline()))
    match sys.argv[1]:
        case "service":
            service(**options)
        case "bare":
            bare(**options)
        case "pages":
            uvloop.run(listen(**options))


if __name__ == "__main__":
    main()
