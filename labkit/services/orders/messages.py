"""What orders cost on their way, in messages and time, from the topics themselves: for either topology.

The broker topology also answers by them where an order stands: somebody must read all events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.patterns.mediator import Mediator

READ = 60.0  # seconds for a topic to be read


class Journey(NamedTuple):
    """One order's messages in the topics."""

    messages: Counter[str]
    """How many messages, by the topic's short name."""
    began: float
    ended: float
    """The times of its first and its last message: seconds since 1970."""

    @property
    def seconds(self) -> float:
        """Seconds from the first message to the last one."""
        return self.ended - self.began


class Whereabouts(NamedTuple):
    """Where an order stands, according to the topics."""

    events: tuple[tuple[float, str], ...]
    """Time and topic of each of its messages."""
    read: int
    """How many messages of all orders were read for that."""


def journeys(topics: Iterable[Topic[Any]]) -> dict[str, Journey]:
    """The journeys of all orders that have messages in these topics, by id."""
    found: dict[str, Journey] = {}
    for topic, key, at in _messages(topics):
        one = found.get(key) or Journey(Counter(), at, at)
        one.messages[topic] += 1
        found[key] = one._replace(began=min(one.began, at), ended=max(one.ended, at))
    return found


def where_is(order_id: str, topics: Iterable[Topic[Any]]) -> Whereabouts:
    """Where an order stands. Reads these topics from their beginnings to their ends."""
    read, events = 0, []
    for topic, key, at in _messages(topics):
        read += 1
        if key == order_id:
            events.append((at, topic))
    return Whereabouts(tuple(sorted(events, key=lambda event: event[0])), read)


def topics_of(mediator: Mediator[Any]) -> list[Topic[Any]]:
    """All topics through which a mediator's orders go: events, commands, replies, timeouts, states."""
    each = [step for process in mediator.processes for step in process.steps]
    found = [mediator.initial, *(step.commands for step in each), mediator.replies]
    found += [mediator.timeouts(step.timeout) for step in each] + [mediator.store]
    return list({topic.name: topic for topic in found}.values())


def _messages(topics: Iterable[Topic[Any]]) -> Iterator[tuple[str, str, float]]:
    """Topic, key and time of each message."""
    for topic in topics:
        with Reader(topic) as reader:
            reader.look()  # include partitions that were added
            for messages in reader.messages_to_end(READ):
                for one in messages:
                    yield topic.short, (one.key() or b"").decode(errors="replace"), one.timestamp()[1] / 1000
