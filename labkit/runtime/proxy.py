"""A proxy between a broker and its clients: it can cut the connection, slow it down, or hold answers back.

It reads the frames of Kafka's protocol, and which request each of them is. So a fault can begin with the first
`Produce` or `EndTxn` from now on: at exactly that step.

A proxy may have further doors, to other servers than the broker. Through these it passes on bytes.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import HOST, held_port, take_port

# The requests that a fault may begin with, and their keys in Kafka's protocol.
REQUESTS = {
    "Produce": 0,
    "InitProducerId": 22,
    "AddPartitionsToTxn": 24,
    "AddOffsetsToTxn": 25,
    "EndTxn": 26,
    "TxnOffsetCommit": 28,
}
LONGEST = 10.0  # seconds of delay each way; what is under way when a delay ends still takes it
LARGEST = 128 << 20  # bytes of a frame; a broker takes 100 MiB
PIECE = 1 << 16  # bytes that are passed on as one, where there are no frames
AHEAD = 64  # frames or pieces of one direction of one connection that are on their way

Frame: TypeAlias = bytes
Queue: TypeAlias = "asyncio.Queue[tuple[float, Frame]]"


@dataclass
class _Door:
    """A port of the proxy, and the port to which it passes on what comes there."""

    port: int
    to: int
    frames: bool
    """Whether this door passes on Kafka's protocol."""
    reserved: socket.socket
    """Holds the port while nobody listens, so that connections are refused."""
    listener: socket.socket | None = None


