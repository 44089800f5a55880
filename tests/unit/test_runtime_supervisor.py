"""The supervisor's `keep` mode with a small child in the broker's place."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import is_alive, processes_of, wait_until

from labkit.runtime.child import supervisor_command
from labkit.runtime.supervisor import LOOK, RESTART_WAITS, is_held, users_of

STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{sys.argv[1]}/stubborn", "w").close()
time.sleep(600)
"""


class User:
    """Somebody's lock, as a lease holds one."""

    def __init__(self, folder: Path, name: str) -> None:
        self.lock = (folder / "users" / name).open("wb")
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def close(self) -> None:
        self.lock.close()


class Running:
    """A supervisor with its child, and the user who started it."""

    def __init__(self, tmp_path: Path, command: list[str], linger: float, pinned: bool) -> None:
        self.folder = tmp_path / "data"
        (self.folder / "users").mkdir(parents=True)
        if pinned:
            self.pin()
        self.users: list[User] = []
        self.starter = self.user()
        with (self.folder / "supervisor").open("wb") as lock, (tmp_path / "log").open("wb") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keep = supervisor_command("keep", str(lock.fileno()), str(linger), str(self.folder), *command)
            where = [str(self.folder)]  # so that the child is found by it
            subprocess.run([*keep, *where], stderr=log, start_new_session=True, pass_fds=[lock.fileno()], check=True)

    def user(self) -> User:
        self.users.append(User(self.folder, str(len(self.users))))
        return self.users[-1]

    def status(self) -> dict[str, int]:
        """What its supervisor tells; waits for its first word."""
        wait_until(lambda: (self.folder / "supervisor").read_text(), 10, "the supervisor's first word")
        told: dict[str, int] = json.loads((self.folder / "supervisor").read_text())
        return told

    def make_ready(self) -> None:
        self.status()
        (self.folder / "ready").touch()

    def pin(self) -> None:
        (self.folder / "pinned").touch()

    def terminate(self) -> None:
        os.kill(self.status()["supervisor"], signal.SIGTERM)

    def is_gone(self) -> bool:
        return not processes_of(self.folder)


Keep = Callable[..., Running]


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Keep]:
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
        for user in running.users:
            user.close()


def test_ends_after_the_last_user_with_its_data(keep: Keep) -> None:
    linger = 3 * LOOK
    running = keep(linger=linger)
    running.make_ready()
    second = running.user()
    assert users_of(running.folder) == 2
    running.starter.close()
    assert users_of(running.folder) == 1
    outlives_an_unused_one(keep, running, linger)
    left = time.monotonic()
    second.close()
    wait_until(running.is_gone, 5)
    assert time.monotonic() - left >= linger - LOOK
    assert not running.folder.exists()


def outlives_an_unused_one(keep: Keep, running: Running, linger: float) -> None:
    """One that lingers for as long, and is let go of only now, ends; the child of `running` is still there then."""
    pid, unused = running.status()["pid"], keep(linger=linger)
    unused.starter.close()
    wait_until(unused.is_gone, 10, "the end of one that nobody uses")
    assert is_alive(pid)


def test_a_user_who_comes_in_time_keeps_it(keep: Keep) -> None:
    running = keep(linger=0.5)
    running.make_ready()
    running.starter.close()
    running.user()
    outlives_an_unused_one(keep, running, linger=0.5)
    assert (running.folder / "ready").exists()


STOP_AN_UNUSED_ONE = """
import sys
from labkit.runtime.supervisor import Keep
keep = Keep(0, 0.0, sys.argv[1], ["true"])
keep.is_ready = True
keep.stop()
print(keep.stopping)
"""


@pytest.mark.parametrize("somebody", [True, False])
def test_a_user_who_came_after_the_last_look_keeps_it(tmp_path: Path, somebody: bool) -> None:
    """It says that it is too late, looks once more, and takes its word back."""
    (tmp_path / "users").mkdir()
    (tmp_path / "ready").touch()
    user = User(tmp_path, "late")
    if not somebody:
        user.close()
    done = subprocess.run([sys.executable, "-c", STOP_AN_UNUSED_ONE, tmp_path], capture_output=True, text=True)
    assert done.stdout == f"{not somebody}\n", done.stderr
    assert (tmp_path / "ready").exists() == somebody
    user.close()


@pytest.mark.long
def test_nobody_is_let_in_once_it_is_stopping(keep: Keep) -> None:
    """One who came just before, and asks only now, would hold a broker whose data is being removed."""
    running = keep(sys.executable, "-c", STUBBORN)  # so it takes a while to end
    running.make_ready()
    wait_until((running.folder / "stubborn").exists, 10)
    running.starter.close()
    wait_until(lambda: not (running.folder / "ready").exists(), 10, "the word that it is too late")
    assert is_alive(running.status()["pid"])
    running.user()
    wait_until(running.is_gone, 10)


def test_ends_when_its_starter_dies_before_anyone_else_came(keep: Keep) -> None:
    running = keep(pinned=True)  # by one before, whose data must not go
    running.starter.close()
    wait_until(running.is_gone, 5)
    assert (running.folder / "pinned").exists()


def test_pin_and_unpin(keep: Keep) -> None:
    running = keep(linger=0.05)
    running.make_ready()
    running.pin()
    running.starter.close()
    outlives_an_unused_one(keep, running, linger=0.05)
    (running.folder / "pinned").unlink()
    wait_until(running.is_gone, 5)
    assert not running.folder.exists()


def test_sigterm_ends_it_for_everybody(keep: Keep) -> None:
    running = keep(sys.executable, "-c", STUBBORN)
    running.make_ready()
    wait_until((running.folder / "stubborn").exists, 10)
    running.user()
    running.terminate()  # its child ignores SIGTERM
    wait_until(running.is_gone)
    assert not running.folder.exists()


@pytest.mark.long  # the one above ignores SIGTERM
def test_frozen_child_is_ended(keep: Keep) -> None:
    running = keep(sys.executable, "-c", STUBBORN)
    wait_until((running.folder / "stubborn").exists, 10)
    os.kill(running.status()["pid"], signal.SIGSTOP)
    running.terminate()
    wait_until(running.is_gone)


@pytest.mark.long
def test_restarts_a_ready_child_with_growing_waits(keep: Keep) -> None:
    running = keep()
    running.make_ready()
    gaps = []
    for restarts in range(1, 4):
        pid = running.status()["pid"]
        died = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda restarts=restarts: running.status()["restarts"] == restarts)
        gaps.append(time.monotonic() - died)
        assert running.status()["pid"] != pid
    assert all(gap >= wait for gap, wait in zip(gaps, RESTART_WAITS[1:], strict=False)), gaps  # none of them lived long


def test_a_child_that_dies_before_it_is_ready_is_the_end(keep: Keep) -> None:
    running = keep(sys.executable, "-c", "raise SystemExit(1)")
    wait_until(running.is_gone, 5)
    assert running.folder.exists(), "the log must still be readable"
    assert not is_held(running.folder / "supervisor")


def test_sigterm_keeps_pinned_data(keep: Keep) -> None:
    running = keep(pinned=True)
    running.make_ready()
    running.terminate()
    wait_until(running.is_gone, 5)
    assert (running.folder / "pinned").exists()
    assert not (running.folder / "ready").exists()


def test_interrupt_and_hangup_do_nothing(keep: Keep) -> None:
    running = keep()
    running.make_ready()
    status = running.status()
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(status["supervisor"], number)
    outlives_an_unused_one(keep, running, linger=0.2)
    assert running.status() == status
