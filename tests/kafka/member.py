"""A member of a group as a process: prints each step as a line of JSON, ends itself where it is told to."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import FailedRecord, SetAside, keep_trying
from labkit.kafka.consumer.steps import Measured, Step
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.aggregation import AtomicKeyValueStore, ImportKey
from labkit.patterns.retries import RetryingConsumer, dead_letter, retry_topics

OPTIONS = json.loads(sys.argv[1])
OUTPUT = threading.Lock()
CLUSTER = Cluster(OPTIONS["bootstrap"])
SEEN: dict[Step, int] = {}


def handle(record: Record[Any]) -> None:
    if OPTIONS.get("output"):
        Topic(CLUSTER, OPTIONS["output"], 1, int).send(record.value)
    for _ in range(round(100 * OPTIONS.get("hang", 0))):  # in slices: what is slept through on ice does not count
        time.sleep(0.01)


def refuse(record: Record[Any]) -> None:
    raise ConnectionError("no answer")


def aggregate(commands: Topic[Any], name: str) -> Callable[..., None]:
    """Count the jobs of imports; or, with what was seen, tell of their end in a service of its own."""
    from aggregating import count, notify  # brings pytest, which no other member waits for

    notices = Topic(CLUSTER, OPTIONS["notices"], 1, str)
    tell, slot = partial(notify, notices), OPTIONS["slot"]
    store = Topic(CLUSTER, name, commands.partitions, int)
    counts = AtomicKeyValueStore(replace(commands, value=str), store, count, key=ImportKey.parse, callback=tell)
    if seen := OPTIONS.get("seen"):
        return counts.follow(tell, Topic(CLUSTER, seen, store.partitions, int), slot).run
    return counts.consumer(slot, 0.05).run


def told(step: Step, subject: Any) -> None:
    """Print the step, then crash if this is the place and the time for it."""
    if isinstance(subject, Record | FailedRecord):
        subject = [subject.topic, subject.partition, subject.offset]
    elif isinstance(subject, dict):
        subject = [[*place, offset] for place, offset in subject.items()]
    elif isinstance(subject, Measured):
        subject = dict(subject.counts)
    with OUTPUT:
        print(json.dumps({"step": step.value, "subject": subject}), flush=True)
        SEEN[step] = SEEN.get(step, 0) + 1
        if OPTIONS.get("crash_at") == step.value and SEEN[step] == OPTIONS.get("crash_count", 1):
            if OPTIONS.get("crash_how") == "exit":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGSTOP if OPTIONS.get("crash_how") == "freeze" else signal.SIGKILL)


def main() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    topic = Topic(CLUSTER, OPTIONS["topic"], OPTIONS["partitions"], int)
    if delays := OPTIONS.get("retry_topics"):
        RetryingConsumer(topic, refuse, OPTIONS["group"], retry=retry_topics(*delays)).run(stop, told)
        return
    if OPTIONS.get("dead_letter"):
        handler = handle if OPTIONS.get("mended") else refuse
        RetryingConsumer(topic, handler, OPTIONS["group"], retry=dead_letter()).run(stop, told)
        return
    if store := OPTIONS.get("store"):
        aggregate(topic, store)(stop, told)
        return
    slot, aside = OPTIONS.get("slot", ""), OPTIONS.get("aside")
    consumer = Consumer(
        topic,
        refuse if aside else handle,
        group=OPTIONS["group"],
        guarantee="exactly once" if slot else "at least once",
        slot=slot,
        on_failure=(lambda failed: SetAside(aside, None, failed.message.value())) if aside else keep_trying(),
        start=OPTIONS.get("start", "earliest"),
        deadline=OPTIONS.get("deadline", 60.0),
    )
    consumer.run(stop, told)


if __name__ == "__main__":
    main()
