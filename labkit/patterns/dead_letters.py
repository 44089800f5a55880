"""The dead-letter queue: records whose attempts are used up, with where they came from and why they failed.

One compacted topic for each topic and group, keyed by the place where a record came from: a record is in it once, and
leaves it by a tombstone, when its replay succeeded or when it is purged. It is read into memory as a whole.

A dead letter is the record as it was, value and headers byte for byte; what is told about it, and its own key, are in
headers that come to its own.
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
from labkit.patterns.trails import HEADER, Trail, own_topic, text_of, trail_of, with_header

LETTER, KEY = "labkit-dead-letter", "labkit-key"  # headers of a dead letter, beside its trail
DEAD_LETTERS, REPLAY = "dead-letters", "replay"  # what the two topics are called
CONFIRM = 30.0  # seconds for a replay or a purge to be confirmed


class _Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the header LETTER tells, as JSON."""

    at: float
    null: bool = False
    """The record is a tombstone. In the queue its value is empty: null would take it out."""
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
    raw_headers: tuple[tuple[str, bytes | None], ...] | None = None
    """If a name comes twice, a value is null or no UTF-8, and `headers` so not all there is."""
    replayed: float | None = None
    """When it was last put back; it is here until that succeeds."""

    @classmethod
    def of(cls, message: Message) -> Self:
        own, trail = dict(headers_of(message)), trail_of(message)
        told = msgspec.json.decode(own.get(LETTER) or b"", type=_Told)
        if trail is None or trail.place.encode() != message.key():
            raise ValueError(f"the header {HEADER} does not tell where it came from")
        value = None if told.null else message.value()
        return cls._made(trail, told, own.get(KEY), value, headers_of(message))

    @classmethod
    def _made(
        cls, trail: Trail, told: _Told, key: bytes | None, value: bytes | None, headers: RawHeaders | None
    ) -> Self:
        raw = tuple(one for one in headers or () if one[0] not in (HEADER, LETTER, KEY))
        text = {name: text_of(one) or "" for name, one in raw}
        as_text = tuple((name, one.encode()) for name, one in text.items())
        return cls(
            *(trail.topic, trail.partition, trail.offset, trail.timestamp, trail.group, text_of(key), text_of(value)),
            *(text, trail.attempts, trail.failed, trail.error, told.at, _unless_text(key), _unless_text(value)),
            *(None if raw == as_text else raw, told.replayed),
        )

    def original(self, replayed: bool = False) -> tuple[bytes | None, bytes | None, RawHeaders]:
        """The record as it was, with its trail: value, key, headers."""
        origin = (self.topic, self.partition, self.offset, self.timestamp, self.group)
        trail = Trail(*origin, attempts=self.attempts, failed=self.failed, error=self.error, replayed=replayed)
        headers = self.raw_headers or [(name, one.encode()) for name, one in self.headers.items()]
        return (
            self.raw_value if self.raw_value is not None else None if self.value is None else self.value.encode(),
            self.raw_key if self.raw_key is not None else None if self.key is None else self.key.encode(),
            with_header(headers, HEADER, encode(trail)),
        )

    def kept(self) -> tuple[bytes, str, RawHeaders]:
        """The record as it is in the queue: value, key, headers."""
        value, key, headers = self.original()
        if key is not None:
            headers = with_header(headers, KEY, key)
        told = _Told(self.at, value is None, self.replayed)
        return value or b"", self.place, with_header(headers, LETTER, encode(told))


def dead_letter_of(message: Message, trail: Trail, at: float) -> DeadLetter:
    """A record that could not be handled."""
    return DeadLetter._made(trail, _Told(at), message.key(), message.value(), headers_of(message))


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

        They come back in the partition of the number they came from: another client may have put their key there, and a
        handler's state is kept by that number.

        Each stays in the queue until it is handled. An interrupted replay may be repeated: none is lost, some may be
        handled twice. So is each that is replayed again before it is handled, exactly once, too: `replayed` says when
        it was put back. Raises LabkitError for one that is not here, DeliveryFailed.
        """
        letters, cluster = self._chosen(places), self.topic.cluster
        now, back = time.time(), replay_topic(self.topic, self.group)
        # Marked first: the consumer may be done with a record before the mark would come.
        marked = (msgspec.structs.replace(letter, replayed=now).kept() for letter in letters)
        deliver(cluster, self.store.topic.name, marked, CONFIRM, copies=True)
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
