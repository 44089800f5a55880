"""The one consumer: a group's member that reads topics and calls a handler, in lane order, at least or exactly once.

`spec` has its settings, `loop` polls, `lanes` keep order, `workers` call the handler, `failures` has the record that
fails and what may become of it, `commits` stores offsets, `transactions` does it exactly once, `assignment` follows the
group, `state` calls a handler that has one, `steps` are what it reports.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from typing import Self

from labkit.kafka.consumer.loop import Loop
from labkit.kafka.consumer.spec import Spec
from labkit.kafka.consumer.state import check_store
from labkit.kafka.consumer.steps import Report
from labkit.kafka.consumer.transactional_client import EXIT_NO_ANSWER as EXIT_NO_ANSWER
from labkit.kafka.consumer.watchdog import EXIT_DEADLINE as EXIT_DEADLINE
from labkit.kafka.errors import LabkitError, TopicMissing
from labkit.kafka.producer import POD


@dataclass(frozen=True)
class Consumer(Spec):
    """Reads topics as a member of a consumer group and calls `handler` with each record, in lane order, at least once;
    with `guarantee="exactly once"` what the handler sends is there once.

    It is plain data until `run`. `Lab.deploy` fills in `group`, runs it in pods and keeps them alive.
    """

    def prepare(self) -> Self:
        """Create what it needs beside its topics, and return it as it will run. Raises TopicMismatch, TopicMissing."""
        check_store(self)
        return self

    def run(self, stop: threading.Event, report: Report | None = None) -> None:
        """Consume until `stop` is set, then drain, commit and leave the group.

        Raises TopicMissing for a topic that does not exist, or is deleted or recreated meanwhile; DeliveryFailed when
        a handler's output was not confirmed; HandlerExit when a handler called `sys.exit`; the handler's error when the
        policy says Stop; LabkitError when the group refuses this member.
        """
        if not self.group:
            raise LabkitError(
                "a Consumer needs a group to run: Consumer(..., group='billing'), or let Lab.deploy name it"
            )
        there = self.cluster.topics()
        for topic in self.sources:
            if topic.name not in there:
                raise TopicMissing(
                    f"topic {topic.short} ({topic.name}) does not exist at {self.cluster.bootstrap}: create it first"
                )
        check_store(self)
        spec = self
        if self.guarantee == "exactly once":
            spec = replace(self, slot=os.environ.get(POD) or self.slot)
            if not spec.slot:
                raise LabkitError(
                    "exactly once needs a slot, a name that this process keeps when it is restarted and shares with no "
                    "other member of its group: Consumer(..., slot='billing-1'), or let Lab.deploy run it"
                )
        Loop(spec, stop, report).run()
