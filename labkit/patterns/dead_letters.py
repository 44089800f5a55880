"""The dead-letter queue: records whose attempts are used up, with where they came from and why they failed.

The queue is one compacted topic for each topic and group, keyed by the place a record came from. So a record is in it
once. A tombstone takes the record out, when its replay has succeeded or when it is purged. Readers have the whole queue
in memory.

A dead letter is the record as it was, value and headers byte for byte. What labkit knows about it, and its own key, are
in further headers.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Self

import msgspec

from labkit.kafka.errors import DeliveryFailed, LabkitError
from labkit.kafka.producer import RawHeaders, deliver
from labkit.kafka.records import Message, Placed, WholeRecord, encode, headers_of
from labkit.kafka.topics import Topic
from labkit.patterns.group_entries import GroupEntries
from labkit.patterns.own_topics import own_topic
from labkit.patterns.retry_history import HEADER, RetryHistory, history_of, text_of, with_header

LETTER, KEY = "labkit-dead-letter", "labkit-key"  # headers of a dead letter, beside its retry history
DEAD_LETTERS, REPLAY = "dead-letters", "replay"  # how the names of the two topics end
CONFIRM = 30.0  # seconds for a replay or a purge to be confirmed


class _Details(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the header LETTER holds, as JSON."""

    at: float
    null: bool = False
    """The record is a tombstone. In the queue its value is empty, as null would take it out."""
    replayed: float | None = None


class DeadLetter(Placed, WholeRecord, msgspec.Struct, frozen=True, omit_defaults=True):
    """A record that could not be handled. Times are seconds since 1970."""

    topic: str
    partition: int
    offset: int
    timestamp: float
    group: str
    key: str | None
    value: str | None
    headers: dict[str, str]
    """The record's headers as text, those among them that labkit adds for tracing."""
    attempts: int
    failed: tuple[float, ...]
    """When the newest of these attempts failed."""
    error: str
    """What the last attempt raised."""
    at: float
    """When the record came into the queue."""
    raw_key: bytes | None = None
    """The key, if it is not UTF-8, so that `key` only shows it."""
    raw_value: bytes | None = None
    raw_headers: tuple[tuple[str, bytes | None], ...] | None = None
    """The headers, if `headers` cannot hold them: a name comes twice, or a value is null or not UTF-8."""
    replayed: float | None = None
    """When the record was last put back; it stays in the queue until it is handled."""

    @classmethod
    def of(cls, message: Message) -> Self:
        own, history = dict(headers_of(message)), history_of(message)
        details = msgspec.json.decode(own.get(LETTER) or b"", type=_Details)
        if history is None or history.place.encode() != message.key():
            raise ValueError(f"its header {HEADER} does not say where it came from")
        value = None if details.null else message.value()
        return cls._made(history, details, own.get(KEY), value, headers_of(message))

    @classmethod
    def _made(
        cls, history: RetryHistory, details: _Details, key: bytes | None, value: bytes | None, headers: RawHeaders
    ) -> Self:
        raw = tuple(one for one in headers if one[0] not in (HEADER, LETTER, KEY))
        text = {name: text_of(one) or "" for name, one in raw}
        as_text = tuple((name, one.encode()) for name, one in text.items())
        origin = (history.topic, history.partition, history.offset, history.timestamp, history.group)
        failure = (history.attempts, history.failed, history.error, details.at)
        unlike_text = (_unless_text(key), _unless_text(value), None if raw == as_text else raw)
        return cls(*origin, text_of(key), text_of(value), text, *failure, *unlike_text, details.replayed)

    def original(self, replayed: bool = False) -> tuple[bytes | None, bytes | None, RawHeaders]:
        """The record as it was, with its retry history: value, key, headers."""
        origin = (self.topic, self.partition, self.offset, self.timestamp, self.group)
        history = RetryHistory(*origin, attempts=self.attempts, failed=self.failed, error=self.error, replayed=replayed)
        headers = self.raw_headers or [(name, one.encode()) for name, one in self.headers.items()]
        return (
            self.raw_value if self.raw_value is not None else None if self.value is None else self.value.encode(),
            self.raw_key if self.raw_key is not None else None if self.key is None else self.key.encode(),
            with_header(headers, HEADER, encode(history)),
        )

    def kept(self) -> tuple[bytes, str, RawHeaders]:
        """The record as it is in the queue: value, key, headers."""
        value, key, headers = self.original()
        if key is not None:
            headers = with_header(headers, KEY, key)
        details = _Details(self.at, value is None, self.replayed)
        return value or b"", self.place, with_header(headers, LETTER, encode(details))


