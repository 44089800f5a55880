"""The one embedded broker of this user and state folder, shared by all processes that hold a `Lease` on it.

Files in its folder, beside its data, say what is known about it: see `supervisor.Keep`. Processes agree by locks on
files, which the kernel frees when a process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

from labkit.closing import Closing
from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import TRIES, Broker, Kafka, PortTaken, free_ports, is_free, mark_of, prepare
from labkit.runtime.child import supervisor_command
from labkit.runtime.home import locked, state_dir
from labkit.runtime.supervisor import is_held, users_of

LINGER = 3.0  # seconds that the broker outlives its last user: so a restarted kernel finds it again
STOP_SECONDS = 20.0  # more than the supervisor gives the broker


@dataclass(frozen=True)
class Status:
    """The shared broker as it is now. If it is not running, it is pinned, and its data waits for the next start."""

    running: bool
    bootstrap: str
    cluster_id: str
    pid: int
    memory_mb: int
    """Megabytes of memory that the broker and its supervisor hold."""
    pinned: bool
    users: int
    restarts: int
    folder: Path


class Lease(Closing):
    """A user's hold on the shared broker, which runs as long as any process has an open lease.

    The kernel closes the leases of a process that dies. Methods raise LabkitError when the supervisor is gone.
    """

    def __init__(self, broker: Broker) -> None:
        self.folder, self.cluster, self.cluster_id = broker.folder, broker.cluster, broker.cluster_id
        self._lock = (self.folder / "users" / secrets.token_hex(8)).open("xb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Let go. The broker stops 3 s after the last user has gone, unless it is pinned. May be called again."""
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def pin(self) -> None:
        """Keep the broker running, and its data, even without users, until `stop`."""
        self._supervisor()
        (self.folder / "pinned").touch()

    def deaths(self) -> int:
        """How often the broker has died and been started again."""
        return int(self._supervisor()["restarts"])

    def stop(self) -> None:
        """End the broker for everybody, pinned or not, and remove its data."""
        self.close()
        _stop(self.folder.parent)

    def _supervisor(self) -> dict[str, int]:
        if not is_held(self.folder / "supervisor"):
            raise LabkitError("the embedded broker's supervisor is gone: connect again to start a new one")
        return _supervisor(self.folder)


def shared_broker() -> Lease:
    """A lease on the shared broker, which is started if need be (0.8 s once everything is prepared).

    Raises LabkitError when it cannot be started, saying why.
    """
    if lease := attach():
        return lease
    kafka = prepare()  # before the lock: it may take long, and has its own lock
    home = state_dir()
    with locked(home / "broker.lock"):
        for attempt in range(1, TRIES + 1):
            if lease := _await_predecessor(home):
                return lease
            try:
                return _start(kafka, home)
            except PortTaken:
                if attempt == TRIES:
                    raise
    raise AssertionError("unreachable")


def attach() -> Lease | None:
    """A lease on the shared broker if it runs and is ready. Starts nothing."""
    for folder in _folders(state_dir()):
        broker = _broker(folder)
        if broker is not None and _takes_users(folder):
            with contextlib.suppress(FileNotFoundError):  # somebody removes the folder
                lease = Lease(broker)
                if _takes_users(folder):  # a supervisor that stops takes `ready` back, and looks for users once more
                    return lease
                lease.close()
    return None


def status() -> Status | None:
    """The state of the shared broker, or None if there is none. Starts nothing."""
    for folder in _folders(state_dir()):
        broker, running, pinned = _broker(folder), _takes_users(folder), (folder / "pinned").exists()
        if broker is not None and (running or pinned):
            now = _supervisor(folder)
            return Status(
                running=running,
                bootstrap=broker.cluster.bootstrap,
                cluster_id=broker.cluster_id,
                pid=now["pid"] if running else 0,
                memory_mb=_megabytes(now["pid"], now["supervisor"]) if running else 0,
                pinned=pinned,
                users=users_of(folder),
                restarts=now["restarts"],
                folder=folder,
            )
    return None


def stop() -> bool:
    """End the shared broker for everybody and remove its data, also the kept data of one that no longer runs.

    Returns whether there was anything to end.
    """
    return _stop(state_dir())


# --- Starting and ending ----------------------------------------------------------------------------------------


