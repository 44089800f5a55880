"""What the parts of one running consumer share."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from confluent_kafka import TopicPartition

from labkit.kafka.consumer.lanes import Partition
from labkit.kafka.consumer.spec import Spec
from labkit.kafka.consumer.steps import Report, Step
from labkit.kafka.errors import error_text


class Run:
    """One run of a consumer: its partitions, its clock, its end, and its hooks."""

    def __init__(self, spec: Spec, stop: threading.Event, report: Report | None) -> None:
        self.spec, self.stop = spec, stop
        self.hooks = [hook for hook in (spec.on_step, report) if hook is not None]
        self._change_hooks = self.hooks if spec.on_change is None else [*self.hooks, spec.on_change]
        self.partitions: dict[tuple[str, int], Partition] = {}
        self.topic_ids = {topic.name: spec.cluster.topic_id(topic.name) for topic in spec.sources}
        self.store_id = "" if spec.store is None else spec.cluster.topic_id(spec.store.name)
        self.clock = 0.0  # seconds that this run was alive: a frozen process does not age
        self.more = False  # the thread that polls handles records itself, and has more of them
        self.fatal: BaseException | None = None
        self.wake = threading.Event()  # a lane ran empty, or cannot go on

    def report(self, step: Step, subject: Any) -> None:
        """Call the hooks with a step that does not come with every record."""
        for hook in self._change_hooks:
            hook(step, subject)

    def end(self, error: BaseException) -> None:
        """Have the run end with this error; the first one counts."""
        self.fatal = self.fatal or error
        self.wake.set()

    def assigned_among(self, partitions: Iterable[TopicPartition]) -> list[Partition]:
        """Those of these partitions that this run has."""
        keys = ((one.topic, one.partition) for one in partitions)
        return [self.partitions[key] for key in keys if key in self.partitions]


def log(text: str) -> None:
    """A pod's log is its stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def log_traceback(error: BaseException, trace: TracebackType | None) -> None:
    try:
        traceback.print_exception(type(error), error, trace)
    except Exception as broken:
        log(f"(its traceback cannot be read: {error_text(broken)})")
