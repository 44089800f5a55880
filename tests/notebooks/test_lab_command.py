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
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import psutil
import pytest
from processes import processes_of, wait_until

from labkit.cli.lab import FIRST, ROOT
from labkit.lab.runs import learner

COMMAND = "import sys, pathlib; from labkit.cli import lab, main; lab.ROOT = pathlib.Path(sys.argv.pop()); main.app()"
ANSWER = build_opener(ProxyHandler({})).open


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the notebooks of the repository and nothing else."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "clone" / "notebooks")
    return tmp_path / "clone"


@pytest.fixture
def lab(clone: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A running `labkit lab` on a machine without a desktop, with a state folder of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "BROWSER")}
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", COMMAND, "lab", str(clone)],
        env={**environment, "LABKIT_STATE": str(tmp_path / "state")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        yield process
        if process.poll() is None:
            process.kill()
        process.wait()


def read_address(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it said until it was ready, and the address in it."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if "Ctrl-C" in line:
            break
    found = re.search(r"http://127\.0\.0\.1:\d+/lab/tree/\S+\?token=\w+", said)
    assert found, said
    return said, found[0]


def assert_nothing_is_left(folder: Path) -> None:
    wait_until(lambda: not processes_of(folder), 10, f"the end of every process: {processes_of(folder)}")


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.long) for one in (signal.SIGTERM, signal.SIGHUP))],
    ids=lambda number: number.name,
)
def test_comes_up_and_ends_cleanly(
    lab: subprocess.Popen[str], clone: Path, tmp_path: Path, number: signal.Signals
) -> None:
    said, address = read_address(lab)
    assert "Kafka is at 127.0.0.1:" in said
    assert f" (embedded), as {learner()}.\n" in said
    assert "No browser on this machine" in said
    assert ("You are root" in said) == (os.geteuid() == 0)
    assert f"/lab/tree/{FIRST}?token=" in address
    assert (clone / "work" / FIRST).exists()
    with ANSWER(address, timeout=10) as page:
        assert page.status == 200
    lab.send_signal(number)
    assert lab.wait(30) == 0
    assert_nothing_is_left(tmp_path)


@pytest.mark.long
def test_kill_9_leaves_nothing(lab: subprocess.Popen[str], tmp_path: Path) -> None:
    said, _ = read_address(lab)
    psutil.Process(lab.pid).kill()
    lab.wait()
    assert_nothing_is_left(tmp_path)
    for port in re.findall(r"127\.0\.0\.1:(\d+)", said):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), 2)
    left = {path.name for path in (tmp_path / "state").rglob("*") if path.is_file()}
    assert left <= {"broker.lock", "jupyter.log"}, left
