"""What an audit is given: what loads sent, and what took effect in a topic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labkit.kafka.reader import Reader
from labkit.kafka.records import CAUSE, MADE_BY
from labkit.kafka.topics import Topic, short_name
from labkit.lab.audit import Effect, Sent
from labkit.lab.load import Load
from labkit.lab.sampler import undecodable


def ledger(loads: Sequence[Load[Any]], run: Sequence[Load[Any]]) -> tuple[list[Sent], set[str]]:
    """All sends of the ids that `loads` sent, by earlier loads of the `run` too; and the ids only others sent.

    A load's cell that runs again sends the same ids again: that they take effect again is no wonder.
    """
    asked = {one.id for load in loads for one in load.sent}
    topics = {load.topic.name for load in loads}  # a cell that ran again may have made its type anew
    everything = [one for load in run if load.topic.name in topics for one in load.sent]
    sends = [one._replace(order=order) for order, one in enumerate(everything) if one.id in asked]
    return sends, {one.id for one in everything} - asked


def effects(topic: Topic[Any], identify: Callable[[Any], str]) -> tuple[list[Effect], str | None]:
    """What took effect in a topic, and what of it could not be read."""
    with Reader(topic) as reader:
        records = reader.rest()
    found = []
    for record in records:
        if record.value is None:
            continue  # a tombstone takes something back; it is no work done
        headers = record.headers
        cause = headers.get(CAUSE)
        found.append(
            Effect(
                identify(record.value),
                record.key,
                short_name(record.place),
                record.timestamp,
                cause and short_name(cause),
                headers.get(MADE_BY),
                topic.short,
            )
        )
    return found, undecodable(reader)
