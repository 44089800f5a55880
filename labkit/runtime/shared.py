"""The one embedded broker of this user and state folder, shared by all processes that hold a `Lease` of it."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import Broker, Kafka, PortTaken, free_ports, is_free, log_tail, prepare
from labkit.runtime.child import supervisor_command
from labkit.runtime.home import locked, state_dir

if TYPE_CHECKING:
    import psutil

LINGER = 3.0  # seconds the broker outlives its last user: a kernel that restarts finds it again
PATIENCE = 15.0  # seconds for an answer: a supervisor on a machine that swaps is slow, not dead
STOP_SECONDS = 20.0  # more than the supervisor's own bound


@dataclass(frozen=True)
class Status:
    """The shared broker as it is now. Not running means: pinned, with data kept for the next start."""

    running: bool
    bootstrap: str
    cluster_id: str
    pid: int
    memory: int
    """Megabytes of the broker and its supervisor."""
    pinned: bool
    users: int
    restarts: int
    folder: Path


class Gone(LabkitError):
    """The broker's supervisor has ended."""


class Control:
    """A connection to a supervisor's control port. Any error closes it.

    Methods raise Gone when the supervisor has ended, LabkitError when it lives and does not answer.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        """Raises Gone when nobody answers there, or somebody else."""
        self._state, self._lock, self._left = state, threading.Lock(), b""
        try:
            self._socket = socket.create_connection(("127.0.0.1", int(state["port"])), PATIENCE)
        except TimeoutError as error:
            raise _silent(state) from error
        except (OSError, KeyError, ValueError) as error:
            raise Gone(f"no supervisor answers: {error}") from error
        try:
            self._socket.sendall(str(state["token"]).encode() + b"\n")
            if self.ask("status")["folder"] != state["folder"]:
                raise Gone("another program has the port of a former supervisor")
        except OSError as error:
            self.close()
            raise Gone(f"no supervisor answers: {error}") from error
        except BaseException:
            self.close()
            raise

    def ask(self, command: str) -> dict[str, Any]:
        """Send one command and return the status after it."""
        with self._lock:
            try:
                self._socket.sendall(command.encode() + b"\n")
                while b"\n" not in self._left:
                    chunk = self._socket.recv(65536)
                    if not chunk:
                        raise ConnectionError("it has ended")
                    self._left += chunk
                line, _, self._left = self._left.partition(b"\n")
                answer: dict[str, Any] = json.loads(line)
                return answer
            except BaseException as error:
                self.close()  # or a late answer would be taken for the next command's
                if isinstance(error, TimeoutError):
                    raise _silent(self._state) from error
                if isinstance(error, (OSError, ValueError)):
                    raise Gone(
                        f"the embedded broker's supervisor is gone ({error}): connect again to start a new one"
                    ) from error
                raise

    def lives(self) -> bool:
        try:
            return bool(self.ask("status")["pid"])
        except Gone:
            return False

    def stop(self) -> None:
        """End the broker for everybody; returns when it, and its data, are gone."""
        try:
            self.ask("stop")
            self._socket.settimeout(STOP_SECONDS)
            while self._socket.recv(65536):
                pass
        except TimeoutError as error:
            raise _silent(self._state) from error
        except (Gone, ConnectionError):
            pass
        finally:
            self.close()

    def close(self) -> None:
        self._socket.close()


class Lease:
    """A user's hold on the shared broker: while one is open, in any process, the broker runs.

    The kernel closes the leases of a process that dies. Methods raise LabkitError when the supervisor
    is gone or silent.
    """

    def __init__(self, control: Control, status: dict[str, Any]) -> None:
        self.control = control
        self.cluster = Cluster(status["info"]["bootstrap"])
        self.cluster_id = str(status["info"]["cluster_id"])

    def close(self) -> None:
        """Let go. The broker stops 3 s after the last user left, unless it is pinned."""
        self.control.close()

    def pin(self) -> None:
        """Keep the broker running, and its data, without users: until `unpin` or `stop`."""
        self.control.ask("pin")

    def unpin(self) -> None:
        """Let the broker go with its last user again."""
        self.control.ask("unpin")

    def stop(self) -> None:
        """End the broker for everybody, pinned or not, and remove its data."""
        self.control.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shared_broker() -> Lease:
    """Hold the shared broker, starting it if need be (0.8 s once everything is prepared).

    Raises LabkitError when it cannot be started, saying why.
    """
    lease = attach()
    if lease is not None:
        return lease
    kafka = prepare()  # before the lock: it may take long, and has one of its own
    folder = state_dir()
    with locked(folder / "broker.lock"):
        for attempt in range(5):
            lease = _hold(_read_state()) or _start(kafka, folder)
            try:
                _wait_until_ready(lease)
                return lease
            except PortTaken:
                lease.close()
                if attempt == 4:
                    raise
            except BaseException:
                lease.close()
                raise
    raise AssertionError("unreachable")


def attach() -> Lease | None:
    """Hold the shared broker if it runs and is ready; never starts one."""
    state = _read_state()
    return _hold(state) if state and state.get("ready") else None


def status() -> Status | None:
    """What is known of the shared broker, or None when there is none. Starts nothing."""
    state = _read_state()
    if state is None:
        return None
    try:
        control = Control(state)
        now = control.ask("status")
        control.close()
        running = True
    except Gone:
        if not state.get("pinned") or not Path(state["folder"]).exists():
            return None
        now, running = {**state, "pid": 0, "users": 0}, False
    info = now["info"]
    return Status(
        running=running,
        bootstrap=info["bootstrap"],
        cluster_id=info["cluster_id"],
        pid=now["pid"],
        memory=_megabytes(now["pid"], now["supervisor"]) if running else 0,
        pinned=now["pinned"],
        users=now["users"],
        restarts=now["restarts"],
        folder=Path(now["folder"]),
    )


def stop() -> bool:
    """End the shared broker for everybody and remove its data, that of a pinned one which no longer runs too.

    Returns whether there was anything to end.
    """
    with locked(state_dir() / "broker.lock"):
        state = _read_state()
        if state is None:
            return False
        try:
            Control(state).stop()
        except LabkitError:  # gone, or silent and then killed
            _sweep({**state, "pinned": False})
        return True


# --- Starting ---------------------------------------------------------------------------------------------------


def _state_file() -> Path:
    return state_dir() / "broker.json"


def _read_state() -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(_state_file().read_text())
        return state if isinstance(state, dict) and {"folder", "info", "token", "port"} <= state.keys() else None
    except (OSError, ValueError):
        return None


def _hold(state: dict[str, Any] | None) -> Lease | None:
    if state is None:
        return None
    try:
        control = Control(state)
        return Lease(control, control.ask("hold"))
    except Gone:
        return None


def _start(kafka: Kafka, folder: Path) -> Lease:
    """Start a supervisor with a broker under it; not ready yet. The lock is held."""
    _wait_for_end_of_supervisor()
    kept = _sweep(_read_state())
    broker = kept or Broker.create(folder / f"broker-{secrets.token_hex(4)}", kafka)
    spec = {
        "command": kafka.command(broker.folder),
        "output": str(broker.log),
        "state": str(_state_file()),
        "token": secrets.token_hex(16),
        "linger": LINGER,
        "folder": str(broker.folder),
        "pinned": kept is not None,
        "info": {
            "bootstrap": broker.cluster.bootstrap,
            "cluster_id": broker.cluster_id,
            "port": broker.port,
            "controller_port": broker.controller_port,
        },
    }
    with broker.log.open("ab") as log:
        launched = subprocess.Popen(
            supervisor_command("listen", str(broker.folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=broker.folder,
            start_new_session=True,
        )
    with launched:  # ends at once: it forks, so that nobody has to wait for a supervisor that outlives its starter
        owner, told = cast("tuple[IO[bytes], IO[bytes]]", (launched.stdin, launched.stdout))
        owner.write(json.dumps(spec).encode() + b"\n")
        owner.flush()
        port = told.readline().strip()
        lease = _hold({**spec, "port": int(port)}) if port else None
        # Its stdin closes only now: there was no moment without a user.
    if lease is None:
        raise LabkitError(f"the embedded Kafka broker could not be started. Its log says:\n{log_tail(broker.log)}")
    return lease


def _wait_until_ready(lease: Lease) -> None:
    now = lease.control.ask("status")
    if not now["ready"]:
        _broker(now).wait_until_ready(lease.control.lives)
        lease.control.ask("ready")


def _broker(state: dict[str, Any]) -> Broker:
    info = state["info"]
    return Broker(Path(state["folder"]), info["cluster_id"], int(info["port"]), int(info["controller_port"]))


def _wait_for_end_of_supervisor() -> None:
    """One that takes no users any more may still be saving data, which nobody must touch meanwhile.

    Raises LabkitError when it does not end.
    """
    state, deadline = _read_state(), time.monotonic() + STOP_SECONDS
    while state is not None and _process(state, "supervisor") is not None:
        if time.monotonic() > deadline:
            raise _silent(state)
        time.sleep(0.01)  # nothing tells when a process ends that is not ours


def _sweep(state: dict[str, Any] | None) -> Broker | None:
    """Clear away what a dead supervisor left behind; returns the broker whose data is pinned."""
    kept = None
    if state is not None:
        _end_leftovers(state)
        if state.get("pinned") and Path(state["folder"], "data", "meta.properties").exists():
            kept = _broker(state)
            if not (is_free(kept.port) and is_free(kept.controller_port)):
                port, controller_port = free_ports()
                kept = replace(kept, port=port, controller_port=controller_port)
            kept.write_settings()
        else:
            _state_file().unlink(missing_ok=True)
    for folder in state_dir().glob("broker-*/"):
        if kept is None or folder != kept.folder:
            shutil.rmtree(folder, ignore_errors=True)
    return kept


def _end_leftovers(state: dict[str, Any]) -> None:
    """Kill the supervisor and the broker that the state names, if these pids still are what they were."""
    import psutil

    for name in ("supervisor", "pid"):  # the supervisor first, or it restarts the broker
        process = _process(state, name)
        if process is not None:
            with contextlib.suppress(psutil.Error):  # it refuses a process that was not created when it looked
                process.kill()
    # A JVM's main thread may be gone while others still hold its ports and files, so its pid does not tell.
    broker, deadline = _broker(state), time.monotonic() + 2
    while not (is_free(broker.port) and is_free(broker.controller_port)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _process(state: dict[str, Any], name: str) -> psutil.Process | None:
    """The running process whose pid the state has under `name`.

    A pid alone proves nothing: it may be another process's by now. Ours have the broker's folder, whose name is random,
    in their command line.
    """
    import psutil

    with contextlib.suppress(psutil.Error, KeyError, TypeError, ValueError):
        process = psutil.Process(int(state[name]))
        if any(state["folder"] in argument for argument in process.cmdline()):
            return process
    return None


def _silent(state: dict[str, Any]) -> LabkitError:
    """What to raise when a supervisor did not answer or end in time: Gone only if it is no more."""
    process = _process(state, "supervisor")
    if process is None:
        return Gone("the embedded broker's supervisor has ended: connect again to start a new one")
    return LabkitError(
        f"supervisor {process.pid} of the embedded broker does not answer; is it stopped, or the machine overloaded? "
        f"`kill -CONT {process.pid}` lets it go on; `labkit down` ends it and removes its data"
    )


def _megabytes(*pids: int) -> int:
    import psutil

    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss if pid else 0
    return total // 1_000_000
