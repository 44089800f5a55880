"""A consumer, packed as for a pod, as a process that ends itself where it is told to."""

from __future__ import annotations

import signal
import threading

from member import OPTIONS, told

from labkit.lab.pods.travel import unpack


def main() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    unpack(bytes.fromhex(OPTIONS["packed"])).run(stop, told)


if __name__ == "__main__":
    main()
