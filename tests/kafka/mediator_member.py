"""A mediator, or a step's processor, as a process that ends itself where it is told to."""

from __future__ import annotations

import signal
import threading

from mediating import Orders
from member import CLUSTER, OPTIONS, told


def main() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    orders = Orders.of(CLUSTER, OPTIONS)
    step = OPTIONS.get("step")
    consumer = orders.processor(step, OPTIONS["slot"]) if step else orders.consumer(OPTIONS["slot"])
    consumer.run(stop, told)


if __name__ == "__main__":
    main()
