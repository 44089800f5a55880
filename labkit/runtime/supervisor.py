"""The program under which every server and pod runs: it ends them, whatever becomes of their owner.

It is a script, run by `python -I -S supervisor.py`, and uses the standard library only: so it starts in 30 ms. It has a
session of its own, and its child another: an interrupt for the owner's process group reaches neither, and a signal to
the child's group reaches the grandchildren. It has one thread, which never waits for the child.

`supervisor.py pipe STDIN OUTPUT USER COMMAND…` has a pipe from its owner as stdin. When the pipe ends, the child is
killed by SIGKILL, because a frozen child notices nothing gentler. Lines on the pipe are signals for the child. Stdout
says `pid N`, then `exit N`; or `error TEXT`. USER is `UID:GID` for a command that refuses to run as root, else `-`.

`supervisor.py keep LOCK LINGER FOLDER COMMAND…` runs a child that several processes use (see `Keep`), until LINGER
seconds after the last of them has gone. LOCK is a file that is open and locked; stderr is the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1
RESTART_WAITS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds before the first, second, … restart in a row
STEADY = 10.0  # seconds of life after which a death counts as the first in a row
LOOK = 0.2  # seconds between two looks whether anybody uses the child
DISCARD_SECONDS = 1.5  # for a stop after which the data is removed
KEEP_SECONDS = 15.0  # for a stop that keeps the data: a clean stop spares the next start a recovery


def die_with_this_process() -> Callable[[], None] | None:
    """A function for a new child to call before exec: the kernel then kills the child if this process is killed.

    Linux only. The kernel ties the child to the *thread* that forked: one more reason to have only one.
    """
    if sys.platform != "linux":
        return None
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def set_death_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return set_death_signal


class Supervised:
    """The child, and the signals and files for which one `select` waits."""

    def __init__(self, command: list[str], stdin: int, output: int, user: tuple[int, int] | None = None) -> None:
        self.command, self.stdin, self.output, self.user = command, stdin, output, user
        self.process: subprocess.Popen[bytes] | None = None
        self.asked_to_stop = False
        self.events = selectors.DefaultSelector()
        self._before_exec = die_with_this_process()
        self._woken, wake = socket.socketpair()
        for end in (self._woken, wake):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._wake = wake
        # Handlers, not SIG_IGN: the child would ignore the same signals after exec.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGHUP, lambda *_: None)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        self.events.register(self._woken, selectors.EVENT_READ)

    def _on_term(self, *_: object) -> None:
        self.asked_to_stop = True

    def start(self) -> int:
        self.process = subprocess.Popen(
            self.command,
            stdin=self.stdin,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
            user=self.user[0] if self.user else None,
            group=self.user[1] if self.user else None,
            extra_groups=[] if self.user else None,
            preexec_fn=self._before_exec,  # called after the change of user, which resets the death signal
        )
        return self.process.pid

    def ready(self, timeout: float | None) -> list[Any]:
        """The files that have something to read. A signal ends the wait, too."""
        found = [key.fileobj for key, _ in self.events.select(timeout)]
        if self._woken in found:
            found.remove(self._woken)
            with contextlib.suppress(BlockingIOError):
                while self._woken.recv(4096):
                    pass
        return found

    def ended(self) -> int | None:
        """The child's exit code, once it has ended. All that the child started is killed with it."""
        if self.process is None:
            return None
        code = self.process.poll()
        if code is not None:
            self._kill_group(self.process.pid)
            self.process = None
        return code

    def send(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL the child and everything in its group, frozen or not."""
        if self.process is not None:
            self._kill_group(self.process.pid)

    @staticmethod
    def _kill_group(group: int) -> None:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


def say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, text.encode() + b"\n")


def pipe(stdin: int, output: int, user: tuple[int, int] | None, command: list[str]) -> None:
    """Run `command` until it ends, or its owner does."""
    child = Supervised(command, stdin, output, user)
    try:
        pid = child.start()
    except OSError as error:
        say(f"error {error.strerror}: {error.filename}")
        return
    os.close(stdin)
    os.close(output)
    say(f"pid {pid}")
    child.events.register(0, selectors.EVENT_READ)
    left = b""
    while True:
        if child.ready(None):
            chunk = os.read(0, 4096)
            if not chunk:
                child.events.unregister(0)  # it would count as readable from now on
                child.kill()
                while child.ended() is None:
                    child.ready(None)
                break
            *lines, left = (left + chunk).split(b"\n")
            for line in lines:
                if line == b"kill":
                    child.kill()
                else:
                    child.send(int(line))
        if child.asked_to_stop:
            child.asked_to_stop = False
            child.send(signal.SIGTERM)
        code = child.ended()
        if code is not None:
            say(f"exit {code}")
            break


class Keep:
    """A child that several processes use, with its data in `folder`. When it dies, it is started again.

    Files in the folder hold the state; a lock on a file ends with the process that holds it.

    - `users/…`: each is locked by a process that uses the child.
    - `ready`: the child works, and users may come. If it dies before that, it is not started again, and the folder
      stays, for the log in it.
    - `pinned`: the child stays without users, and its data for ever.
    - `supervisor`: locked as long as this supervisor lives; holds its pid and the child's.

    Some seconds after the last user has gone, the child is stopped. SIGTERM stops it, whoever uses it.
    """

    def __init__(self, lock: int, linger: float, folder: str, command: list[str]) -> None:
        self.lock, self.linger, self.folder = lock, linger, folder
        self.child = Supervised(command, subprocess.DEVNULL, os.dup(2))
        self.pid, self.restarts, self.born, self.deaths = 0, 0, 0.0, 0
        self.restart_at = self.kill_at = float("inf")
        self.is_ready = self.stopping = False

    def run(self) -> None:
        self.start_child()
        used = time.monotonic()
        while self.pid or not self.stopping:
            self.child.ready(LOOK)  # releasing a lock wakes nobody
            self.is_ready = self.is_ready or self.has("ready")
            if self.child.ended() is not None and not self.on_death():
                return
            now = time.monotonic()
            if now >= self.restart_at:
                self.restarts += 1
                self.start_child()
            if self.is_used():
                used = now
            if self.child.asked_to_stop or now - used > self.linger:
                self.stop()
            if now >= self.kill_at:
                self.child.kill()
        if not self.has("pinned"):
            import shutil

            shutil.rmtree(self.folder, ignore_errors=True)

    def start_child(self) -> None:
        self.restart_at, self.born = float("inf"), time.monotonic()
        try:
            self.pid = self.child.start()
        except OSError as error:  # Java was removed under a running broker, no memory for a process, …
            if not self.is_ready:
                raise
            sys.stderr.write(f"supervisor: {error}\n")  # the log
            self.on_death()
        facts = {"supervisor": os.getpid(), "pid": self.pid, "restarts": self.restarts}
        os.pwrite(self.lock, json.dumps(facts).encode().ljust(200), 0)  # in one piece, over all that was there

    def on_death(self) -> bool:
        """Note the child's death. Returns whether to go on."""
        self.pid = 0
        if self.stopping or not self.is_ready:
            return self.stopping
        now = time.monotonic()
        self.deaths = 0 if now - self.born > STEADY else self.deaths + 1
        self.restart_at = now + RESTART_WAITS[min(self.deaths, len(RESTART_WAITS) - 1)]
        return True

    def has(self, name: str) -> bool:
        return os.path.exists(os.path.join(self.folder, name))

    def is_used(self) -> bool:
        """Whether anybody uses the child, or has pinned it. A pin counts once the child is ready."""
        return users_of(self.folder) > 0 or (self.is_ready and self.has("pinned"))

    def stop(self) -> None:
        asked, self.child.asked_to_stop = self.child.asked_to_stop, False
        if self.stopping:
            return
        if self.is_ready:
            ready = os.path.join(self.folder, "ready")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(ready)  # so nobody comes from now on
            if not asked and self.is_used():  # somebody has come just before
                open(ready, "w").close()
                return
        self.stopping, self.restart_at = True, float("inf")
        self.kill_at = time.monotonic() + (KEEP_SECONDS if self.has("pinned") else DISCARD_SECONDS)
        self.child.send(signal.SIGTERM)
        self.child.send(signal.SIGCONT)  # a frozen child could not obey


def users_of(folder: str | os.PathLike[str]) -> int:
    """How many processes hold a lock in `folder`/users now."""
    try:
        return sum(map(is_held, os.scandir(os.path.join(folder, "users"))))
    except OSError:  # somebody removed it
        return 0


def is_held(path: str | os.PathLike[str]) -> bool:
    """Whether a living process has locked this file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two processes that look must not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def main() -> None:
    if sys.argv[1] == "pipe":
        user, _, group = sys.argv[4].partition(":")
        pipe(int(sys.argv[2]), int(sys.argv[3]), (int(user), int(group)) if group else None, sys.argv[5:])
    elif os.fork() == 0:  # so that whoever starts us need not wait for us, or keep a zombie
        Keep(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5:]).run()


if __name__ == "__main__":
    main()
