"""Notices, pages that listen to them, and the service that tells them, in a thread or in a process to be killed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from consuming import put
from processes import wait_until

from labkit.kafka.consumer.steps import Measured, Step
from labkit.kafka.topics import Topic
from labkit.runtime.broker import free_ports
from labkit.services.http import HttpService
from labkit.services.notifications.pages import CloseCode
from labkit.services.notifications.websocket import NotificationService

SECRET = "a secret of some length"
WAIT = 60.0  # seconds that only end a hang
SOCKETS: list[aiohttp.ClientWebSocketResponse] = []  # of the browser's pages


BEGAN = "topic.1.0:0"  # the position of a page of another topic


class Note(msgspec.Struct, frozen=True):
    """A notice."""

    id: str
    text: str = ""


def notes(*ids: object) -> list[dict[str, str]]:
    """Notices with these ids, as JSON."""
    return [{"id": str(one)} for one in ids]


async def send(topic: Topic[Any], channel: str, *ids: object) -> None:
    """Send notices with these ids, and see them confirmed."""
    await asyncio.to_thread(put, topic, *notes(*ids), key=channel)


class Served:
    """A service that runs in a thread, and what it last reported."""

    def __init__(self, service: HttpService) -> None:
        self.service, self.url = service, service.url
        self.figures: dict[str, float] = {}
        self.ready, self.stop = threading.Event(), threading.Event()

    def report(self, _step: Step, measured: Measured) -> None:
        self.figures |= {**measured.counts, **measured.gauges}
        self.ready.set()

    def figure(self, name: str) -> float:
        """What its notifications count."""
        assert isinstance(self.service, NotificationService)
        return self.figures.get(f"{self.service.topic.short} {name}", 0)

    async def has_read(self, notices: int) -> None:
        """Wait until so many are in its window."""
        await asyncio.to_thread(wait_until, lambda: self.figure("window") == notices, what=f"{notices} notices")


def serving(topic: Topic[Any], **options: Any) -> AbstractContextManager[Served]:
    """Run a service of notifications until the block ends."""
    return running(NotificationService(free_ports()[0], topic, SECRET, **options))


@contextmanager
def running(service: HttpService) -> Iterator[Served]:
    """Run a service until the block ends."""
    served = Served(service)
    thread = threading.Thread(target=served.service.run, args=(served.stop, served.report))
    thread.start()
    try:
        assert served.ready.wait(WAIT)
        yield served
    finally:
        served.stop.set()
        thread.join(WAIT)
        assert not thread.is_alive()


@contextmanager
def process_serving(topic: Topic[Any], files: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a service in a process, to be killed: its URL and the process. `files` is how many its shell lets it open."""
    port = free_ports()[0]
    options = {"topic": topic.name, "partitions": topic.partitions, "port": port, "secret": SECRET, "files": files}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        sys.executable,
        str(Path(__file__).parent / "notification_member.py"),
        json.dumps({"bootstrap": topic.cluster.bootstrap, **options}),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()


def browse(what: Callable[[aiohttp.ClientSession], Awaitable[None]]) -> None:
    """Do this with a browser."""

    async def run() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            try:
                await what(session)
            finally:
                for connected in SOCKETS:  # aiohttp keeps the connection of one that ended without a good-bye
                    connected._response.close()
                SOCKETS.clear()

    asyncio.run(run())


class Page:
    """What a page does: it opens a channel, listens, keeps its position, and comes back with it."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url
        self.socket: aiohttp.ClientWebSocketResponse

    async def open(self, origin: str = "") -> dict[str, Any]:
        """Open a channel."""
        async with self.session.post(f"{self.url}/channels", headers={"Origin": origin or self.url}) as answer:
            assert answer.status == 201, await answer.text()
            self.told = await answer.json()
        self.channel, self.position = self.told["channel"], self.told["position"]
        return self.told

    async def connect(self, url: str = "") -> None:
        """Connect, to this service or another one, without a word."""
        url = url or self.url
        closing = aiohttp.ClientWSTimeout(ws_close=1.0)
        self.socket = await self.session.ws_connect(f"{url}/notifications", origin=url, timeout=closing)
        SOCKETS.append(self.socket)

    async def listen(self, url: str = "") -> str:
        """Connect and say which channel; the outcome."""
        await self.connect(url)
        await self.socket.send_json({"channel": self.channel, "key": self.told["key"], "position": self.position})
        return str((await self.hear())["outcome"])

    async def hear(self) -> dict[str, Any]:
        """What is told next, other than positions."""
        while True:
            told: dict[str, Any] = json.loads(await self.socket.receive_str(timeout=WAIT))
            self.position = told.get("position", self.position)
            if len(told) > 1:
                return told

    async def ids(self, count: int) -> list[str]:
        """Of the next notices."""
        return [(await self.hear())["id"] for _ in range(count)]

    async def closed(self) -> int | None:
        """Wait until the other side closes the connection; the code, which its last message says too."""
        last: dict[str, Any] = {}
        while not self.socket.closed:
            said = await self.socket.receive(timeout=WAIT)
            if said.type is aiohttp.WSMsgType.TEXT:
                last = json.loads(said.data)
        if self.socket.close_code in [*CloseCode]:
            assert last["code"] == self.socket.close_code
        return self.socket.close_code