class Proxy:
    """Passes on what comes to `port` of 127.0.0.1 to port `to`. One thread does it all.

    `cut`, `slow` and `hold` begin a fault, at once or with the first request of a kind; `recover` ends every fault. A
    distance is no fault, and stays.
    """

    _stays_in_the_notebook = "give a handler topics with its `cluster`: replace(topic, cluster=….cluster)"

    def __init__(self, port: int, to: int) -> None:
        self.port, self._to = port, to
        self._doors = [_Door(port, to, True, take_port(port))]
        self._connections: set[asyncio.Task[Any]] = set()
        self._delay = self._distance = 0.0
        self._passing = asyncio.Event()  # whether answers pass
        self._awaited: tuple[Literal["cut", "hold"], int] | None = None  # a fault, and the request to begin with
        self._answer: tuple[asyncio.Task[Any] | None, bytes] | None = None  # to wait for: its connection, its number
        self._begun = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.recover()

    @property
    def cluster(self) -> Cluster:
        """The broker's cluster, reached through this proxy."""
        return Cluster(f"{HOST}:{self.port}")

    @property
    def state(self) -> str:
        """What the proxy does now, in words."""
        if self._is_shut:
            return "cut" if self._thread.is_alive() else "closed"
        if not self._passing.is_set():
            return "holds answers back"
        waits = f"waits for {_name(self._awaited[1])} to {self._awaited[0]}" if self._awaited else ""
        away = f"{self._distance:g} s away" if self._distance else ""
        slow = f"slow by {self._delay:g} s each way" if self._delay else ""
        return " · ".join(filter(None, (away, slow, waits))) or "open"

    def through(self, port: int) -> int:
        """A port that leads through this proxy to whatever listens on `port`; the same one at each call."""
        for door in self._doors:
            if door.to == port and not door.frames:
                return door.port
        held = held_port()
        made: int = held.getsockname()[1]
        self._run(self._add(_Door(made, port, False, held)))
        return made

    def cut(self, request: str = "") -> None:
        """Close all connections and refuse new ones: now, or when the first such request comes, which is lost."""
        self._begin("cut", request)

    def hold(self, request: str = "") -> None:
        """Hold answers back while requests go through: from now on, or from the answer to the first such request on.

        With `wait` and then `cut`, the broker has done the work, and its client never learns of it.
        """
        self._begin("hold", request)

    def slow(self, seconds: float) -> None:
        """Pass everything on so many seconds later, each way, until it recovers."""
        if not 0 < seconds <= LONGEST:
            raise LabkitError(
                f"a connection is slow by more than 0 and at most {LONGEST:g} s each way, not {seconds!r}"
            )

        async def slow() -> None:
            self._delay = seconds

        self._run(slow())

    def distance(self, seconds: float) -> None:
        """Delay everything by so many seconds each way from now on. Making a connection takes a round trip."""
        if not 0 <= seconds <= LONGEST:
            raise LabkitError(f"a distance is 0 to {LONGEST:g} s each way, not {seconds!r}")

        async def distance() -> None:
            self._distance = seconds

        self._run(distance())

    def recover(self) -> None:
        """End every fault. Answers that were held back go out, unless their connection is closed."""

        async def recover() -> None:
            self._awaited, self._answer, self._delay = None, None, 0.0
            self._passing.set()
            if self._is_shut:
                for door in self._doors:
                    self._listen(door)

        self._run(recover())

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until the `cut` or `hold` has begun; for a `hold` with a request, until the broker has answered that
        request. Raises LabkitError after `timeout` seconds."""
        if not self._begun.wait(timeout):
            raise LabkitError(f"no request began the fault within {timeout:g} s. State of the connection: {self.state}")

    def close(self) -> None:
        """Close all connections and free the ports. May be called again."""
        if self._thread.is_alive():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            for door in self._doors:
                door.reserved.close()

    def __repr__(self) -> str:
        return f"Proxy({self.port} to {self._to}: {self.state})"

    # -- in the proxy's own thread -------------------------------------------------------------------------------------

    @property
    def _is_shut(self) -> bool:
        return self._doors[0].listener is None

    @property
    def _way(self) -> float:
        """Seconds that everything takes now, each way."""
        return self._distance + self._delay

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        if not self._thread.is_alive():
            work.close()
            raise LabkitError("this proxy is closed: make a new lab")
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _begin(self, verb: Literal["cut", "hold"], request: str) -> None:
        if request and request not in REQUESTS:
            raise LabkitError(f"a fault can begin with one of {', '.join(REQUESTS)}, not with {request!r}")

        async def begin() -> None:
            self._begun.clear()
            self._answer = None  # of the fault before
            if request:
                self._awaited = verb, REQUESTS[request]
                return
            self._awaited = None
            if verb == "cut":
                await self._end()
            else:
                self._passing.clear()
            self._begun.set()

        self._run(begin())

    async def _add(self, door: _Door) -> None:
        if not self._is_shut:
            self._listen(door)
        self._doors.append(door)

    # Not a server of asyncio, which forgets a connection that comes just when it is closed, and leaves it open.

    def _listen(self, door: _Door) -> None:
        door.listener = listener = socket.socket()
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # inherited by what it accepts
        listener.bind((HOST, door.port))
        listener.listen()
        self._loop.add_reader(listener, self._accept, door, listener)

    def _accept(self, door: _Door, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            return  # the client has hung up
        connection = self._loop.create_task(self._serve(client, door))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        connection.add_done_callback(lambda _: client.close())

    def _stop_listening(self) -> None:
        for door in self._doors:
            if door.listener is not None:
                self._loop.remove_reader(door.listener)
                door.listener.close()
                door.listener = None

    async def _end(self) -> None:
        """Stop listening, and end all connections."""
        self._stop_listening()
        ending = list(self._connections)
        for connection in ending:
            connection.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _serve(self, client: socket.socket, door: _Door) -> None:
        """Serve one connection: to the broker, until either side ends it; through another door, until both do."""
        connection = asyncio.current_task()
        writers: list[asyncio.StreamWriter] = []
        requests: Queue = asyncio.Queue(AHEAD)
        answers: Queue = asyncio.Queue(AHEAD)
        try:
            client.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=client)
            writers.append(writer)
            await asyncio.sleep(2 * self._way)
            server, to_server = await asyncio.open_connection(HOST, door.to)
            writers.append(to_server)
            asked = partial(self._frame, reader, lambda frame: self._asked(connection, frame))
            answered = partial(self._frame, server, lambda frame: self._answered(connection, frame))
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(self._read(asked if door.frames else partial(reader.read, PIECE), requests))
                both_ways.create_task(self._write(requests, to_server))
                both_ways.create_task(self._read(answered if door.frames else partial(server.read, PIECE), answers))
                both_ways.create_task(self._write(answers, writer, self._passing))
            for one in writers:  # what is still to be sent is sent
                one.close()
                await one.wait_closed()
        except* (OSError, EOFError, asyncio.CancelledError):
            pass  # somebody hung up, the server is away, this is not Kafka's protocol, or the line is cut
        finally:
            for one in writers:
                one.transport.abort()

    async def _frame(self, source: asyncio.StreamReader, see: Callable[[Frame], None]) -> bytes:
        head = await source.readexactly(4)
        size = int.from_bytes(head, "big", signed=True)
        if not 4 <= size <= LARGEST:
            raise EOFError("no frame of Kafka's protocol")
        frame = await source.readexactly(size)
        see(frame)
        return head + frame

    async def _read(self, more: Callable[[], Awaitable[bytes]], queue: Queue) -> None:
        """Queue what comes, up to an empty piece, which is the end of a stream of bytes."""
        piece = b"?"
        while piece:
            piece = await more()
            await queue.put((self._loop.time() + self._way, piece))

    async def _write(self, queue: Queue, sink: asyncio.StreamWriter, gate: asyncio.Event | None = None) -> None:
        while True:
            due, frame = await queue.get()
            if (left := due - self._loop.time()) > 0:
                await asyncio.sleep(left)
            if gate is not None:
                await gate.wait()
            if not frame:
                sink.write_eof()  # as late as all that came before
                return
            sink.write(frame)
            await sink.drain()

    def _asked(self, connection: asyncio.Task[Any] | None, frame: Frame) -> None:
        """A request has come: key (2 bytes), version (2), correlation id (4) …"""
        if self._awaited is None or int.from_bytes(frame[:2], "big") != self._awaited[1]:
            return
        (verb, _), self._awaited = self._awaited, None
        if verb == "hold":
            self._passing.clear()
            self._answer = connection, frame[4:8]
            return
        self._stop_listening()
        for one in self._connections:
            one.cancel()
        self._begun.set()
        raise EOFError("cut")

    def _answered(self, connection: asyncio.Task[Any] | None, frame: Frame) -> None:
        """An answer has come: correlation id (4 bytes) …"""
        if self._answer == (connection, frame[:4]):
            self._answer = None
            self._begun.set()


def _name(key: int) -> str:
    return next(name for name, one in REQUESTS.items() if one == key)
