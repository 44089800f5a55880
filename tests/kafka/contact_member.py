"""An importer as a process, which is killed when the rows of its first job are stored, and nothing is reported yet."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.topics import Topic
from labkit.services.contacts import ContactsJob, Importer, Job


def die(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    options = json.loads(sys.argv[1])
    topic = Topic(Cluster(options["bootstrap"]), options["topic"], options["partitions"], ContactsJob)
    Consumer(topic, Importer(options["dsn"], die), options["group"]).run(threading.Event())


if __name__ == "__main__":
    main()
