"""A process that cannot outlive the one that started it: a pod, a server, or a tool that runs for a while."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from labkit.closing import Closing
from labkit.kafka.errors import LabkitError

SUPERVISOR = Path(__file__).with_name("supervisor.py")


def supervisor_command(*arguments: str) -> list[str]:
    """The command of the supervisor: isolated (-I) and without site-packages (-S), so it starts in milliseconds."""
    return [sys.executable, "-I", "-S", str(SUPERVISOR), *arguments]


class Child(Closing):
    """A command running under a supervisor of its own.

    The child ends, with everything it started, when this process does (kill -9 included), when `close` is called, and
    when this object is garbage. `stdin` writes to it. `output` reads its stdout and stderr: read it, or a child that
    writes much blocks. With `output=` they are appended to a file instead. `user` is another (uid, gid) to run as.

    Raises LabkitError when the command cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        output: Path | None = None,
        user: tuple[int, int] | None = None,
    ) -> None:
        appended = None if output is None else os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # All of these are close-on-exec: no other child can hold this one's pipes open.
        owner_read, self._owner = os.pipe()
        self._says, says_write = os.pipe()
        # A child whose object is garbage ends. What its supervisor says can be read as long as anybody may wait.
        self._release = weakref.finalize(self, os.close, self._owner)
        close_says = weakref.finalize(self, os.close, self._says)
        self._release.atexit = close_says.atexit = False  # clean-up at exit still needs both pipes
        stdin_read, stdin_write = os.pipe()
        self.stdin: BinaryIO = os.fdopen(stdin_write, "wb")
        self.output: BinaryIO | None = None
        if appended is None:
            output_read, appended = os.pipe()
            self.output = os.fdopen(output_read, "rb")
        self._text, self._lock = b"", threading.Lock()
        self._code: int | None = None
        who = "-" if user is None else "{}:{}".format(*user)
        try:
            self._supervisor = subprocess.Popen(
                supervisor_command("pipe", str(stdin_read), str(appended), who, *command),
                stdin=owner_read,
                stdout=says_write,
                stderr=appended,
                pass_fds=(stdin_read, appended),
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        finally:
            for end in (owner_read, says_write, stdin_read, appended):
                os.close(end)
        while b"\n" not in self._text and (chunk := os.read(self._says, 4096)):
            self._text += chunk
        word, _, rest = self._text.partition(b"\n")[0].decode().partition(" ")
        if word != "pid":
            self._code = -1
            self.close()
            raise LabkitError(f"{command[0]} could not be started: {rest or 'its supervisor ended'}")
        self.pid = int(rest)
        os.set_blocking(self._says, False)

    def poll(self) -> int | None:
        """The child's exit code, as `-N` when signal N ended it, or None while it runs."""
        with self._lock:
            while self._code is None:
                try:
                    chunk = os.read(self._says, 4096)
                except BlockingIOError:
                    return None
                self._text += chunk
                if not chunk:  # the supervisor has ended; if it says no exit code, it was killed
                    last = self._text.rsplit(b"exit ", 1)
                    self._code = int(last[1]) if len(last) == 2 else -signal.SIGKILL
                    if len(last) == 1:
                        self._kill_leftovers()
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the child has ended. Raises TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s")
            poll = select.poll()
            poll.register(self._says, select.POLLIN)
            poll.poll(None if left is None else left * 1000)
        return code

    def signal(self, number: int) -> None:
        """Send a signal to the child, if it still runs: by the supervisor, which cannot hit a reused pid."""
        self._say(str(int(number)))

    def terminate(self) -> None:
        """Ask the child to end (SIGTERM)."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the child and all it started (SIGKILL), frozen or not."""
        self._say("kill")

    def close(self) -> None:
        """End the child at once, wait until it is gone, and close its pipes. May be called again."""
        with self._lock:
            if self._release.detach():  # calling it does nothing while Python exits
                os.close(self._owner)
        self._supervisor.wait()
        self.poll()
        for pipe in (self.stdin, self.output):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # there is no reader for what is not yet written
                    pipe.close()

    def _say(self, line: str) -> None:
        with self._lock:
            if self._release.alive:
                with contextlib.suppress(BrokenPipeError):  # it has ended already
                    os.write(self._owner, line.encode() + b"\n")

    def _kill_leftovers(self) -> None:
        """End the child of a killed supervisor, on systems other than Linux, whose kernel does it."""
        with contextlib.suppress(OSError):
            # Our child led a session. Another process that has its pid by now hardly does.
            if sys.platform != "linux" and os.getsid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
