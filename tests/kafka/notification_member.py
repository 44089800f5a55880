"""A WebSocket service in a process of its own, to be killed."""

from __future__ import annotations

import json
import resource
import sys
import threading

from noticing import Note

from labkit.kafka.cluster import Cluster
from labkit.kafka.topics import Topic
from labkit.services.notifications.websocket import NotificationService


def main() -> None:
    options = json.loads(sys.argv[1])
    topic = Topic(Cluster(options["bootstrap"]), options["topic"], options["partitions"], Note)
    if options["files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options["files"], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    service = NotificationService(options["port"], topic, options["secret"])
    ready = threading.Event()

    def report(_step: object, _figures: object) -> None:
        if not ready.is_set():
            ready.set()
            print("ready", flush=True)

    service.run(threading.Event(), report)


if __name__ == "__main__":
    main()
