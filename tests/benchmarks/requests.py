"""A generator of HTTP requests, as a process of its own: options as JSON on stdin, what it found as JSON on stdout.

Open loop: requests are due at a steady rate, whatever the answers do, and time runs from when one was due. A client
that waits for an answer before it asks again would not see what it waits for. Without a rate: as many as are answered.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from collections import deque

import uvloop

TICK = 0.001  # seconds between two looks at what is due. uvloop makes 0 of less: that would keep a core busy
HEADER_END, LENGTH = b"\r\n\r\n", re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """One connection: one request on its way at a time."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.due = 0.0
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.generator.is_free(self)

    def send(self, due: float) -> None:
        self.due, self.buffer = due, b""
        self.transport.write(random.choice(self.generator.requests))  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(HEADER_END)
        if end < 0:
            return
        length = LENGTH.search(self.buffer, 0, end)
        if length and len(self.buffer) >= end + len(HEADER_END) + int(length[1]):
            self.generator.answered(time.perf_counter() - self.due, self.buffer.startswith(b"HTTP/1.1 200"))
            self.generator.is_free(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.generator.lost += 1


class Generator:
    """Hands due requests to free connections."""

    def __init__(self, paths: list[str], rate: float | None) -> None:
        self.requests = [f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode() for path in paths]
        self.rate = rate
        self.free: deque[Connection] = deque()
        self.waiting: deque[float] = deque()
        self.times: list[float] = []
        self.failed = self.lost = 0
        self.over = False

    def is_free(self, connection: Connection) -> None:
        if self.over:
            return
        if self.rate is None:
            connection.send(time.perf_counter())
        elif self.waiting:
            connection.send(self.waiting.popleft())
        else:
            self.free.append(connection)

    def answered(self, seconds: float, well: bool) -> None:
        self.times.append(seconds)
        self.failed += not well

    async def run(self, port: int, connections: int, seconds: float) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            await loop.create_connection(lambda: Connection(self), "127.0.0.1", port)
        begun, asked = time.perf_counter(), 0
        while (now := time.perf_counter()) < begun + seconds:
            if self.rate is not None:
                while asked < (now - begun) * self.rate:
                    due = begun + asked / self.rate
                    asked += 1
                    if self.free:
                        self.free.popleft().send(due)
                    else:
                        self.waiting.append(due)
            await asyncio.sleep(TICK)
        self.over = True
        took = time.perf_counter() - begun
        # What is still waiting has waited at least for so long.
        ordered = sorted([*self.times, *(begun + took - due for due in self.waiting)])
        half, most = (ordered[round(part * (len(ordered) - 1))] * 1000 for part in (0.5, 0.99))
        failed = self.failed + self.lost
        return {"rate": len(self.times) / took, "p50 ms": half, "p99 ms": most, "failed": failed}


async def main() -> None:
    options = json.load(sys.stdin)
    generator = Generator(options["paths"], options["rate"])
    print(json.dumps(await generator.run(options["port"], options["connections"], options["seconds"])))


if __name__ == "__main__":
    uvloop.run(main())
