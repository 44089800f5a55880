"""What a verdict is given: what was sent, and what took effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from labkit.kafka.effects import Effect, Sent
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.kafka.reader import Reader
from labkit.kafka.records import CAUSE, MADE_BY
from labkit.kafka.topics import Topic, short_name
from labkit.lab.load import Load

READ = 30.0  # seconds for a topic to be read to its end

Content = Iterable[Effect] | Mapping[Any, Any]
"""Effects, or the value of each id."""


def sends(
    given: Sequence[Load[Any] | Sent] | Mapping[Any, Any], run: Sequence[Load[Any]]
) -> tuple[Iterable[Sent] | Mapping[Any, Any], set[str]]:
    """All sends of the ids that were sent, by earlier loads of the `run` too; and the ids only other loads sent.

    A load's cell that runs again sends the same ids again, so they may take effect again.
    """
    if isinstance(given, Mapping):
        return given, set()
    loads, told = [one for one in given if isinstance(one, Load)], [one for one in given if isinstance(one, Sent)]
    if len(given) not in (len(loads), len(told)):
        strange = [repr(one) for one in given if not isinstance(one, Load | Sent)] or ["both"]
        raise LabkitError(
            f"what was sent is loads, Sent tuples, or a mapping from an id to its value, not {strange[0]}"
        )
    if told:
        return told, set()
    asked = {one.id for load in loads for one in load.sent}
    topics = {load.topic.name for load in loads}  # a cell that ran again may have defined its type anew
    everything = [one for load in run if load.topic.name in topics for one in load.sent]
    sent = [one._replace(order=order) for order, one in enumerate(everything) if one.id in asked]
    return sent, {one.id for one in everything} - asked


def took_effect(done: Topic[Any] | Content, identify: Callable[[Any], str]) -> tuple[Content, str | None]:
    """What took effect, and, in words, what could not be read."""
    if isinstance(done, Topic):
        return effects(done, identify)
    if isinstance(done, Mapping):
        return done, None
    found = list(done)
    if strange := [one for one in found if not isinstance(one, Effect)]:
        what = "a topic, Effects, or a mapping from an id to its value"
        raise LabkitError(f"what took effect is {what}, or a function that returns it, not {strange[0]!r}")
    return found, None


def effects(topic: Topic[Any], identify: Callable[[Any], str]) -> tuple[list[Effect], str | None]:
    """What took effect in a topic, and, in words, what could not be read."""
    with Reader(topic) as reader:
        try:
            records = reader.read_to_end(READ)
        except ClusterUnreachable as error:
            return [], str(error)
    found = []
    for record in records:
        if record.value is None:
            continue  # a tombstone is no work that was done
        cause, place = record.headers.get(CAUSE), short_name(record.place)
        cause, name = cause and short_name(cause), identify(record.value)
        found.append(Effect(name, record.key, place, record.timestamp, cause, record.headers.get(MADE_BY)))
    return found, reader.undecodable
