"""What a store has in memory: the newest value of each key of its topic, whichever partition it comes from."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from labkit.kafka.errors import PoisonRecord
from labkit.kafka.records import Message, parser, poison, whole

V = TypeVar("V")
Changes: TypeAlias = dict[str, tuple[V | None, V | None]]
"""Old and new value by key; None is no value."""

SPARE = 10_000  # deleted keys that are remembered however few entries there are

log = logging.getLogger(__name__)


class Unreadable(NamedTuple):
    """A key whose newest record does not decode."""

    error: PoisonRecord
    before: Any
    """The last value that could be read, if there was one."""


class Newest(NamedTuple):
    """The newest record of a key in one partition. Compared by its first two fields, no two of which are the same."""

    timestamp: int
    partition: int
    value: Any
    error: PoisonRecord | None


class Contents(Generic[V]):
    """The newest value of each key in the records of a topic.

    Within a partition the later record is the newer one. When a key comes from a second partition, contents become
    `unsure` and take in no further record: only contents that are `timed` from the first record on can compare.
    """

    def __init__(self, value: type[V], timed: bool = False) -> None:
        self.entries: dict[str, V] = {}
        self.unreadable: dict[str, Unreadable] = {}
        self.unsure = False
        # In which partition each key lies, deleted keys too: an older record from elsewhere would bring them back. A
        # dict takes time and memory: while no key has come twice, a list has the partitions, in the order of entries.
        self._partitions: dict[str, int] | None = {} if timed else None
        self._in_order = array("i")
        self.scattered: dict[str, dict[int, Newest]] = {}  # by partition
        self._timestamps: dict[str, int] | None = {} if timed else None  # of keys that are not scattered
        self._parse, self._whole = parser(value), whole(value)
        self._kept = 0  # keys that could not be forgotten the last time

    def follow(self, messages: Iterable[Message], collect: bool) -> Changes[V]:
        """`apply`, while somebody reads: no entry is replaced by one that may be older."""
        self._by_key()
        changes = self.apply(messages, collect)
        self._forget_deleted()
        return changes

    def apply(self, messages: Iterable[Message], collect: bool = False) -> Changes[V]:
        """Take records in. Returns the changes, if `collect`."""
        entries, unreadable, parse, of_whole = self.entries, self.unreadable, self._parse, self._whole
        partitions, timed = self._partitions, self._timestamps is not None
        in_order, size = self._in_order.append, len(entries)
        changes: Changes[V] = {}
        for message in messages:
            raw_key, raw, partition = message.key(), message.value(), message.partition()
            if raw_key is None:
                continue
            error = None
            try:
                key = raw_key.decode()
                value = None if raw is None else parse(raw) if of_whole is None else of_whole(message)
            except Exception as failure:  # of a value type, whose own checks may raise anything
                key, value, error = raw_key.decode(errors="replace"), None, poison(message, failure)
                if key.encode() != raw_key:  # other keys may look the same, and be hidden by it
                    partitions = self._by_key()
                    self._mark_unreadable(key, error)
                    continue
            if partitions is None and value is not None:
                entries[key] = value
                if len(entries) > size:  # it is a new key
                    size += 1
                    in_order(partition)
                    continue
            if timed:
                if (newest := self._compare(key, Newest(message.timestamp()[1], partition, value, error))) is None:
                    continue
                value, error = newest.value, newest.error
            else:
                if partitions is None:
                    partitions = self._by_key()
                if partitions.setdefault(key, partition) != partition:
                    self.unsure = True
                    break
            if error is not None:
                self._mark_unreadable(key, error)
                continue
            if collect:
                before, _ = changes.get(key) or (entries.get(key), None)
                if before is None and key in unreadable:
                    before = unreadable[key].before
                changes[key] = (before, value)
            if value is None:
                entries.pop(key, None)
            else:
                entries[key] = value
            if unreadable:
                unreadable.pop(key, None)
        return changes

    def _compare(self, key: str, record: Newest) -> Newest | None:
        """The newest record of a key, now that this one has come; None if it was the newest before."""
        assert self._timestamps is not None  # noqa: S101
        partitions, found = self._by_key(), self.scattered.get(key)
        if found is None:
            if (first := partitions.setdefault(key, record.partition)) == record.partition:
                self._timestamps[key] = record.timestamp
                return record
            unreadable = self.unreadable.get(key)
            error = None if unreadable is None else unreadable.error
            there = Newest(self._timestamps.pop(key), first, self.entries.get(key), error)
            found = self.scattered[key] = {first: there}
        before = max(found.values())
        found[record.partition] = record
        newest = max(found.values())
        partitions[key] = newest.partition
        return None if newest is before else newest

    def partitions_of(self, key: str) -> tuple[int, ...]:
        """The partitions in which a key lies, first the one with its newest record; none if it was never there."""
        first = self._by_key().get(key)
        others = self.scattered.get(key, ())
        return () if first is None else (first, *(one for one in others if one != first))

    def _by_key(self) -> dict[str, int]:
        if self._partitions is None:
            self._partitions = dict(zip(self.entries, self._in_order, strict=True))
            self._in_order = array("i")
        return self._partitions

    def _forget_deleted(self) -> None:
        """Remember no more deleted keys than there are entries, and some more."""
        partitions = self._partitions
        if partitions is None or len(partitions) <= max(2 * len(self.entries), 2 * self._kept) + SPARE:
            return
        gone = [key for key, found in self.scattered.items() if all(one[2:] == (None, None) for one in found.values())]
        for key in gone:
            del self.scattered[key]
        kept = self.entries.keys() | self.unreadable.keys() | self.scattered.keys()
        self._partitions = {key: partitions[key] for key in kept}
        if self._timestamps is not None:
            self._timestamps = {key: at for key, at in self._timestamps.items() if key in kept}
        self._kept = len(kept)

    def _mark_unreadable(self, key: str, error: PoisonRecord) -> None:
        log.error("store: key %r cannot be read until it is written again: %s", key, error)
        known = self.unreadable.get(key)
        before = self.entries.get(key) if known is None else known.before
        self.unreadable[key] = Unreadable(error, before)  # first: a reader must not find neither value nor error
        self.entries.pop(key, None)


def differences(before: Mapping[str, V], after: Mapping[str, V]) -> Changes[V]:
    """The changes that turn the entries `before` into the entries `after`."""
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
