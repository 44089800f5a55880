"""The door by which a terminal breaks what a notebook runs: a Unix socket in the folder of the run.

Only this user on this machine can use it. It works while Kafka is down. The terminal calls the same methods as a
button, so what it does is in the lab's history. Question and answer are one line of JSON each.
"""

from __future__ import annotations

import os
import shutil
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from labkit.kafka.errors import LabkitError, error_text
from labkit.lab.faults.target import Target

WAIT = 60.0  # seconds for an order to be done; the restart of a broker takes some of them
LOOK = 5.0  # seconds to list all targets
LARGEST = 65536  # bytes of a question


class Order(msgspec.Struct, frozen=True):
    """What to do to which target. Without a target: list all targets."""

    target: str = ""
    verb: str = ""
    options: dict[str, int | float] = {}


class TargetState(msgspec.Struct, frozen=True):
    """A target, as it is listed."""

    target: str
    state: str
    can: list[str]
    """The verbs that make sense now."""
    stands: list[str]
    """Its faults."""

    @classmethod
    def of(cls, target: Target) -> TargetState:
        possible = [verb for verb in target.verbs if target.why_not(verb) is None]
        return cls(target.name, str(target.state.value), possible, target.standing())


class Answer(msgspec.Struct, frozen=True):
    """What was done, or why it was not."""

    said: str = ""
    refused: str = ""
    targets: list[TargetState] = []


class Control(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers orders in threads of their own, until `close`. `targets` is called for every order."""

    daemon_threads = True
    block_on_close = False  # a long order does not delay the end of the lab

    def __init__(self, folder: Path, targets: Callable[[], Mapping[str, Target]]) -> None:
        self._targets = targets
        self._away: Path | None = None
        door = folder / "control"
        try:
            super().__init__(os.fspath(door), socketserver.BaseRequestHandler)
        except OSError:  # the path is too long for a socket, or the file system has no sockets
            self._away = Path(tempfile.mkdtemp(prefix="labkit-"))  # for this user alone, too
            door.symlink_to(self._away / door.name)
            super().__init__(os.fspath(self._away / door.name), socketserver.BaseRequestHandler)
        threading.Thread(target=self.serve_forever, args=(0.1,), name="control", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()
        if self._away is not None:
            shutil.rmtree(self._away, ignore_errors=True)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own."""
        with request.makefile("rb") as question:
            request.sendall(msgspec.json.encode(self._answer(question.readline(LARGEST))))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has gone: nobody waits for the error."""

    def _answer(self, line: bytes) -> Answer:
        try:
            order = msgspec.json.decode(line, type=Order)
            targets = self._targets()
            if not order.target:
                return Answer(targets=[TargetState.of(one) for one in targets.values()])
            if order.target not in targets:
                raise LabkitError(f"there is no {order.target} here; there are: {', '.join(targets)}")
            return Answer(said=targets[order.target].do(order.verb, order.options))
        except Exception as error:  # the client is in another process
            return Answer(refused=str(error) if isinstance(error, LabkitError) else error_text(error))


def ask(folder: Path, order: Order) -> Answer | None:
    """Send an order to the run with this folder; None if it has ended. Raises LabkitError if it does not answer."""
    wait = WAIT if order.target else LOOK
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(wait)
        try:
            client.connect(os.path.realpath(folder / "control"))
            client.sendall(msgspec.json.encode(order) + b"\n")
            answer = b"".join(iter(lambda: client.recv(LARGEST), b""))
        except TimeoutError:
            raise LabkitError(f"the notebook's kernel does not answer within {wait:g} s: is it frozen?") from None
        except OSError:
            return None
    return msgspec.json.decode(answer, type=Answer) if answer else None
