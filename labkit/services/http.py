"""What every HTTP service of the story has: a port that several pods share, an orderly end, and its own figures."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from aiohttp import web

from labkit.kafka.steps import Measured, Report, Step
from labkit.services.latency import Latency

HOST = "127.0.0.1"
DRAIN = 5.0  # seconds for requests that are being answered when the service is told to stop
TELL = 0.25  # seconds between two reports of its figures

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class HttpService(ABC):
    """An aiohttp application at `port`, in as many processes as are started: the kernel shares the connections out.

    Plain data until `run`. It reports the counts `requests` and `errors` (answers of 500 and more), and the gauges
    `p50 ms` and `p99 ms` of what was answered in the last seconds.
    """

    port: int

    @abstractmethod
    def routes(self) -> Iterable[web.RouteDef]:
        """What it answers: `web.get("/sites/{id}", self.site)` and so on."""

    async def start(self, app: web.Application) -> None:  # noqa: B027 - most have nothing to open
        """Open what the handlers need, into `app[…]`, before the first request."""

    async def finish(self, app: web.Application) -> None:  # noqa: B027
        """Close it again, after the last one."""

    def measured(self, app: web.Application) -> Iterable[Measured]:
        """More figures than those of its requests, asked for four times a second."""
        return ()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    def run(self, stop: threading.Event, report: Report) -> None:
        """Serve until `stop` is set; then answer what is under way, and return. Raises OSError if the port is taken."""
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(stop, report))

    async def _serve(self, stop: threading.Event, report: Report) -> None:
        latency = Latency()
        requests = errors = 0

        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            nonlocal requests, errors
            begun = time.perf_counter()
            status = 500
            try:
                answer: web.StreamResponse = await handler(request)
                status = answer.status
                return answer
            except web.HTTPException as refused:
                status = refused.status
                raise
            finally:
                requests += 1
                errors += status >= 500
                latency.add(time.perf_counter() - begun)

        app = web.Application(middlewares=[count])
        app.add_routes(self.routes())
        await self.start(app)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN)
        try:
            await runner.setup()
            await web.TCPSite(runner, HOST, self.port, reuse_port=True).start()
            while not stop.is_set():
                counts = {"requests": requests, "errors": errors}
                for figures in (Measured(counts, latency.gauges()), *self.measured(app)):
                    report(Step.MEASURED, figures)
                await asyncio.sleep(TELL)
        finally:
            await runner.cleanup()
            await self.finish(app)
