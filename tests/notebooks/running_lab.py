"""`labkit lab` as a process, and what is left of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from processes import processes_of, wait_until

ANSWER = build_opener(ProxyHandler({})).open


def environment(state: Path, **more: str) -> dict[str, str]:
    """That of a machine without a desktop, and with only those packages that are installed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "BROWSER", "PYTHONPATH")}
    return {**kept, "LABKIT_STATE": str(state), **more}


@contextmanager
def started(command: Sequence[str | Path], env: dict[str, str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is told to end at the end of the block, and killed if that has failed."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**env, "PYTHONUNBUFFERED": "1"}, **{**pipes, **how}) as process:
        try:
            yield process
            process.terminate()
        except BaseException:
            process.kill()
            raise


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


def ask(address: str, path: str, body: bytes | None = None) -> int:
    """The status of what JupyterLab at this address answers to a request for `path`, a POST if there is a body."""
    where = urlsplit(address)
    with ANSWER(Request(f"http://{where.netloc}/{path}?{where.query}", body), timeout=60) as answer:
        return int(answer.status)


def assert_nothing_is_left(folder: Path) -> None:
    wait_until(lambda: not processes_of(folder), 10, f"the end of every process: {processes_of(folder)}")
