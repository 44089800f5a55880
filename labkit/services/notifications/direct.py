"""The simple way, without Kafka: who has something to tell calls the WebSocket service.

The service knows the pages that are connected to it, in memory. A notice reaches the instance that is called: if that
one is down, or another one has the page, the notice is lost.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.kafka.records import encode
from labkit.patterns.notice_window import Bounds
from labkit.patterns.notifications import HasId, Outcome, Told
from labkit.services.calls import call
from labkit.services.http import HttpService
from labkit.services.notifications.channels import ChannelExpired, ChannelUnknown
from labkit.services.notifications.pages import PAGES, ROUTES, Pages, origins_of

PATIENCE = 2.0  # seconds for the service to answer: so long a handler waits
BOUNDS = Bounds()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DirectNotices:
    """Tells notices to the service at `url`, once. Whether they arrive nobody knows."""

    url: str

    def __call__(self, channel: str, notice: HasId) -> None:
        body = encode({"id": notice.id, "notice": notice})
        try:
            call(f"{self.url}/channels/{channel}/notices", "POST", body, PATIENCE)
        except OSError as error:
            log.warning("a notice is lost: %s: %s", notice.id, error)


class Posted(msgspec.Struct):
    """What is told of a notice."""

    id: str
    notice: Any


@dataclass(frozen=True)
class DirectNotificationService(HttpService):
    """To a page it says what `NotificationService` says, with positions that are empty: who comes back starts over.

    `POST /channels/{channel}/notices` with `{"id": …, "notice": …}` tells a notice to the pages that listen to the
    channel here and now: `{"told": n}`.
    """

    secret: str = field(repr=False)
    """Signs channels: of the same in all instances, and in all services that are given channels."""
    origins: tuple[str, ...] = ()
    """Addresses of the pages that are served, beside its own."""

    def __post_init__(self) -> None:
        origins_of(self.origins)

    def routes(self) -> Iterable[web.RouteDef]:
        return [*ROUTES, web.post("/channels/{channel}/notices", self.tell)]

    async def start(self, app: web.Application) -> None:
        app[LISTENERS] = listeners = Listeners()
        app[PAGES] = Pages(listeners, self.secret, origins_of((self.url, *self.origins)))
        app.on_shutdown.append(lambda app: app[PAGES].end())

    async def tell(self, request: web.Request) -> web.Response:
        channel = request.match_info["channel"]
        try:
            request.app[PAGES].channels.check(channel)
            posted = msgspec.json.decode(await request.read(), type=Posted)
            notice = encode(posted.notice)
        except (ChannelUnknown, ChannelExpired) as error:
            raise web.HTTPForbidden(text=f"{error}\n") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LabkitError) as error:
            raise web.HTTPBadRequest(text=f"not a JSON object with id and notice: {error}\n") from error
        if len(notice) > BOUNDS.largest:
            raise web.HTTPRequestEntityTooLarge(BOUNDS.largest, len(notice))
        return web.json_response({"told": request.app[LISTENERS].tell(channel, Told("", None, posted.id, notice))})


class Listener:
    """What waits for one page, within bounds."""

    def __init__(self, channel: str, wake: Callable[[], object]) -> None:
        self.channel, self.wake, self.dropped = channel, wake, False
        self._waiting = deque([Told("", Outcome.START_OVER)])

    def put(self, told: Told) -> None:
        """One more; too many, and the page has to come back."""
        self._waiting.append(told)
        if len(self._waiting) > BOUNDS.waiting:
            self._waiting.clear()
            self.dropped = True
        self.wake()

    def take(self, most: int) -> list[Told]:
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def beat(self) -> Told | None:
        return None if self._waiting or self.dropped else Told("")


class Listeners:
    """The pages of this process, by channel. Nothing is kept for a page that is away."""

    def __init__(self) -> None:
        self._channels: dict[str, list[Listener]] = {}

    def position(self) -> str:
        return ""

    def open(self, channel: str, position: str, wake: Callable[[], object]) -> Listener:
        listener = Listener(channel, wake)
        self._channels.setdefault(channel, []).append(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        others = self._channels[listener.channel]
        others.remove(listener)
        if not others:
            del self._channels[listener.channel]

    def tell(self, channel: str, told: Told) -> int:
        """How many there were to tell."""
        listeners = [one for one in self._channels.get(channel, ()) if not one.dropped]
        for one in listeners:
            one.put(told)
        return len(listeners)


LISTENERS: web.AppKey[Listeners] = web.AppKey("listeners", Listeners)