def _start(kafka: Kafka, home: Path) -> Lease:
    """Start the broker. The caller holds the lock, and no supervisor lives."""
    broker = _sweep(home) or Broker.create(home / f"broker-{secrets.token_hex(4)}", kafka)
    folder = broker.folder
    (folder / "users").mkdir(exist_ok=True)
    facts = {"cluster_id": broker.cluster_id, "port": broker.port, "controller_port": broker.controller_port}
    (folder / "broker.json").write_text(json.dumps(facts))
    if broker.was_killed:
        broker.fence(kafka)
    lease = Lease(broker)  # before its supervisor starts, which must not see a moment without a user
    try:
        with (folder / "supervisor").open("wb") as lock, broker.log.open("ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run(
                supervisor_command("keep", str(lock.fileno()), str(LINGER), str(folder), *kafka.command(folder)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
                pass_fds=[lock.fileno()],
                check=False,  # the supervisor forks, so that nobody has to wait for it
            )
        broker.wait_until_ready(lambda: is_held(folder / "supervisor"))
        (folder / "ready").touch()
    except BaseException:
        lease.close()
        raise
    return lease


def _await_predecessor(home: Path) -> Lease | None:
    """Wait for the end of a supervisor that takes no users: it may still save data, which nobody may touch.

    Returns a lease if it takes users after all. Raises LabkitError when it does not end.
    """
    until = time.monotonic() + STOP_SECONDS
    while held := [folder for folder in _folders(home) if is_held(folder / "supervisor")]:
        if lease := attach():
            return lease
        if time.monotonic() > until:
            pid = _supervisor(held[0])["supervisor"]
            raise LabkitError(
                f"supervisor {pid} of the embedded broker does not end; is it stopped, or the machine overloaded? "
                f"`kill -CONT {pid}` lets it go on; `labkit down` ends it and removes its data"
            )
        time.sleep(0.01)  # there is no event for the end of a process that is not ours
    return None


def _stop(home: Path) -> bool:
    with locked(home / "broker.lock"):
        folders = _folders(home)
        for folder in folders:
            (folder / "pinned").unlink(missing_ok=True)
            _end_supervisor(folder)
        _sweep(home)
        return bool(folders)


def _end_supervisor(folder: Path) -> None:
    """End a supervisor: in good order if it can be, else at once."""
    pid = _supervisor(folder)["supervisor"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + STOP_SECONDS
        while pid and is_held(folder / "supervisor") and time.monotonic() < until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)  # a frozen supervisor could not obey
            time.sleep(0.01)


def _sweep(home: Path) -> Broker | None:
    """Remove what dead supervisors have left. Returns the broker whose data is pinned."""
    kept = None
    for folder in _folders(home):
        (folder / "ready").unlink(missing_ok=True)
        broker = _broker(folder)
        if broker is not None:
            _end_leftover(broker)
        if broker is None or not (folder / "pinned").exists() or not (folder / "data" / "meta.properties").exists():
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if not (is_free(broker.port) and is_free(broker.controller_port)):
            port, controller_port = free_ports()
            broker = replace(broker, port=port, controller_port=controller_port)
        broker.write_settings()
        kept = broker
    return kept


def _end_leftover(broker: Broker) -> None:
    """Kill a broker that has outlived its supervisor, on systems other than Linux, whose kernel does it."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if mark_of(broker.folder) in (process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                process.kill()
    # A JVM's main thread may be gone while others still hold ports and files. So look at the ports, not at the pid.
    until = time.monotonic() + 2
    while not (is_free(broker.port) and is_free(broker.controller_port)) and time.monotonic() < until:
        time.sleep(0.01)


# --- What a folder says -----------------------------------------------------------------------------------------


def _folders(home: Path) -> list[Path]:
    return list(home.glob("broker-*/"))


def _broker(folder: Path) -> Broker | None:
    try:
        return Broker(folder, **json.loads((folder / "broker.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None  # whoever started it died


def _takes_users(folder: Path) -> bool:
    return (folder / "ready").exists() and is_held(folder / "supervisor")


def _supervisor(folder: Path) -> dict[str, int]:
    """What the supervisor wrote last, its own pid included; zeros if it wrote nothing."""
    try:
        return dict(json.loads((folder / "supervisor").read_text()))
    except (OSError, ValueError):
        return {"supervisor": 0, "pid": 0, "restarts": 0}


def _megabytes(*pids: int) -> int:
    import psutil

    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss if pid else 0
    return total // 1_000_000
