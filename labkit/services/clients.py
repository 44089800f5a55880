"""Clients of an HTTP service: how many there are, how often they ask, and how long they wait; or a single question."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from labkit.kafka.consumer.steps import Measured, Report, Step
from labkit.kafka.errors import LabkitError
from labkit.services.http import TELL, Latency

PATIENCE = 10.0  # seconds a client waits for an answer
TOLD = 1.0  # seconds from one line about a request that failed to the next

direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""As `urlopen`, and never by a proxy of the environment: what is asked is on this machine."""


@dataclass(frozen=True)
class Clients:
    """Some clients in one process, which GET `paths` of the service at `url`, drawn at random.

    `count` of them; each asks again once it was answered and has thought for `think` seconds. Reports the counts
    `requests` and `errors` (no answer, or one of 500 and more; its log tells of one a second), and the gauges `p50 ms`
    and `p99 ms`.
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
        told = -TOLD

        async def ask(session: aiohttp.ClientSession) -> None:
            nonlocal requests, errors, told
            begun = time.perf_counter()
            path, failure = random.choice(self.paths), ""  # noqa: S311
            try:
                async with session.get(self.url + path) as answer:
                    body = await answer.read()
                    if answer.status >= 500:
                        failure = f"{answer.status} {body[:200].decode(errors='replace').strip()}"
            except (aiohttp.ClientError, TimeoutError) as error:
                failure = f"{type(error).__name__} {error}"
                await asyncio.sleep(0.05)  # nobody there: not as fast as possible
            requests += 1
            errors += bool(failure)
            latency.add(time.perf_counter() - begun)
            if failure and time.monotonic() > told + TOLD:
                told = time.monotonic()
                said = " ".join(f"GET {path}: {failure}".split())
                print(said, file=sys.stderr, flush=True)  # noqa: T201 - a pod's log is its stderr

        async def client(session: aiohttp.ClientSession) -> None:
            while True:
                await ask(session)
                if self.think:
                    await asyncio.sleep(self.think)

        timeout = aiohttp.ClientTimeout(total=PATIENCE)
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


def ask(
    url: str, method: str = "GET", body: Any = None, patience: float = 5.0, headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """One request: the status, and what was answered: JSON decoded, else as text. `body` goes as JSON.

    While nobody answers, or the connection ends before the answer, it is sent again for up to `patience` seconds, as
    most clients do. Raises OSError after that.
    """
    data = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
    until = time.monotonic() + patience
    while True:
        try:
            with direct(urllib.request.Request(url, data, headers or {}, method=method), timeout=PATIENCE) as answer:  # noqa: S310
                text = answer.read()
                is_json = answer.headers.get_content_subtype() == "json"
                return answer.status, msgspec.json.decode(text) if is_json else text.decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)  # between two attempts: nothing tells when somebody listens


def answers(url: str) -> bool:
    """Whether somebody answers a GET there now, with 200."""
    try:
        return ask(url, patience=0)[0] == 200
    except OSError:
        return False