def dead_letter_of(message: Message, history: RetryHistory, at: float) -> DeadLetter:
    """The dead letter of a record that could not be handled."""
    return DeadLetter._made(history, _Details(at), message.key(), message.value(), headers_of(message))


def _unless_text(raw: bytes | None) -> bytes | None:
    return None if raw is None or raw.decode(errors="replace").encode() == raw else raw


def dead_letters_topic(topic: Topic[Any], group: str) -> Topic[DeadLetter]:
    """Where the dead letters of this topic and group are kept."""
    return Topic(topic.cluster, own_topic(topic.name, group, DEAD_LETTERS), 1, DeadLetter)


def replay_topic(topic: Topic[Any], group: str) -> Topic[Any]:
    """Where they come back. Not into `topic` itself, which other groups read too."""
    return replace(topic, name=own_topic(topic.name, group, REPLAY))


class DeadLetters(GroupEntries[DeadLetter]):
    """The dead letters of a topic and group, by the place they came from, oldest first.

    Raises TopicMissing when no consumer with retries ever ran there.
    """

    def __init__(self, topic: Topic[Any], group: str) -> None:
        super().__init__(topic, group, dead_letters_topic(topic, group))

    def _now(self) -> dict[str, DeadLetter]:
        return {one.place: one for one in sorted(self.store.snapshot().values(), key=lambda one: one.at)}

    def __len__(self) -> int:
        return len(self.store)  # a board asks often, and there may be many

    def replay(self, *places: str) -> int:
        """Put these dead letters back where their retries start, all if none is named; returns how many.

        Each comes back in the partition number it came from: another client may have put its key there, and a handler's
        state is kept by that number.

        Each stays in the queue until it is handled. You may repeat an interrupted replay: no record is lost, some may
        be handled twice. A record that is replayed again before it is handled is handled twice, exactly once included:
        `replayed` says when it was put back. Raises LabkitError for a place that is not here, DeliveryFailed.
        """
        letters, cluster = self._chosen(places), self.topic.cluster
        now, back = time.time(), replay_topic(self.topic, self.group)
        # This comes first: the consumer may be done with a replayed record at once.
        noted = (msgspec.structs.replace(letter, replayed=now).kept() for letter in letters)
        deliver(cluster, self.store.topic.name, noted, CONFIRM, copies=True)
        try:
            partitions = cluster.topics().get(back.name, 0)  # fewer, if some were added to the topic later
            numbers = (one.partition if one.partition < partitions else -1 for one in letters)
            originals = (one.original(replayed=True) for one in letters)
            records = ((*one, number) for one, number in zip(originals, numbers, strict=True))
            deliver(cluster, back.name, records, CONFIRM, copies=True)
        except DeliveryFailed as error:
            raise DeliveryFailed(
                f"not all dead letters were put back ({error}): all are still here, replay again"
            ) from error
        return len(letters)

    def purge(self, *places: str) -> int:
        """Remove these for good, all if no place is named; returns how many. Raises LabkitError, DeliveryFailed."""
        letters = self._chosen(places)
        for letter in letters:
            self.store.delete(letter.place, CONFIRM)
        return len(letters)

    def _chosen(self, places: tuple[str, ...]) -> list[DeadLetter]:
        now = self._now()
        if missing := [place for place in places if place not in now]:
            raise LabkitError(f"{missing[0]} is not among the {len(now):,} dead letters of {self.group}")
        return [now[place] for place in places or now]
