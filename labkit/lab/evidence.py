"""What a verdict is given: what was sent, and what took effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from labkit.kafka.effects import Effect, Sent
from labkit.kafka.errors import LabkitError
from labkit.kafka.reader import Reader
from labkit.kafka.records import CAUSE, MADE_BY
from labkit.kafka.topics import Topic, short_name
from labkit.lab.load import Load
from labkit.lab.sampler import undecodable

Content = Iterable[Effect] | Mapping[Any, Any]
"""Effects, or the value that each id has."""
Ids = Iterable[str] | Callable[[], Iterable[str]]


def listed(
    sent: Load[Any] | Iterable[Load[Any]] | Iterable[Sent] | Mapping[Any, Any],
) -> Sequence[Load[Any] | Sent] | Mapping[Any, Any]:
    """What was sent, as it was given. Raises LabkitError for what is no answer to that."""
    if isinstance(sent, Load | Mapping):
        return sent if isinstance(sent, Mapping) else [sent]
    given = list(sent)
    kind = Load if given and isinstance(given[0], Load) else Sent
    if strange := [one for one in given if not isinstance(one, kind)]:
        raise LabkitError(
            f"what was sent is a load, loads, Sent tuples, or a mapping from an id to its value, not {strange[0]!r}"
        )
    return given


def sends(
    given: Sequence[Load[Any] | Sent] | Mapping[Any, Any], run: Sequence[Load[Any]]
) -> tuple[Iterable[Sent] | Mapping[Any, Any], set[str]]:
    """What was sent, and the ids that only other loads of the `run` sent."""
    if isinstance(given, Mapping):
        return given, set()
    if loads := [one for one in given if isinstance(one, Load)]:
        return ledger(loads, run)
    return [one for one in given if isinstance(one, Sent)], set()


def took_effect(
    done: Topic[Any] | Content | Callable[[], Content], identify: Callable[[Any], str]
) -> tuple[Content, str | None]:
    """What took effect, and what of it could not be read. Raises LabkitError for anything else."""
    if isinstance(done, Topic):
        return effects(done, identify)
    content = done() if callable(done) else done
    if isinstance(content, Mapping):
        return content, None
    found = list(content)
    if strange := [one for one in found if not isinstance(one, Effect)]:
        raise LabkitError(
            "what took effect is a topic, Effects, a mapping from an id to its value, or a function that returns "
            f"Effects or a mapping, not {strange[0]!r}"
        )
    return found, None


def ids(given: Ids | None) -> Iterable[str] | None:
    """The ids given, or returned by the function given."""
    return given() if callable(given) else given


def is_copy(given: object) -> bool:
    """Whether what it holds was read before, and does not change with its source any more."""
    return isinstance(given, dict | list | tuple | set | frozenset)


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
