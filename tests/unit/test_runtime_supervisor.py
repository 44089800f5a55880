"""The supervisor's `listen` mode with a small child in the broker's place."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import is_alive, processes_of, wait_until

from labkit.runtime import shared
from labkit.runtime.child import supervisor_command
from labkit.runtime.shared import Control, Gone
from labkit.runtime.supervisor import RESTART_WAITS

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Running:
    """A supervisor with its child, and the process that started it."""

    def __init__(self, tmp_path: Path, command: list[str], linger: float, pinned: bool) -> None:
        self.folder = tmp_path / "data"
        self.folder.mkdir()
        self.state_file = tmp_path / "state.json"
        spec = {
            "command": [*command, str(self.folder)],
            "output": str(tmp_path / "log"),
            "state": str(self.state_file),
            "token": "secret",
            "linger": linger,
            "folder": str(self.folder),
            "pinned": pinned,
            "info": {"any": "thing"},
        }
        self.starter = subprocess.Popen(
            supervisor_command("listen", str(self.folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.starter.stdin is not None
        assert self.starter.stdout is not None
        self.starter.stdin.write(json.dumps(spec).encode() + b"\n")
        self.starter.stdin.flush()
        self.connections: list[Control] = []
        self.state: dict[str, Any] = {**spec, "port": int(self.starter.stdout.readline())}

    def connect(self) -> Control:
        self.connections.append(Control(self.state))
        return self.connections[-1]

    def let_go(self) -> None:
        """The starter leaves."""
        assert self.starter.stdin is not None
        self.starter.stdin.close()

    def is_gone(self) -> bool:
        return not processes_of(self.folder)


Listen = Callable[..., Running]


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Listen]:
    made: list[Running] = []

    def start(*command: str, linger: float = 0.2, pinned: bool = False) -> Running:
        command = command or (sys.executable, "-c", "import time; time.sleep(600)")
        place = tmp_path / str(len(made))
        place.mkdir()
        made.append(Running(place, list(command), linger, pinned))
        return made[-1]

    yield start
    for running in made:
        for process in processes_of(running.folder):
            process.kill()
        with running.starter:
            running.let_go()
        for connection in running.connections:
            connection.close()


def test_ends_after_the_last_user_with_its_data(listen: Listen) -> None:
    running = listen(linger=0.3)
    first, second = running.connect(), running.connect()
    assert first.ask("hold")["users"] == 1
    assert second.ask("hold")["users"] == 2
    running.let_go()
    first.close()
    wait_until(lambda: second.ask("status")["users"] == 1)
    assert json.loads(running.state_file.read_text())["folder"] == str(running.folder)
    left = time.monotonic()
    second.close()
    wait_until(running.is_gone, 5)
    assert time.monotonic() - left >= 0.3
    assert not running.folder.exists()
    assert not running.state_file.exists()


def test_nobody_is_let_in_once_it_is_stopping(listen: Listen) -> None:
    """One who came just before, and asks only now, would hold a broker whose data is being removed."""
    running = listen(sys.executable, "-c", STUBBORN, linger=0.3)  # so it takes a while to end
    early, last = running.connect(), running.connect()
    last.ask("hold")
    running.let_go()
    last.close()
    wait_until(lambda: not accepts(running), 10, "no more connections")
    assert early.ask("status")["users"] == 0
    with pytest.raises(Gone):
        early.ask("hold")
    wait_until(running.is_gone, 10)


def accepts(running: Running) -> bool:
    try:
        socket.create_connection(("127.0.0.1", running.state["port"]), 1).close()
    except OSError:
        return False
    return True


def test_ends_when_its_starter_dies_before_anyone_else_came(listen: Listen) -> None:
    running = listen()
    running.let_go()
    wait_until(running.is_gone, 5)


def outlives_an_unused_one(listen: Listen, pid: int, linger: float) -> None:
    """One that lingers for as long, and is let go of only now, ends; the child of `pid` is still there then."""
    unused = listen(linger=linger)
    unused.let_go()
    wait_until(unused.is_gone, 10, "the end of one that nobody uses")
    assert is_alive(pid)


def test_a_user_who_comes_in_time_keeps_it(listen: Listen) -> None:
    running = listen(linger=0.5)
    first = running.connect()
    first.ask("hold")
    running.let_go()
    pid = first.ask("status")["pid"]
    first.close()
    running.connect().ask("hold")
    outlives_an_unused_one(listen, pid, linger=0.5)


def test_looking_is_not_using(listen: Listen) -> None:
    running = listen()
    looking = running.connect()
    running.let_go()
    wait_until(running.is_gone, 5)
    with pytest.raises(Gone):
        looking.ask("status")


def test_pin_and_unpin(listen: Listen) -> None:
    running = listen(linger=0.05)
    user = running.connect()
    user.ask("hold")
    running.let_go()
    assert user.ask("pin")["pinned"]
    assert json.loads(running.state_file.read_text())["pinned"]
    pid = user.ask("status")["pid"]
    user.close()
    outlives_an_unused_one(listen, pid, linger=0.05)
    user = running.connect()
    assert user.ask("status")["users"] == 0
    user.ask("unpin")
    user.close()
    wait_until(running.is_gone, 5)
    assert not running.folder.exists()


def test_stop_ends_it_for_everybody(listen: Listen) -> None:
    running = listen(sys.executable, "-c", STUBBORN, pinned=True)
    user, other = running.connect(), running.connect()
    user.ask("hold")
    other.stop()  # it ignores SIGTERM
    wait_until(running.is_gone)
    assert not running.folder.exists()
    with pytest.raises(Gone):
        user.ask("status")


def test_frozen_child_is_ended(listen: Listen) -> None:
    running = listen(sys.executable, "-c", STUBBORN)
    control = running.connect()
    os.kill(control.ask("status")["pid"], signal.SIGSTOP)
    control.stop()
    wait_until(running.is_gone)


def test_restarts_a_ready_child_with_growing_waits(listen: Listen) -> None:
    running = listen()
    control = running.connect()
    control.ask("ready")
    gaps = []
    for restarts in range(1, 4):
        pid = control.ask("status")["pid"]
        died = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda restarts=restarts: control.ask("status")["restarts"] == restarts)
        gaps.append(time.monotonic() - died)
        assert json.loads(running.state_file.read_text())["pid"] == control.ask("status")["pid"] != pid
    assert all(gap >= wait for gap, wait in zip(gaps, RESTART_WAITS[1:], strict=False)), gaps  # none of them lived long


def test_a_child_that_dies_before_it_is_ready_is_the_end(listen: Listen) -> None:
    running = listen(sys.executable, "-c", "raise SystemExit(1)")
    wait_until(running.is_gone, 5)
    assert running.folder.exists(), "the log must still be readable"
    assert not running.state_file.exists()


def test_sigterm_keeps_pinned_data_and_says_where(listen: Listen) -> None:
    running = listen(pinned=True)
    os.kill(running.connect().ask("status")["supervisor"], signal.SIGTERM)
    wait_until(running.is_gone, 5)
    assert running.folder.exists()
    assert json.loads(running.state_file.read_text())["pinned"]


@pytest.mark.parametrize("sent", [b"wrong\nstop\n", b"\xff\xfe\n", b"x" * 10_000])
def test_strangers_are_cut_off(listen: Listen, sent: bytes) -> None:
    running = listen()
    with socket.create_connection(("127.0.0.1", running.state["port"]), 5) as stranger:
        stranger.sendall(sent)
        try:
            assert stranger.recv(1) == b""
        except ConnectionResetError:
            pass
    assert running.connect().ask("status")["pid"]


def test_interrupt_and_hangup_do_nothing(listen: Listen) -> None:
    running = listen()
    control = running.connect()
    status = control.ask("status")
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(status["supervisor"], number)
    assert control.ask("status")["pid"] == status["pid"]
    assert is_alive(status["pid"])


def test_state_file_is_private(listen: Listen) -> None:
    running = listen()
    assert running.state_file.stat().st_mode & 0o077 == 0
    supervisor = psutil.Process(running.connect().ask("status")["supervisor"])
    assert not any("secret" in argument for argument in supervisor.cmdline())


def test_a_late_answer_is_not_taken_for_the_next_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PATIENCE", 0.2)
    late = threading.Event()

    def serve() -> None:
        with server.accept()[0] as connection:
            connection.recv(100)
            connection.sendall(b'{"folder": "f"}\n')
            late.wait(10)
            connection.sendall(b'{"folder": "late"}\n')

    with socket.create_server(("127.0.0.1", 0)) as server:
        supervisor = threading.Thread(target=serve)
        supervisor.start()
        control = Control({"port": server.getsockname()[1], "token": "t", "folder": "f"})
        with pytest.raises(Gone):
            control.ask("pin")
        late.set()
        supervisor.join()
        with pytest.raises(Gone):
            control.ask("status")
