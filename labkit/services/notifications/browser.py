"""A browser without a screen: it does what a page does with its channel, for tests, for load, and to count."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import aiohttp
import msgspec

from labkit.closing import Closing
from labkit.kafka.errors import LabkitError, error_text
from labkit.services.calls import ask

AGAIN = 0.05, 2.0  # seconds from one attempt to connect to the next: at first, and at most
QUIET = 25.0  # seconds without a word after which a connection counts as dead: more than two beats
FINAL = (4403, 4410)  # close codes of a channel that is over; after all others it connects again, as the page does


class Shown(NamedTuple):
    """One notice on the screen."""

    id: str
    notice: dict[str, Any]
    at: float
    """When it came, in seconds since 1970."""


class Browser(Closing):
    """Opens a channel at the WebSocket service at `url`, and listens until it is closed.

    A connection that is lost is made again, with the last position. Each id is shown once. As a browser does, it tells
    of which `origin` it is.
    """

    def __init__(self, url: str, origin: str = "") -> None:
        status, told = ask(f"{url}/channels", "POST", headers={"Origin": origin or url})
        if status != 201:
            raise LabkitError(f"{url} opens no channel: it answers {status} {told}")
        self.url, self.origin = url, origin or url
        self.channel: str = told["channel"]
        self.key: str = told["key"]
        self.position: str = told["position"]
        self.screen: list[Shown] = []
        self.repeated: list[Shown] = []
        """Notices that came and were on the screen already."""
        self.outcomes: list[str] = []
        """What each connection began with."""
        self.connected = threading.Event()
        self.ended = ""
        """Why it does not connect again."""
        self._ids: set[str] = set()
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._online = asyncio.Event()
        self._online.set()
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._task = self._loop.create_task(self._listen())
        self._thread = threading.Thread(target=self._run, name=f"browser of {self.channel[:6]}", daemon=True)
        self._thread.start()

    def go_offline(self) -> None:
        """Cut the connection, and make no other one."""
        self._loop.call_soon_threadsafe(self._cut)

    def go_online(self) -> None:
        self._loop.call_soon_threadsafe(self._online.set)

    def shown(self, stage: str, request: str = "") -> list[Shown]:
        """What is on the screen of a stage, of all imports or of one."""
        found = [one for one in list(self.screen) if one.notice.get("stage") == stage]
        return [one for one in found if not request or one.notice.get("request") == request]

    def wait(self, condition: Callable[[], object], what: str, timeout: float = 60.0) -> None:
        """Wait until something is true of the screen. Raises LabkitError, saying what was waited for."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                there = self.ended or f"{len(self.screen)} notices came"
                raise LabkitError(f"the browser has waited {timeout:g} s for {what}: {there}")

    def close(self) -> None:
        """Leave. May be called again."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(10.0)

    def _run(self) -> None:
        try:
            (how,) = self._loop.run_until_complete(asyncio.gather(self._task, return_exceptions=True))
            if isinstance(how, Exception):  # not that it was closed
                self.ended = f"it cannot go on: {error_text(how)}"
        finally:
            self._loop.close()

    def _cut(self) -> None:
        self._online.clear()
        if self._socket is not None:
            self._socket._response.close()  # without a good-bye, as a lid that is closed

    async def _listen(self) -> None:
        pause = AGAIN[0]
        async with aiohttp.ClientSession() as session:
            while True:
                await self._online.wait()
                try:
                    async with session.ws_connect(f"{self.url}/notifications", origin=self.origin) as socket:
                        self._socket = socket
                        code = await self._hear(socket)
                        if self.connected.is_set():
                            pause = AGAIN[0]
                        if code in FINAL:
                            self.ended = f"closed with {code}: another attempt would not do better"
                            return
                except (aiohttp.ClientError, OSError, TimeoutError, AssertionError):
                    # Nobody is there now: the next attempt may find another instance. (aiohttp only asserts that a
                    # connection is still there when the answer to its handshake has come.)
                    pass
                finally:
                    if self._socket is not None:  # aiohttp keeps the connection of one that ended without a good-bye
                        self._socket._response.close()
                    self._socket = None
                    self.connected.clear()
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - not all pages at the same moment
                pause = min(2 * pause, AGAIN[1])

    async def _hear(self, socket: aiohttp.ClientWebSocketResponse) -> int | None:
        """Returns with what code the service closed the connection, if it said one."""
        await socket.send_json({"channel": self.channel, "key": self.key, "position": self.position})
        while True:
            said = await socket.receive(QUIET)
            if said.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return socket.close_code
            told: dict[str, Any] = msgspec.json.decode(said.data)
            if "code" in told:  # before it closes: a proxy may keep the code for itself
                return int(told["code"])
            with self._changed:
                self._take(told)
                self._changed.notify_all()

    def _take(self, told: dict[str, Any]) -> None:
        self.position = told["position"]
        if outcome := told.get("outcome"):
            self.outcomes.append(outcome)
            self.connected.set()
        if "notice" in told:
            shown = Shown(told["id"], told["notice"], time.time())
            (self.repeated if shown.id in self._ids else self.screen).append(shown)
            self._ids.add(shown.id)
