"""A broker of one owner, who may do to it what nobody may do to a shared one: kill it, freeze it, start it again.

It ends with its owner, kill -9 included. Its data goes when it is closed, or with the next private broker after that.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import threading
from enum import Enum
from pathlib import Path
from typing import Self

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import Broker, PortTaken, prepare
from labkit.runtime.child import Child
from labkit.runtime.home import locked, state_dir

STOP = 10.0  # seconds for a broker to end in good order; once one ignored SIGTERM


class BrokerState(Enum):
    """What a private broker is doing."""

    RUNNING = "running"
    FROZEN = "frozen"
    STARTING = "starting"
    DOWN = "down"


class PrivateBroker:
    """One embedded broker (0.9 s once everything is prepared), on a port it keeps when it is started again.

    Faults may be injected from several threads. Raises LabkitError when it cannot be started, saying why.
    """

    def __init__(self) -> None:
        kafka = prepare()
        self._lock = threading.RLock()  # of what is done to it: one thing after another
        self._frozen = self._starting = self._closed = False
        for attempt in range(5):
            folder = state_dir() / f"private-{secrets.token_hex(4)}"
            with locked(state_dir() / "private.lock"):
                _sweep()
                self._broker = Broker.create(folder, kafka)
                # Locked as long as this process lives: so the next one sees whose folders are nobody's any more.
                self._owner = os.open(folder / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._owner, fcntl.LOCK_EX)
            self._command = kafka.command(folder)
            try:
                self._start()
                break
            except PortTaken:
                self.close()
                if attempt == 4:
                    raise
                self._closed = False
            except BaseException:
                self.close()
                raise
        self.cluster: Cluster = self._broker.cluster
        self.cluster_id: str = self._broker.cluster_id

    @property
    def state(self) -> BrokerState:
        """What it is doing now; DOWN also when nobody ordered it."""
        if self._starting:
            return BrokerState.STARTING
        if self._closed or self._child.poll() is not None:
            return BrokerState.DOWN
        return BrokerState.FROZEN if self._frozen else BrokerState.RUNNING

    @property
    def pid(self) -> int:
        """Its process, the newest one if it was started again."""
        return self._child.pid

    @property
    def log(self) -> Path:
        """What it logs: warnings and errors."""
        return self._broker.log

    def kill(self) -> None:
        """kill -9, frozen or not. It stays down until `restart`. What it had confirmed is in its files."""
        with self._lock:
            self._living("kill")
            self._end()

    def freeze(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing, until `thaw` or `kill`."""
        with self._lock:
            self._living("freeze")
            self._child.signal(signal.SIGSTOP)
            self._frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        with self._lock:
            if not self._frozen:
                raise LabkitError("Kafka is not frozen: there is nothing to thaw")
            self._child.signal(signal.SIGCONT)
            self._frozen = False

    def restart(self) -> None:
        """Stop it in good order if it runs (SIGTERM), and start it on its data. Returns once it answers: 1 to 3 s."""
        with self._lock:
            if self._closed:
                raise LabkitError("this broker is closed: make a new lab")
            self._starting = True
            try:
                if self._child.poll() is None and not self._frozen:
                    self._child.terminate()
                    try:
                        self._child.wait(STOP)
                    except TimeoutError:
                        pass  # killed next
                self._end()
                self._start()
            finally:
                self._starting = False

    def close(self) -> None:
        """End it and remove its data. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if hasattr(self, "_child"):
                self._child.close()
            shutil.rmtree(self._broker.folder, ignore_errors=True)
            os.close(self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._child = child = Child(self._command, cwd=self._broker.folder, output=self._broker.log)
        self._broker.wait_until_ready(lambda: child.poll() is None)

    def _end(self) -> None:
        self._child.close()  # kill -9, if it still runs
        self._frozen = False

    def _living(self, verb: str) -> None:
        if self.state is BrokerState.DOWN:
            raise LabkitError(f"cannot {verb} Kafka: it is down. Restart it first")


def _sweep() -> None:
    """Remove the data of private brokers whose owners died."""
    for folder in state_dir().glob("private-*/"):
        try:
            owner = os.open(folder / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # it was closed just now
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # it lives
        finally:
            os.close(owner)
