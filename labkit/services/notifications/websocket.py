"""The WebSocket service: it tells each page what concerns it, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from labkit.kafka.consumer.steps import Measured
from labkit.kafka.topics import Topic
from labkit.patterns.notice_window import Bounds
from labkit.patterns.notifications import Notifications
from labkit.services.http import HttpService
from labkit.services.notifications.pages import CONNECTIONS, LIFETIME, OPENINGS, PAGES, ROUTES, Pages, origins_of


@dataclass(frozen=True)
class NotificationService(HttpService):
    """`POST /channels` opens a channel, `GET /notifications` is the WebSocket: see `pages`.

    What is in the topic reaches its page, whichever instance that is connected to, and whatever was down meanwhile.
    """

    topic: Topic[Any]
    secret: str = field(repr=False)
    """Signs channels: of the same in all instances, and in all services that are given channels."""
    origins: tuple[str, ...] = ()
    """Addresses of the pages that are served, beside its own: that of the service that has the page, and where a proxy
    shows it, that of the proxy, such as `https://lab.example.org`."""
    bounds: Bounds = Bounds()  # noqa: RUF009 - it never changes
    connections: int = CONNECTIONS
    """Pages of one instance. One more is refused."""
    openings: float = OPENINGS
    """Channels that one instance opens in a second."""
    lifetime: float = LIFETIME
    """Seconds for which a channel is good."""

    def __post_init__(self) -> None:
        origins_of(self.origins)  # told where it is made, not in a pod

    def routes(self) -> Iterable[web.RouteDef]:
        return ROUTES

    async def start(self, app: web.Application) -> None:
        source = await asyncio.to_thread(Notifications(self.topic, self.bounds).__enter__)
        app[NOTIFICATIONS] = source
        origins = origins_of((self.url, *self.origins))
        app[PAGES] = Pages(source, self.secret, origins, self.connections, self.openings, self.lifetime)
        app.on_shutdown.append(lambda app: app[PAGES].end())

    async def finish(self, app: web.Application) -> None:
        await asyncio.to_thread(app[NOTIFICATIONS].close)

    def measured(self, app: web.Application) -> Iterable[Measured]:
        return [app[NOTIFICATIONS].measured()]


NOTIFICATIONS: web.AppKey[Notifications[Any]] = web.AppKey("notifications", Notifications)
