"""A server of one owner: one child process on a folder of its own, which its owner may kill and start again.

It ends with its owner, kill -9 included. Closing it removes its folder. If the owner was killed, the next server of the
same kind removes it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from enum import Enum
from pathlib import Path
from typing import ClassVar

from labkit.closing import Closing
from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import START_SECONDS, TRIES, PortTaken, wait_until_ready
from labkit.runtime.child import Child
from labkit.runtime.home import state_dir

SPARE_MB = 500  # for the pods that use a server
STOP = 10.0  # seconds for a server to end in good order, then it is killed; once a broker ignored SIGTERM


class ServerState(Enum):
    """What a server is doing."""

    RUNNING = "running"
    FROZEN = "frozen"
    STARTING = "starting"
    DOWN = "down"


class Server(Closing, ABC):
    """A server keeps its port and its data when it is started again. Several threads may inject faults.

    A subclass says what is in the folder, how the server is started, and when it answers. Raises LabkitError when the
    server cannot be started, saying why.
    """

    name: str
    """The server's name in messages and on boards."""
    kind: ClassVar[str]
    """The beginning of its folder's name."""
    tries: ClassVar[int] = TRIES
    """How often it chooses ports, if somebody takes one first."""
    needs: ClassVar[int] = 0
    """Megabytes of memory that the server takes, where that is many."""
    patience: ClassVar[float] = START_SECONDS
    """Seconds to wait for the first answer after a start."""

    def __init__(self) -> None:
        if self.needs:
            warn_if_memory_is_short(self.name, self.needs)
        self._lock = threading.RLock()  # one fault or repair after another
        self._frozen = self._starting = self._closed = False
        for attempt in range(1, self.tries + 1):
            _sweep(self._home(), self.kind)
            self.folder, self._owner = _claim(self._home(), self.kind)
            try:
                self._make()
                self._start()
                break
            except PortTaken:
                self.close()
                if attempt == self.tries:
                    raise
                self._closed = False
            except BaseException:
                self.close()
                raise

    @abstractmethod
    def _make(self) -> None:
        """Make `self.folder` with all that the server needs, and choose its ports."""

    @abstractmethod
    def _launch(self) -> Child:
        """Start its process."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it answers now."""

    def _lives(self) -> bool:
        """Whether its process runs, while a start waits for the first answer."""
        return self._child.poll() is None

    def _home(self) -> Path:
        return state_dir()

    def _stop(self, child: Child) -> None:
        child.terminate()

    @property
    def state(self) -> ServerState:
        """What the server is doing now; DOWN also when it died by itself."""
        if self._starting:
            return ServerState.STARTING
        if self._closed or self._child.poll() is not None:
            return ServerState.DOWN
        return ServerState.FROZEN if self._frozen else ServerState.RUNNING

    @property
    def waits_for(self) -> str:
        """What is missing for the server to answer, so that a start does not wait for it; "" if nothing is."""
        return ""

    @property
    def pid(self) -> int:
        """The id of its newest process."""
        return self._child.pid

    @property
    def log(self) -> Path:
        """Its log: warnings and errors."""
        return self.folder / f"{self.kind}.log"

    def kill(self) -> None:
        """kill -9, frozen or not. The server stays down until `restart`. What it has confirmed is in its files."""
        with self._lock:
            self._end()

    def freeze(self) -> None:
        """SIGSTOP: the server keeps its connections and answers nothing, until `thaw` or `kill`."""
        with self._lock:
            self._child.signal(signal.SIGSTOP)
            self._frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        with self._lock:
            if not self._frozen:
                raise LabkitError(f"{self.name} is not frozen: there is nothing to thaw")
            self._child.signal(signal.SIGCONT)
            self._frozen = False

    def restart(self) -> None:
        """Stop the server in good order if it runs, and start it on its data. Returns once it answers, unless it
        `waits_for` something."""
        with self._lock:
            if self._closed:
                raise LabkitError(f"this {self.name} is closed: make a new lab")
            self._starting = True
            try:
                if self._child.poll() is None and not self._frozen:
                    self._stop(self._child)
                    try:
                        self._child.wait(STOP)
                    except TimeoutError:
                        pass  # killed next
                self._end()
                self._start()
            finally:
                self._starting = False

    def close(self) -> None:
        """End the server and remove its data. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if hasattr(self, "_child"):
                self._end()
            shutil.rmtree(self.folder, ignore_errors=True)
            _owner_of(self.folder).unlink(missing_ok=True)
            os.close(self._owner)

    def _start(self) -> None:
        self._child = self._launch()
        if not self.waits_for:
            wait_until_ready(self.name, self.log, self._answers, self._lives, self.patience)

    def _end(self) -> None:
        self._child.close()  # kill -9, if it still runs
        self._frozen = False


def warn_if_memory_is_short(name: str, needs: int) -> None:
    """Warn before memory runs out: then the system ends processes, or swaps, without a word."""
    import psutil

    free = psutil.virtual_memory().available // 1_000_000
    if free < needs + SPARE_MB:
        found = f"{free:,} MB are available, and {needs:,} MB are needed for {name}"
        print(f"Memory gets short: {found}. Close other labs.")  # noqa: T201


def _owner_of(folder: Path) -> Path:
    """The file beside a folder that is locked as long as its owner lives."""
    return folder.with_suffix(".owner")


def _claim(home: Path, kind: str) -> tuple[Path, int]:
    """The name of a new folder, and its lock, which is held before a sweep could find anything to remove."""
    while True:
        folder = home / f"{kind}-{secrets.token_hex(4)}"
        lock = os.open(_owner_of(folder), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _owner_of(folder).exists():
            return folder, lock
        os.close(lock)  # a sweep came between these two lines


def _sweep(home: Path, kind: str) -> None:
    """Remove the folders of this kind whose owners died."""
    for owner in home.glob(f"{kind}-*.owner"):
        try:
            lock = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # just closed, or somebody else's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.with_suffix(""), ignore_errors=True)
            owner.unlink(missing_ok=True)
        except BlockingIOError:
            continue  # its owner lives
        finally:
            os.close(lock)
