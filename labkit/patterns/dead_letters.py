"""The dead-letter queue: records whose attempts are used up, with where they came from and why they failed.

One compacted topic for each topic and group, keyed by the place where a record came from: a record is in it once, and
leaves it by a tombstone, when its replay succeeded or when it is purged. It is read into memory as a whole.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import msgspec

from labkit.kafka.errors import DeliveryFailed, LabkitError, place_of
from labkit.kafka.producer import deliver
from labkit.kafka.records import Message, encode, headers_of
from labkit.kafka.topics import Topic
from labkit.patterns.group_entries import GroupEntries
from labkit.patterns.trails import HEADER, Trail, own_topic, text_of

DEAD_LETTERS, REPLAY = "dead-letters", "replay"  # what the two topics are called
CONFIRM = 30.0  # seconds for a replay or a purge to be confirmed


class DeadLetter(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record that could not be handled. Times are seconds since 1970."""

    topic: str
    partition: int
    offset: int
    timestamp: float
    group: str
    key: str | None
    value: str | None
    headers: dict[str, str]
    """As text; those that labkit adds for tracing are among them."""
    attempts: int
    failed: tuple[float, ...]
    """When its attempts failed: the newest."""
    error: str
    """The last one."""
    at: float
    """When it came here."""
    raw_key: bytes | None = None
    """If the key is no UTF-8, and so in `key` only for show."""
    raw_value: bytes | None = None
    replayed: float | None = None
    """When it was last put back; it is here until that succeeds."""

    @property
    def place(self) -> str:
        """`topic/partition/offset` where it came from first: its name in the queue."""
        return place_of(self.topic, self.partition, self.offset)


def dead_letter_of(message: Message, trail: Trail, at: float) -> DeadLetter:
    """A record as it is kept in the queue."""
    key, value = message.key(), message.value()
    headers = {name: text_of(raw) or "" for name, raw in headers_of(message).items() if name != HEADER}
    return DeadLetter(
        *(trail.topic, trail.partition, trail.offset, trail.timestamp, trail.group, text_of(key), text_of(value)),
        *(headers, trail.attempts, trail.failed, trail.error, at, _unless_text(key), _unless_text(value)),
    )


def _unless_text(raw: bytes | None) -> bytes | None:
    return None if raw is None or raw.decode(errors="replace").encode() == raw else raw


def dead_letters_topic(topic: Topic[Any], group: str) -> Topic[DeadLetter]:
    """Where the dead letters of this topic and group are kept."""
    return Topic(topic.cluster, own_topic(topic.name, group, DEAD_LETTERS), 1, DeadLetter)


def replay_topic(topic: Topic[Any], group: str) -> Topic[Any]:
    """Where they come back. Not into `topic` itself, which others read too."""
    return replace(topic, name=own_topic(topic.name, group, REPLAY))


class DeadLetters(GroupEntries[DeadLetter]):
    """The dead letters of a topic and group, by the place where they came from, oldest first.

    Raises TopicMissing when no consumer with retries ever ran there.
    """

    def __init__(self, topic: Topic[Any], group: str) -> None:
        super().__init__(topic, group, dead_letters_topic(topic, group))

    def _now(self) -> dict[str, DeadLetter]:
        return {one.place: one for one in sorted(self.store.snapshot().values(), key=lambda one: one.at)}

    def __len__(self) -> int:
        return len(self.store)  # a board asks often, and there may be many

    def replay(self, *places: str) -> int:
        """Put these back where their retries start, all if none is named; returns how many.

        Each stays in the queue until it is handled. An interrupted replay may be repeated: none is lost, some may be
        handled twice. Raises LabkitError for one that is not here, DeliveryFailed.
        """
        letters = self._chosen(places)
        now, back = time.time(), replay_topic(self.topic, self.group)
        # Marked first: the consumer may be done with a record before the mark would come.
        marked = {letter.place: msgspec.structs.replace(letter, replayed=now) for letter in letters}
        self.store.update(marked, CONFIRM)
        try:
            deliver(self.topic.cluster, back.name, map(_replayed, letters), CONFIRM)
        except DeliveryFailed as error:
            raise DeliveryFailed(
                f"not all dead letters were put back ({error}): all are still here, replay again"
            ) from error
        return len(letters)

    def purge(self, *places: str) -> int:
        """Remove these for good, all if none is named; returns how many. Raises LabkitError, DeliveryFailed."""
        letters = self._chosen(places)
        for letter in letters:
            self.store.delete(letter.place, CONFIRM)
        return len(letters)

    def _chosen(self, places: tuple[str, ...]) -> list[DeadLetter]:
        now = self._now()
        if missing := [place for place in places if place not in now]:
            raise LabkitError(f"{missing[0]} is not among the {len(now):,} dead letters of {self.group}")
        return [now[place] for place in places or now]


def _replayed(one: DeadLetter) -> tuple[bytes | None, str | bytes | None, dict[str, str]]:
    """The record as it was: value, key, headers."""
    origin = (one.topic, one.partition, one.offset, one.timestamp, one.group)
    trail = Trail(*origin, attempts=one.attempts, failed=one.failed, error=one.error, replayed=True)
    key = one.key if one.raw_key is None else one.raw_key
    value = one.raw_value if one.raw_value is not None else None if one.value is None else one.value.encode()
    return value, key, {**one.headers, HEADER: encode(trail).decode()}
