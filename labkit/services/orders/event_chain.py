"""The broker topology, also called choreography: event processors chained by their events, without a mediator.

    order placed → charge → charged → reserve → reserved → ship → shipped → invoice → invoiced

Each processor listens to the event channel of the processor before it, does its step, and says so in a channel of its
own. All listen to one further channel, which says what has failed for good: then each takes back what it has done for
that order, or never does it. Nobody knows who else listens. So a new processor changes no other: it listens to a
channel that exists, and has a channel of its own.

Walk one event through it. `charged` of order 17 comes to the processor of reserve. It writes its rows, and what has
become of order 17, in one transaction of its database. It sends `reserved` in one transaction of Kafka with the offset
of `charged`. If it is killed in between, `charged` comes again: it remembers order 17, leaves the rows as they are, and
sends `reserved`. `failed` may overtake other events, and reach a processor before the event for its step. Then the
processor remembers the order as cancelled, and never does its step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import psycopg

from labkit.kafka.errors import LabkitError, PoisonRecord
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.mediator import Refused
from labkit.patterns.own_topics import taken_apart
from labkit.patterns.retries import Policy, RetryingConsumer, blocking, exponential
from labkit.services.orders.processors import OrderPlaced, OrderStep


class OrderEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a processor says about an order. The channel says what has happened: charged, failed, undone."""

    id: str
    step: str
    """The step that says it."""
    order: OrderPlaced
    """The initial event, so that each listener has all that it needs."""
    reason: str = ""
    """Why the step failed."""


def event_processor(
    step: OrderStep,
    after: Topic[OrderPlaced] | Topic[OrderEvent],
    done: Topic[OrderEvent],
    failed: Topic[OrderEvent],
    undone: Topic[OrderEvent],
    slot: str = "",
    retry: Policy = blocking(exponential(0.1, cap=60.0), non_retriable=(PoisonRecord, psycopg.DataError)),  # noqa: B008
) -> RetryingConsumer:
    """The consumer that does a step `after` these events, in one process or many, and says `done`, or `failed` for
    good. When another step has `failed`, it takes its own step back and says `undone`, once for each such event.

    While its database is away, it tries again for ever: an order among the dead letters would be neither done nor
    failed.
    """
    for topic in (done, failed, undone):
        if topic.value is not OrderEvent:
            raise LabkitError(f"topic {topic.short} must have values of OrderEvent: {topic!r}")
    if len({topic.name for topic in (after, done, failed, undone)}) < 4:
        raise LabkitError(f"step {step.name}: after, done, failed and undone are four topics")
    return RetryingConsumer(
        *((after, failed), _EventProcessor(step, done, failed, undone), done.name),
        guarantee="exactly once",
        slot=slot,
        commit_interval=0.05,
        retry=retry,
    )


@dataclass(frozen=True)
class _EventProcessor:
    """The handler of a step's events."""

    step: OrderStep
    done: Topic[OrderEvent]
    failed: Topic[OrderEvent]
    undone: Topic[OrderEvent]

    def __call__(self, record: Record[Any]) -> None:
        event: OrderPlaced | OrderEvent | None = record.value
        if event is None:
            raise PoisonRecord(record.topic, record.partition, record.offset, "an event of an order needs a value")
        order = event.order if isinstance(event, OrderEvent) else event
        # A failed step elsewhere, or a replayed dead letter that says so.
        if self.failed.name in (record.topic, taken_apart(record.topic)[0]):
            self.compensate(order)
            return
        try:
            self.step.do(order.id, order)
        except Refused as error:
            self.say(self.failed, order, str(error))
        else:
            self.say(self.done, order)

    def compensate(self, order: OrderPlaced) -> None:
        """Take the step back: another step of this order has failed for good."""
        if self.step.cancel(order.id) == "done":
            self.step.undo(order.id, order)
        # Also if it was undone before: a processor that was killed then may not have said so.
        if self.step.state(order.id) == "undone":
            self.say(self.undone, order)

    def say(self, channel: Topic[OrderEvent], order: OrderPlaced, reason: str = "") -> None:
        channel.send(OrderEvent(order.id, self.step.name, order, reason), key=order.id)
