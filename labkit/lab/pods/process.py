"""A pod: one OS process that runs one thing until it is told to stop. `python -m labkit.lab.pods.process NAME`.

It gets what to run through its stdin (length, then the notebook's import path and what `pack` made), then commands,
one a line: `slow SECONDS`. SIGTERM drains it. Exit code 0: drained. 1: what it runs raised. 70: a handler overran its
deadline. 71: a call of its transaction never came back.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
from typing import Any, BinaryIO, Protocol

from labkit.kafka.consumer.steps import Report
from labkit.kafka.errors import LabkitError, error_text
from labkit.kafka.producer import POD
from labkit.kafka.topics import Topic
from labkit.lab.pods.telemetry import PodReport, Telemetry
from labkit.lab.pods.travel import pack, unpack

HEADER = struct.Struct(">Q")


class Runnable(Protocol):
    """What a pod can run: a consumer, an HTTP service, a JVM."""

    def run(self, stop: threading.Event, report: Report) -> None:
        """Work until `stop` is set, then drain and return."""


def message(runnable: Runnable, deployment: str, telemetry: Topic[PodReport]) -> bytes:
    """What a pod's stdin starts with. Raises CannotTravel."""
    packed = pickle.dumps(sys.path) + pack((runnable, deployment, telemetry))
    return HEADER.pack(len(packed)) + packed


def main() -> int:
    """Run what comes through stdin."""
    name = sys.argv[1]
    os.environ[POD] = name
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    pipe = sys.stdin.buffer
    (size,) = HEADER.unpack(pipe.read(HEADER.size))
    packed = io.BytesIO(pipe.read(size))
    # What the notebook can import, its handlers can. At the end, so that it hides no module of the pod.
    sys.path += [folder for folder in pickle.load(packed) if folder not in sys.path]  # noqa: S301 - from our parent
    runnable, deployment, topic = unpack(packed.read())
    sys.stdin = open(os.devnull)  # noqa: SIM115 - a handler that reads it must not take our commands
    telemetry = Telemetry(topic, deployment, name, os.getpid(), stop)
    threading.Thread(target=_obey, args=(pipe, telemetry), name="commands", daemon=True).start()
    code = 1
    try:
        runnable.run(stop, telemetry)
    except LabkitError as error:
        _say(error_text(error, 20_000))
    except BaseException:
        traceback.print_exc()
    else:
        code = 0
    telemetry.close()
    return code


def _obey(pipe: BinaryIO, telemetry: Telemetry) -> None:
    for line in pipe:
        word, _, rest = line.decode().strip().partition(" ")
        if word == "slow":
            telemetry.slow = float(rest)


def _say(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - a pod's log is its stderr


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a handler that hangs in a thread must not keep a drained pod
