"""A downstream service of the shop as a process; it crashes at a step told by name."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from typing import Any

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.topics import Topic
from labkit.services.orders import Downstream, OrderCheckoutCompleted
from labkit.services.orders.downstream import pieces

OUTPUT = threading.Lock()


def main() -> None:
    options = json.loads(sys.argv[1])
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    topic = Topic(Cluster(options["bootstrap"]), options["topic"], options["partitions"], OrderCheckoutCompleted)

    def told(step: Step, subject: Any) -> None:
        with OUTPUT:
            if step in (Step.COMMITTING, Step.COMMITTED):
                print(json.dumps({"step": step.value, "subject": None}), flush=True)
            if step.value == options["crash_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    service = Downstream(topic, options["dsn"], "parcels", pieces, options["guard"])
    replace(service.consumer(options["group"]), on_step=told).run(stop, lambda *_: None)


if __name__ == "__main__":
    main()
