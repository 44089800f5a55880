"""A proxy between a broker and its clients: a connection that can be cut, slowed down or held back.

It takes Kafka's protocol apart as far as the frames, and looks at which request a frame is. So a fault can begin with
the first `Produce` or `EndTxn` from now on: at that step, and not some time around it.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeAlias

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import HOST, PortTaken

# The requests that a fault may begin with, and their keys in Kafka's protocol.
REQUESTS = {
    "Produce": 0,
    "Fetch": 1,
    "Metadata": 3,
    "OffsetCommit": 8,
    "JoinGroup": 11,
    "Heartbeat": 12,
    "InitProducerId": 22,
    "AddPartitionsToTxn": 24,
    "AddOffsetsToTxn": 25,
    "EndTxn": 26,
    "TxnOffsetCommit": 28,
}
LONGEST = 10.0  # seconds of delay each way: what is under way when it ends still takes them
LARGEST = 128 << 20  # bytes of a frame; a broker takes 100 MiB
AHEAD = 64  # frames of one direction of one connection that are on their way

Frame: TypeAlias = bytes
Queue: TypeAlias = "asyncio.Queue[tuple[float, Frame]]"


class Proxy:
    """Passes on what comes to `port` of 127.0.0.1 to port `to`, until it is told otherwise. One thread does it all.

    `cut`, `slow` and `hold` begin a fault, at once or with the first request of a kind; `recover` ends all.
    """

    _stays_in_the_notebook = "give a handler topics with its `cluster`: replace(topic, cluster=….cluster)"

    def __init__(self, port: int, to: int) -> None:
        self.port, self._to = port, to
        self._reserved = socket.socket()  # ours while nobody listens: connections are refused then
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self._reserved.bind((HOST, port))
        except OSError as error:
            self._reserved.close()
            raise PortTaken(f"somebody took port {port} before the proxy did") from error
        self._connections: set[asyncio.Task[Any]] = set()
        self._listener: socket.socket | None = None
        self._delay = 0.0
        self._passing = asyncio.Event()  # whether answers pass
        self._awaited: tuple[Literal["cut", "hold"], int] | None = None  # what begins with which request
        self._answer: tuple[asyncio.Task[Any] | None, bytes] | None = None  # of which connection, with which number
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
        """What it does now."""
        if self._listener is None:
            return "cut" if self._thread.is_alive() else "closed"
        if not self._passing.is_set():
            return "holds answers back"
        waits = f"waits for {_name(self._awaited[1])} to {self._awaited[0]}" if self._awaited else ""
        slow = f"slow by {self._delay:g} s each way" if self._delay else ""
        return " · ".join(filter(None, (slow, waits))) or "open"

    def cut(self, request: str = "") -> None:
        """Close all connections and refuse new ones, now or when the first such request comes, which is lost."""
        self._begin("cut", request)

    def hold(self, request: str = "") -> None:
        """Hold answers back while requests go through: all answers from now on, or from that to the first such request
        on. `wait`, then `cut`: the broker has done the work, and its client never hears of it.
        """
        self._begin("hold", request)

    def slow(self, seconds: float) -> None:
        """Pass everything on so many seconds later, each way."""
        if not 0 < seconds <= LONGEST:
            raise LabkitError(
                f"a connection is slow by more than 0 and at most {LONGEST:g} s each way, not {seconds!r}"
            )

        async def slow() -> None:
            self._delay = seconds

        self._run(slow())

    def recover(self) -> None:
        """End every fault. Answers that were held back go out, unless their connection is gone."""

        async def recover() -> None:
            self._awaited, self._answer, self._delay = None, None, 0.0
            self._passing.set()
            if self._listener is None:
                self._listen()

        self._run(recover())

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until the `cut` or `hold` that was asked for has begun; of a `hold` with a request, until the broker has
        answered that. Raises LabkitError after `timeout` seconds."""
        if not self._begun.wait(timeout):
            raise LabkitError(f"no request began the fault within {timeout:g} s: the connection {self.state}")

    def close(self) -> None:
        """Close all connections and let the port go. May be called again."""
        if self._thread.is_alive():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._reserved.close()

    def __repr__(self) -> str:
        return f"Proxy({self.port} to {self._to}: {self.state})"

    # -- in the proxy's own thread -------------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        if not self._thread.is_alive():
            work.close()
            raise LabkitError("this proxy is closed: make a new lab")
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _begin(self, verb: Literal["cut", "hold"], request: str) -> None:
        if request and request not in REQUESTS:
            raise LabkitError(f"a fault begins with one of {', '.join(REQUESTS)}, not with {request!r}")

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

    # Not a server of asyncio: that one forgets a connection which comes just when it is closed, and leaves it open.

    def _listen(self) -> None:
        self._listener = socket.socket()
        self._listener.setblocking(False)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # inherited by what it accepts
        self._listener.bind((HOST, self.port))
        self._listener.listen()
        self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            return  # it has hung up
        connection = self._loop.create_task(self._serve(client))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        connection.add_done_callback(lambda _: client.close())

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def _end(self) -> None:
        """Stop listening, and end all connections."""
        self._stop_listening()
        ending = list(self._connections)
        for connection in ending:
            connection.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _serve(self, client: socket.socket) -> None:
        """One connection, until either side ends it."""
        connection = asyncio.current_task()
        writers: list[asyncio.StreamWriter] = []
        requests: Queue = asyncio.Queue(AHEAD)
        answers: Queue = asyncio.Queue(AHEAD)
        try:
            client.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=client)
            writers.append(writer)
            broker, to_broker = await asyncio.open_connection(HOST, self._to)
            writers.append(to_broker)
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(self._read(reader, requests, lambda frame: self._asked(connection, frame)))
                both_ways.create_task(self._write(requests, to_broker))
                both_ways.create_task(self._read(broker, answers, lambda frame: self._answered(connection, frame)))
                both_ways.create_task(self._write(answers, writer, self._passing))
        except* (OSError, EOFError, asyncio.CancelledError):
            pass  # somebody hung up, the broker is away, what came is not Kafka's protocol, or the line is cut
        finally:
            for one in writers:
                one.transport.abort()

    async def _read(self, source: asyncio.StreamReader, queue: Queue, see: Callable[[Frame], None]) -> None:
        while True:
            head = await source.readexactly(4)
            size = int.from_bytes(head, "big", signed=True)
            if not 4 <= size <= LARGEST:
                raise EOFError("no frame of Kafka's protocol")
            frame = await source.readexactly(size)
            see(frame)
            await queue.put((self._loop.time() + self._delay, head + frame))

    async def _write(self, queue: Queue, sink: asyncio.StreamWriter, gate: asyncio.Event | None = None) -> None:
        while True:
            due, frame = await queue.get()
            if (left := due - self._loop.time()) > 0:
                await asyncio.sleep(left)
            if gate is not None:
                await gate.wait()
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
