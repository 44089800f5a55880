"""The broker topology, also called choreography: event processors chained by their events, without a mediator.

    order placed → charge → charged → reserve → reserved → ship → shipped → invoice → invoiced

Each processor listens to the event channel of the one before it, does its step, and says so in a channel of its own.
What fails for good is said in one channel that all listen to: each takes back what it has done of that order, or never
does it. Nobody knows who else listens, so a processor is added without touching one: it listens to a channel that is
there, and has a channel of its own.

Walk one event through it. `charged` of order 17 comes to reserve. It writes its rows and what has become of order 17 in
one transaction of its database. It sends `reserved`, in one transaction of Kafka with the offset of `charged`. If it is
killed in between, `charged` comes again; its memory of order 17 has the rows stay as they are, and `reserved` goes out.
`failed` may overtake: it may come to a processor before the event that would have it do its step. Then that one
remembers the order as cancelled, and never does it.
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
    """What a processor says of an order. Its channel says what has happened: charged, failed, undone."""

    id: str
    step: str
    """Of which step."""
    order: OrderPlaced
    """The initial event: who listens has all that it needs."""
    reason: str = ""
    """Why it failed."""


def event_processor(
    step: OrderStep,
    after: Topic[OrderPlaced] | Topic[OrderEvent],
    done: Topic[OrderEvent],
    failed: Topic[OrderEvent],
    undone: Topic[OrderEvent],
    slot: str = "",
    retry: Policy = blocking(exponential(0.1, cap=60.0), non_retriable=(PoisonRecord, psycopg.DataError)),  # noqa: B008
) -> RetryingConsumer:
    """What does a step `after` these events, in one process or many, and says `done`, or `failed` for good. Of what has
    `failed` elsewhere it takes back its own, and says `undone`; for each time it hears of it, so maybe several times.

    While its database is away, it tries again, for ever: an order among the dead letters is neither done nor failed.
    """
    for topic in (done, failed, undone):
        if topic.value is not OrderEvent:
            raise LabkitError(f"topic {topic.short} is to have values of OrderEvent: {topic!r}")
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
            raise PoisonRecord(record.topic, record.partition, record.offset, "an event of an order has a value")
        order = event.order if isinstance(event, OrderEvent) else event
        if self.failed.name in (record.topic, taken_apart(record.topic)[0]):  # or one of its replayed dead letters
            self.compensate(order)
            return
        try:
            self.step.do(order.id, order)
        except Refused as error:
            self.say(self.failed, order, str(error))
        else:
            self.say(self.done, order)

    def compensate(self, order: OrderPlaced) -> None:
        """Another step of this order has failed for good."""
        if self.step.cancel(order.id) == "done":
            self.step.undo(order.id, order)
        # Also if it was undone before: whoever was killed then may not have said so.
        if self.step.state(order.id) == "undone":
            self.say(self.undone, order)

    def say(self, channel: Topic[OrderEvent], order: OrderPlaced, reason: str = "") -> None:
        channel.send(OrderEvent(order.id, self.step.name, order, reason), key=order.id)
