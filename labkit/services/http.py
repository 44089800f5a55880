"""The base of every HTTP service of the story: a port that several pods share, an orderly end, and figures of its own.
`body` reads the value in a request, `json` makes an answer of one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar, TypeAlias, TypeVar

import msgspec
from aiohttp import web

from labkit.kafka.consumer.steps import Measured, Report, Step

HOST = "127.0.0.1"
CONFIRM = 8.0  # seconds that a request waits for Kafka, before its answer says that it may not have happened
DRAIN = 5.0  # seconds for requests under way when the service stops
TELL = 0.25  # seconds between two reports of its figures
LATELY = 5.0  # seconds: older requests do not count for p50 and p99

T = TypeVar("T")

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Stopping: TypeAlias = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class HttpService:
    """An aiohttp application at `port`, in any number of processes: the kernel shares the connections out.

    Plain data until `run`. Reports the counts `requests` and `errors` (a status from 500 on), and the gauges `p50 ms`
    and `p99 ms` of the last seconds.
    """

    port: int

    listens: ClassVar = True
    """Its pods are ready once they listen."""

    def routes(self) -> Iterable[web.RouteDef]:
        """Its routes: `web.get("/sites/{id}", self.site)` and so on."""
        return ()

    async def start(self, app: web.Application) -> None:
        """Put what the handlers need into `app[…]`, before the first request."""

    async def finish(self, app: web.Application) -> None:
        """Close it again, after the last request."""

    def measured(self, app: web.Application) -> Iterable[Measured]:
        """Further figures, reported four times a second."""
        return ()

    async def listen(self, app: web.Application, figures: Figures) -> Stopping:
        """Begin to answer; called after `start`. Returns a function that ends it, once all is answered.

        Override it to serve with another library than aiohttp. Raises OSError if the port is taken.
        """
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN)
        try:
            await runner.setup()
            await web.TCPSite(runner, HOST, self.port, reuse_port=True).start()
        except BaseException:
            await runner.cleanup()
            raise
        return runner.cleanup

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def run(self, stop: threading.Event, report: Report) -> None:
        """Serve until `stop` is set, answer what is under way, and return. Raises OSError if the port is taken."""
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(stop, report))

    async def _serve(self, stop: threading.Event, report: Report) -> None:
        figures = Figures()

        def tell() -> None:
            for measured in (figures.measured(), *self.measured(app)):
                report(Step.MEASURED, measured)

        app = web.Application(middlewares=[figures.count])
        app.add_routes(self.routes())
        await self.start(app)
        try:
            end = await self.listen(app, figures)
            try:
                while not stop.is_set():
                    tell()
                    await asyncio.sleep(TELL)
            finally:
                await end()
                tell()  # with what was answered meanwhile
        finally:
            await self.finish(app)


async def body(request: web.Request, kind: type[T]) -> T:
    """The value in a request's JSON. Raises the answer 400 if it is no value of this kind."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"{request.path} does not take this: {error}\n") from error


def json(value: object) -> web.Response:
    """An answer with this value as JSON. Bytes count as JSON."""
    return web.json_response(body=value if isinstance(value, bytes) else msgspec.json.encode(value))


class Figures:
    """The figures of the requests that one process has answered."""

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.latency = Latency()

    @web.middleware
    async def count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        begun = time.perf_counter()
        status = 500
        try:
            answer = await handler(request)
            status = answer.status
            return answer
        except web.HTTPException as refused:
            status = refused.status
            raise
        finally:
            self.add(status, begun)

    def add(self, status: int, begun: float) -> None:
        """A request was answered with this status; `begun` is what `time.perf_counter()` said when it came."""
        self.requests += 1
        self.errors += status >= 500
        if status != HTTPStatus.SWITCHING_PROTOCOLS:  # a WebSocket lasts as long as its page
            self.latency.add(time.perf_counter() - begun)

    def measured(self) -> Measured:
        return Measured({"requests": self.requests, "errors": self.errors}, self.latency.gauges())


class Latency:
    """How long things took in the last seconds. It keeps at most 4,000, as sorting more would hold up a busy service.

    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=4000)

    def add(self, seconds: float) -> None:
        self._times.append((time.monotonic(), seconds))

    def gauges(self) -> dict[str, float]:
        """The median and the 99th percentile, as a service reports them; zeros if there is nothing."""
        oldest = time.monotonic() - LATELY
        while self._times and self._times[0][0] < oldest:
            self._times.popleft()
        ordered = sorted(seconds for _, seconds in self._times)
        last = len(ordered) - 1
        half, most = (ordered[round(part * last)] if ordered else 0.0 for part in (0.5, 0.99))
        return {"p50 ms": half * 1000, "p99 ms": most * 1000}
