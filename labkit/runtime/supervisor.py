"""The one program under which every server and pod runs: it ends them, whatever becomes of their owner.

Run as a script by `python -I -S supervisor.py`, with the standard library only: it starts in 30 ms. It lives in a
session of its own, and its child in another: an interrupt for the owner's process group reaches neither, and a
signal to the child's group reaches the grandchildren. It has one thread, which never waits for the child.

`supervisor.py pipe STDIN OUTPUT USER COMMAND…` has a pipe of its owner's as stdin: the end of that is the end of the
child, by SIGKILL, since a frozen one would notice nothing gentler. Lines on it are signals for the child. Stdout tells
`pid N`, then `exit N`; or `error TEXT`. USER is `UID:GID` for a command that refuses to run as root, else `-`.

`supervisor.py listen FOLDER` gets its orders as one line of JSON on stdin (see `Listen`), and tells a loopback port.
Users hold connections to it; some seconds after the last one closed, the child is stopped. FOLDER is only there to
recognise it by.
"""

from __future__ import annotations

import contextlib
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
STEADY = 10.0  # seconds of life after which a death counts as the first one again
DISCARD_SECONDS = 1.5  # for a stop whose data is thrown away: nothing to save
KEEP_SECONDS = 15.0  # for a stop that keeps the data: a clean one spares the next start a recovery


def die_with_this_process() -> Callable[[], None] | None:
    """What a new child does before exec, so that the kernel kills it should this process be killed. Linux only.

    The kernel ties it to the *thread* that forked: one more reason to have only one.
    """
    if sys.platform != "linux":
        return None
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def set_death_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return set_death_signal


class Supervised:
    """The child, and the signals and files one `select` waits for."""

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
        # Handlers, not SIG_IGN: what is ignored stays ignored in the child after exec.
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
            preexec_fn=self._before_exec,  # called after the user has changed, which takes the death signal away
        )
        return self.process.pid

    def ready(self, timeout: float | None) -> list[Any]:
        """The files that have something to read; signals only end the wait."""
        found = [key.fileobj for key, _ in self.events.select(timeout)]
        if self._woken in found:
            found.remove(self._woken)
            with contextlib.suppress(BlockingIOError):
                while self._woken.recv(4096):
                    pass
        return found

    def ended(self) -> int | None:
        """The child's exit code once it is over. What it started goes with it."""
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
        """SIGKILL for the child and everything in its group, stopped or not."""
        if self.process is not None:
            self._kill_group(self.process.pid)

    @staticmethod
    def _kill_group(group: int) -> None:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


def tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, text.encode() + b"\n")


def pipe(stdin: int, output: int, user: tuple[int, int] | None, command: list[str]) -> None:
    """Run `command` until it ends or the owner does."""
    child = Supervised(command, stdin, output, user)
    try:
        pid = child.start()
    except OSError as error:
        tell(f"error {error.strerror}: {error.filename}")
        return
    os.close(stdin)
    os.close(output)
    tell(f"pid {pid}")
    child.events.register(0, selectors.EVENT_READ)
    left = b""
    while True:
        if child.ready(None):
            chunk = os.read(0, 4096)
            if not chunk:
                child.events.unregister(0)  # readable from now on, which would spin
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
            tell(f"exit {code}")
            break


