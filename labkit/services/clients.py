"""Clients of an HTTP service, many at once; and single questions (see `calls`)."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from labkit.kafka.consumer.steps import Measured, Report, Step
from labkit.kafka.errors import LabkitError
from labkit.services.calls import LONG_PATIENCE, answers, ask, direct
from labkit.services.http import TELL, Latency

__all__ = ["Clients", "answers", "ask", "direct"]

LOGGED = 1.0  # seconds from one line in the log about a failed request to the next


@dataclass(frozen=True)
class Clients:
    """Some clients in one process, which GET `paths` of the service at `url`, drawn at random.

    There are `count` clients. Each asks again `think` seconds after its answer. Reports the counts `requests` and
    `errors` (no answer, or a status from 500 on; the log has one a second), and the gauges `p50 ms` and `p99 ms`.
    """

    url: str
    paths: Sequence[str]
    count: int = 10
    think: float = 0.0

    def __post_init__(self) -> None:
        if not self.paths:
            raise LabkitError("clients need paths to ask for: Clients(url, ['/sites/1', …])")
        if self.count < 1 or self.think < 0:
            raise LabkitError(f"clients need count ≥ 1 and think ≥ 0: {self!r}")

    def run(self, stop: threading.Event, report: Report) -> None:
        """Ask until `stop` is set."""
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._ask_all(stop, report))

    async def _ask_all(self, stop: threading.Event, report: Report) -> None:
        latency = Latency()
        requests = errors = 0
        logged = -LOGGED

        async def request(session: aiohttp.ClientSession) -> None:
            nonlocal requests, errors, logged
            begun = time.perf_counter()
            path, failure = random.choice(self.paths), ""  # noqa: S311
            try:
                async with session.get(self.url + path) as answer:
                    body = await answer.read()
                    if answer.status >= 500:
                        failure = f"{answer.status} {body[:200].decode(errors='replace').strip()}"
            except (aiohttp.ClientError, TimeoutError) as error:
                failure = f"{type(error).__name__} {error}"
                await asyncio.sleep(0.05)  # nobody is there: do not ask as fast as possible
            requests += 1
            errors += bool(failure)
            latency.add(time.perf_counter() - begun)
            if failure and time.monotonic() > logged + LOGGED:
                logged = time.monotonic()
                said = " ".join(f"GET {path}: {failure}".split())
                print(said, file=sys.stderr, flush=True)  # noqa: T201 - a pod's log is its stderr

        async def client(session: aiohttp.ClientSession) -> None:
            while True:
                await request(session)
                if self.think:
                    await asyncio.sleep(self.think)

        timeout = aiohttp.ClientTimeout(total=LONG_PATIENCE)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = [asyncio.create_task(client(session)) for _ in range(self.count)]
            while not stop.is_set() and not any(task.done() for task in tasks):
                report(Step.MEASURED, Measured({"requests": requests, "errors": errors}, latency.gauges()))
                await asyncio.sleep(TELL)
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended
