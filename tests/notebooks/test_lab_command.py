"""`labkit lab` as a user runs it: Kafka and JupyterLab come up, Ctrl-C ends all of it, nothing is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import processes_of
from running_lab import ANSWER, ask, assert_nothing_is_left, environment, read_address, started

from labkit.cli.lab import FIRST, ROOT
from labkit.lab.runs import learner

COMMAND = "import sys, pathlib; from labkit.cli import lab, main; lab.ROOT = pathlib.Path(sys.argv.pop()); main.app()"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the notebooks of the repository and nothing else."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "clone" / "notebooks")
    return tmp_path / "clone"


def started_in(clone: Path, state: Path, **how: Any) -> AbstractContextManager[subprocess.Popen[str]]:
    """`labkit lab` in another clone than this one, with the same code."""
    env = environment(state, PYTHONPATH=str(ROOT))
    return started([sys.executable, "-c", COMMAND, "lab", str(clone)], env, **how)


@pytest.fixture
def lab(clone: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A running `labkit lab` with a state folder of its own."""
    with started_in(clone, tmp_path / "state") as process:
        yield process


@pytest.mark.parametrize(
    ("number", "kernels"),
    [
        (signal.SIGINT, 0),
        *(pytest.param(one, 1, marks=pytest.mark.long) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else f"{value} kernels",
)
def test_comes_up_once_and_ends_cleanly(
    lab: subprocess.Popen[str], clone: Path, tmp_path: Path, number: signal.Signals, kernels: int
) -> None:
    said, address = read_address(lab)
    assert "Kafka is at 127.0.0.1:" in said
    assert f" (embedded), as {learner()}.\n" in said
    assert "No browser on this machine" in said
    assert ("You are root" in said) == (os.geteuid() == 0)
    assert f"/lab/tree/{FIRST}?token=" in address
    assert (clone / "work" / FIRST).exists()
    running = {process.pid for process in processes_of(tmp_path)}
    with started_in(clone, tmp_path / "state") as second:  # on the same copies it only says where the first one is
        said, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "runs on these notebooks already" in said
    assert address in said
    assert {process.pid for process in processes_of(tmp_path)} <= running
    with ANSWER(address, timeout=10) as page:
        assert page.status == 200
    for _ in range(kernels):
        assert ask(address, "api/kernels", b"{}") == 201  # as opening a notebook does
    lab.send_signal(number)
    assert lab.wait(30) == 0
    assert_nothing_is_left(tmp_path)


@pytest.mark.long
def test_on_other_copies_a_second_one_runs_with_a_log_of_its_own(
    lab: subprocess.Popen[str], clone: Path, tmp_path: Path
) -> None:
    shutil.copytree(clone, tmp_path / "second")
    with started_in(tmp_path / "second", tmp_path / "state") as other:
        addresses = [read_address(each)[1].partition("/lab/")[0] for each in (lab, other)]
        logs = [path.read_text() for path in (tmp_path / "state" / "labs").rglob("jupyter.log")]
        assert sorted(address in log for address in addresses for log in logs) == [False, False, True, True]
    lab.terminate()
    lab.wait(30)
    assert_nothing_is_left(tmp_path)


@pytest.mark.long
def test_a_closed_terminal_ends_it(clone: Path, tmp_path: Path) -> None:
    ours, its = os.openpty()
    how = {"stdin": its, "stdout": its, "stderr": its, "pass_fds": [its], "preexec_fn": lambda: os.login_tty(its)}
    with started_in(clone, tmp_path / "state", **how) as process:
        os.close(its)
        with open(ours, "rb", buffering=0) as terminal:
            said = ""
            while "Ctrl-C" not in said:
                said += terminal.read(4096).decode()
        assert process.wait(30) is not None
    assert_nothing_is_left(tmp_path)


@pytest.mark.long
def test_kill_9_leaves_nothing(lab: subprocess.Popen[str], clone: Path, tmp_path: Path) -> None:
    said, address = read_address(lab)
    assert ask(address, "api/kernels", b"{}") == 201
    psutil.Process(lab.pid).kill()
    lab.wait()
    assert_nothing_is_left(tmp_path)
    for port in re.findall(r"127\.0\.0\.1:(\d+)", said):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), 2)
    state = tmp_path / "state"
    left = {path.name for path in state.iterdir()} | {path.name for path in (state / "labs").glob("*/*")}
    assert left <= {"broker.lock", "labs.lock", "labs", "jupyter.log", "run"}, left
    with started_in(clone, state) as again:  # nobody has the notebooks any more
        assert read_address(again)[1] != address
    assert_nothing_is_left(tmp_path)
    assert [path.name for path in (state / "labs").glob("*/*")] == ["jupyter.log"]
