"""Every error labkit raises on purpose. Each message names the thing and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def place_of(topic: str, partition: int, offset: int) -> str:
    """`topic/partition/offset`, the name under which errors, logs and verdicts know a record."""
    return f"{topic}/{partition}/{offset}"


def error_text(error: BaseException, most: int = 500) -> str:
    """An error's type and text, at most `most` characters, which can be encoded as UTF-8 whatever the error quotes.

    If asking for the text raises, a note stands in its place.
    """
    return f"{type(error).__name__}: {safe_text(error, most)}"[:most]


def safe_text(value: object, most: int = 500, of: Callable[[Any], str] = str) -> str:
    """The `str`, or with `of=repr` the `repr`, of any value, with the guarantees of `error_text`."""
    try:
        text = of(value)
    except Exception as broken:
        text = f"(its text cannot be read: {type(broken).__name__})"
    return text[:most].encode(errors="replace").decode()


def told_in(error: BaseException) -> Iterator[BaseException]:
    """An error, the errors that it was raised `from`, and those of an exception group.

    Not its `__context__`, which is whatever happened to be handled at that moment.
    """
    found, left = set[int](), [error]
    while left:
        one = left.pop()
        if id(one) in found:  # a chain may be circular
            continue
        found.add(id(one))
        yield one
        if one.__cause__ is not None:
            left.append(one.__cause__)
        if isinstance(one, BaseExceptionGroup):
            left.extend(one.exceptions)


class LabkitError(Exception):
    """Base of all: catch this to tell a mistake in the set-up from a bug."""


class Unavailable(LabkitError):
    """A service does not answer at the moment: asking again may help."""


class ClusterUnreachable(LabkitError):
    """No broker answered in time."""


class ClientRefused(ClusterUnreachable):
    """A broker, or the client itself, does not accept the security settings: trying again would not help."""


class NotAllowed(LabkitError):
    """The cluster's access control lists do not let this login do what it asked for."""


class TopicMissing(LabkitError):
    """A topic that should be read or written does not exist (any more)."""


class RecordsDeleted(LabkitError):
    """Kafka deleted records of a topic before they were read: what is made of them has to begin anew."""


class TopicMismatch(LabkitError):
    """A topic exists, but not as it was asked for (partitions, compaction)."""


class DeliveryFailed(LabkitError):
    """The broker did not confirm records that were sent; what depends on them must not be committed."""


class PoisonRecord(LabkitError):
    """A record whose key or value does not decode. Carries its place, so that a policy can set it aside."""

    def __init__(self, topic: str, partition: int, offset: int, reason: str) -> None:
        super().__init__(f"{place_of(topic, partition, offset)} does not decode: {reason}")
        self.topic, self.partition, self.offset, self.reason = topic, partition, offset, reason

    def __reduce__(self) -> tuple[type[PoisonRecord], tuple[str, int, int, str]]:
        return PoisonRecord, (self.topic, self.partition, self.offset, self.reason)


class HandlerExit(LabkitError):
    """A handler called `sys.exit` or was interrupted: its record is not committed and the pod ends."""