class Listen:
    """A child shared by users in several processes, each of which holds a connection.

    The orders: `command`, `output` (its log), `state` (the file that tells others of it), `token`, `linger` (seconds),
    `folder` (its data), `pinned` and `info` (for the users).

    A connection sends the token, then commands, a line each, every one answered by the status. `hold` makes it a
    user. `ready` says that the child works: from then on it is restarted when it dies. Before that, its death is the
    end, and the folder is left for whoever wants to read the log. `pin` and `unpin` say whether the child stays, and
    its data, without users. `stop` ends it, whoever uses it.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.pinned, self.is_ready, self.restarts = spec, bool(spec["pinned"]), False, 0
        output = os.open(spec["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.child = Supervised(spec["command"], subprocess.DEVNULL, output)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.listener.setblocking(False)
        self.child.events.register(self.listener, selectors.EVENT_READ)
        self.child.events.register(0, selectors.EVENT_READ)
        self.starting = True  # stdin is open: whoever starts us counts as a user until it holds a connection
        self.received: dict[socket.socket, bytes] = {}
        self.trusted: set[socket.socket] = set()
        self.users: set[socket.socket] = set()
        self.pid, self.born, self.deaths = 0, 0.0, 0
        self.restart_at = self.idle_until = self.kill_at = float("inf")
        self.stopping = False

    def run(self) -> None:
        self.start_child()
        tell(str(self.listener.getsockname()[1]))
        os.dup2(2, 1)  # the starter reads up to the end of it
        while self.pid or not self.stopping:
            wait = min(self.restart_at, self.idle_until, self.kill_at) - time.monotonic()
            for source in self.child.ready(None if wait == float("inf") else max(0.0, wait)):
                self.on_readable(source)
            if self.child.ended() is not None and not self.on_death():
                return
            now = time.monotonic()
            if now >= self.restart_at:
                self.restarts += 1
                self.start_child()
            if self.child.asked_to_stop or now >= self.idle_until:
                self.stop()
            if now >= self.kill_at:
                self.kill_at = float("inf")
                self.child.kill()
        self.leave()

    def start_child(self) -> None:
        self.restart_at, self.born = float("inf"), time.monotonic()
        try:
            self.pid = self.child.start()
        except OSError as error:  # Java was removed under a running broker, no memory for a process, …
            if not self.is_ready:
                raise
            sys.stderr.write(f"supervisor: {error}\n")  # the log
            self.on_death()
        self.save()

    def on_death(self) -> bool:
        """Whether to go on."""
        self.pid = 0
        if self.stopping:
            return True
        if not self.is_ready:
            if not self.pinned:
                self.forget()
            return False
        now = time.monotonic()
        self.deaths = 0 if now - self.born > STEADY else self.deaths + 1
        self.restart_at = now + RESTART_WAITS[min(self.deaths, len(RESTART_WAITS) - 1)]
        return True

    def on_readable(self, source: Any) -> None:
        if source == 0:
            if not os.read(0, 4096):
                self.child.events.unregister(0)
                self.starting = False
                self.count()
        elif source is self.listener:
            with contextlib.suppress(OSError):
                connection, _ = self.listener.accept()
                connection.setblocking(False)
                self.received[connection] = b""
                self.child.events.register(connection, selectors.EVENT_READ)
        elif source in self.received:
            self.on_connection(source)

    def on_connection(self, connection: socket.socket) -> None:
        try:
            chunk = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        *lines, self.received[connection] = (self.received[connection] + chunk).split(b"\n")
        for line in lines:
            if connection not in self.received:
                return  # closed by the line before
            if connection in self.trusted:
                self.on_command(connection, line.decode(errors="replace"))
            elif line.decode(errors="replace") == self.spec["token"]:
                self.trusted.add(connection)
            else:
                chunk = b""
                break
        if not chunk or len(self.received.get(connection, b"")) > 4096:
            self.close(connection)

    def close(self, connection: socket.socket) -> None:
        if self.received.pop(connection, None) is None:
            return
        self.child.events.unregister(connection)
        self.trusted.discard(connection)
        self.users.discard(connection)
        connection.close()
        self.count()

    def on_command(self, connection: socket.socket, command: str) -> None:
        if self.stopping and command in ("hold", "ready", "pin"):
            self.close(connection)  # too late: whoever came just now starts anew
            return
        if command == "hold":
            self.users.add(connection)
        elif command == "ready":
            self.is_ready = True
        elif command in ("pin", "unpin"):
            self.pinned = command == "pin"
        elif command == "stop":
            self.pinned = False
            self.stop()
        self.count()
        if command != "status":
            self.save()
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(self.status()).encode() + b"\n")

    def count(self) -> None:
        """Start the countdown when nobody is left, end it when somebody came."""
        if self.users or self.pinned or self.starting:
            self.idle_until = float("inf")
        elif self.idle_until == float("inf"):
            self.idle_until = time.monotonic() + float(self.spec["linger"])

    def status(self) -> dict[str, Any]:
        return {
            "ready": self.is_ready,
            "pinned": self.pinned,
            "users": len(self.users),
            "pid": self.pid,
            "restarts": self.restarts,
            "supervisor": os.getpid(),
            "folder": self.spec["folder"],
            "info": self.spec["info"],
        }

    def save(self) -> None:
        """Describe ourselves in the state file, readable by this user only: it holds the token."""
        if self.stopping:
            return
        text = json.dumps(
            {**self.status(), "port": self.listener.getsockname()[1], "token": self.spec["token"]}, indent=1
        )
        path = self.spec["state"]
        with contextlib.suppress(OSError):
            with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(text)
            os.replace(path + ".new", path)

    def forget(self) -> None:
        """Remove the state file, unless it has become another supervisor's."""
        with contextlib.suppress(OSError, ValueError):
            with open(self.spec["state"]) as file:
                ours = json.load(file)["token"] == self.spec["token"]
            if ours:
                os.unlink(self.spec["state"])

    def stop(self) -> None:
        if self.stopping:
            return
        self.stopping, self.child.asked_to_stop = True, False
        self.restart_at = self.idle_until = float("inf")
        self.child.events.unregister(self.listener)
        self.listener.close()  # whoever comes now is refused, and starts anew
        self.kill_at = time.monotonic() + (KEEP_SECONDS if self.pinned else DISCARD_SECONDS)
        self.child.send(signal.SIGTERM)
        self.child.send(signal.SIGCONT)  # a frozen one could not obey

    def leave(self) -> None:
        """Data that is pinned stays, with the state file that says where it is."""
        if not self.pinned:
            import shutil

            shutil.rmtree(self.spec["folder"], ignore_errors=True)
            self.forget()


def main() -> None:
    if sys.argv[1] == "pipe":
        user, _, group = sys.argv[4].partition(":")
        pipe(int(sys.argv[2]), int(sys.argv[3]), (int(user), int(group)) if group else None, sys.argv[5:])
    else:
        spec = json.loads(sys.stdin.buffer.readline())
        if os.fork() == 0:  # whoever starts us need not wait for us: a zombie would stay until it ends
            Listen(spec).run()


if __name__ == "__main__":
    main()
