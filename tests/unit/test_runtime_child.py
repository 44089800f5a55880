"""Children end with their owner, whatever happens to it; a signal for the owner is none for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from processes import is_alive, wait_until

from labkit.kafka.errors import LabkitError
from labkit.runtime.child import Child

FOREVER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"

Owner = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def owner() -> Iterator[Owner]:
    """Starts another Python, in a session of its own, that makes children; what it prints can be read."""
    started = []

    def start(code: str) -> subprocess.Popen[str]:
        prelude = f"import os, signal, sys, time\nfrom labkit.runtime.child import Child\nFOREVER = {FOREVER!r}\n"
        process = subprocess.Popen(
            [sys.executable, "-c", prelude + textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(pid) for pid in process.stdout.readline().split()]


def supervisor_of(pid: int) -> int:
    return psutil.Process(pid).ppid()


def test_whoever_cleans_up_at_exit_can_still_close_a_child(owner: Owner) -> None:
    process = owner("""
        import atexit
        atexit.register(lambda: (child.close(), print(child.poll(), flush=True)))  # first, as a lab's: so it runs last
        child = Child([sys.executable, "-c", FOREVER])
    """)
    said, _ = process.communicate(timeout=60)
    assert said.strip() == f"-{signal.SIGKILL:d}"


def test_exit_codes(tmp_path: Path) -> None:
    with Child([sys.executable, "-c", "raise SystemExit(7)"]) as child:
        assert child.wait(10) == 7
        assert child.poll() == 7
    for number in (signal.SIGTERM, signal.SIGKILL):
        with Child(["sleep", "600"]) as child:
            assert child.poll() is None
            child.signal(number)
            assert child.wait(10) == -number
    with Child(["sleep", "600"]) as child:
        pass
    assert child.wait(0) == -signal.SIGKILL


def test_wait_gives_up_at_its_deadline() -> None:
    with Child(["sleep", "600"]) as child, pytest.raises(TimeoutError, match=str(child.pid)):
        child.wait(0.05)


def test_command_that_does_not_exist() -> None:
    with pytest.raises(LabkitError, match=r"/no/such/program could not be started: "):
        Child(["/no/such/program"])


def test_talks_through_pipes() -> None:
    with Child(["cat"], env={"PATH": os.environ["PATH"]}) as child:
        child.stdin.write(b"hello\n")
        child.stdin.flush()
        assert child.output is not None
        assert child.output.readline() == b"hello\n"
        child.stdin.close()
        assert child.wait(10) == 0
        assert child.output.read() == b""


def test_output_file_environment_and_folder(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import os, sys; print(os.environ['X'], os.getcwd()); print('problem', file=sys.stderr)"
    with Child([sys.executable, "-c", code], env={"X": "there"}, cwd=tmp_path, output=log) as child:
        assert child.output is None
        assert child.wait(10) == 0
    assert log.read_text().splitlines()[0] == "before"
    assert sorted(log.read_text().splitlines()[1:]) == ["problem", f"there {tmp_path}"]


def test_unread_output_blocks_neither_kill_nor_close() -> None:
    with Child([sys.executable, "-c", "while True: print('x' * 10_000)"]) as child:
        assert child.output is not None
        assert child.output.read(1) == b"x"
        child.kill()
        assert child.wait(5) == -signal.SIGKILL


def test_frozen_child_is_killed() -> None:
    with Child(["sleep", "600"]) as child:
        child.signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
        child.kill()
        assert child.wait(5) == -signal.SIGKILL


def test_a_signal_after_the_end_does_nothing() -> None:
    with Child(["true"]) as child:
        child.wait(10)
        child.terminate()
        child.kill()
    child.terminate()


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_child_ends_with_its_killed_owner(owner: Owner, frozen: bool) -> None:
    process = owner(
        """
        child = Child([sys.executable, "-c", FOREVER])
        child.output.readline()
        print(child.pid, flush=True)
        time.sleep(600)
        """
    )
    (pid,) = read_pids(process)
    supervisor = supervisor_of(pid)
    if frozen:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    wait_until(lambda: not is_alive(pid), 10, "the child's end")
    wait_until(lambda: not is_alive(supervisor), 10, "the supervisor's end")


def test_forgotten_child_ends() -> None:
    child = Child(["sleep", "600"])
    pid = child.pid
    with pytest.warns(ResourceWarning):
        del child
    wait_until(lambda: not is_alive(pid), 10)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the owner does it, in poll()")
def test_child_ends_with_its_killed_supervisor() -> None:
    with Child([sys.executable, "-c", FOREVER]) as child:
        os.kill(supervisor_of(child.pid), signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        wait_until(lambda: not is_alive(child.pid), 10)


def test_children_do_not_hold_each_other(owner: Owner) -> None:
    process = owner(
        """
        a = Child(["sleep", "600"])
        b = Child(["sleep", "600"])
        print(a.pid, b.pid, flush=True)
        sys.stdin.readline()
        a.close()
        print(a.pid, flush=True)
        time.sleep(600)
        """
    )
    a, b = read_pids(process)
    supervisor = supervisor_of(a)
    assert process.stdin is not None
    process.stdin.write("close\n")
    process.stdin.flush()
    assert read_pids(process) == [a]
    assert not is_alive(a)
    assert not is_alive(supervisor)
    assert is_alive(b)
    process.kill()
    wait_until(lambda: not is_alive(b), 10)


def test_both_children_end_with_their_owner(owner: Owner) -> None:
    process = owner(
        """
        a, b = Child(["sleep", "600"]), Child(["sleep", "600"])
        print(a.pid, b.pid, flush=True)
        time.sleep(600)
        """
    )
    pids = read_pids(process)
    process.kill()
    wait_until(lambda: not any(map(is_alive, pids)), 10)


@pytest.mark.parametrize("end", ["close", "exit"])
def test_grandchildren_end_too(end: str) -> None:
    script = "sleep 600 & echo $!; " + ("wait" if end == "close" else "read line; exit 3")
    child = Child(["sh", "-c", script])
    assert child.output is not None
    grandchild = int(child.output.readline())
    assert is_alive(grandchild)
    if end == "exit":
        child.stdin.close()
        assert child.wait(10) == 3
        wait_until(lambda: not is_alive(grandchild), 10)
    child.close()
    wait_until(lambda: not is_alive(grandchild), 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_for_the_owners_group_harms_no_child(owner: Owner, number: signal.Signals) -> None:
    """Jupyter interrupts and shuts down whole process groups."""
    process = owner(
        """
        child = Child(["cat"])
        awaited = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
        print(child.pid, flush=True)
        signal.sigwait(awaited)
        child.stdin.write(b"still here\\n")
        child.stdin.flush()
        print(child.output.readline().decode(), end="", flush=True)
        """
    )
    (pid,) = read_pids(process)
    assert len({os.getsid(one) for one in (process.pid, supervisor_of(pid), pid)}) == 3
    os.killpg(process.pid, number)
    assert process.stdout is not None
    assert process.stdout.readline() == "still here\n"


def test_child_can_be_interrupted_itself() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    with Child([sys.executable, "-c", code]) as child:
        assert child.output is not None
        assert child.output.readline() == b"True\n"


def test_sigterm_for_the_supervisor_stops_the_child_gracefully() -> None:
    code = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('up', flush=True)\nsignal.pause()"
    )
    with Child([sys.executable, "-c", code]) as child:
        assert child.output is not None
        child.output.readline()
        os.kill(supervisor_of(child.pid), signal.SIGTERM)
        assert child.wait(10) == 5
