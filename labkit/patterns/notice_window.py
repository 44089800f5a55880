"""The newest notices of a topic, in memory and within bounds, and the positions up to which pages have seen theirs.

No Kafka and no threads: `notifications` has those.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

POSITION = re.compile(r"([\w+/-]{1,40})\.(\d{1,6})\.((?:\d{1,6}:\d{1,18},){0,9999}\d{1,6}:\d{1,18})", re.ASCII)


@dataclass(frozen=True)
class Bounds:
    """How much is kept in memory."""

    window: int = 100_000
    """Notices of the window, and of each partition what is read at the start."""
    window_bytes: int = 64_000_000
    waiting: int = 10_000
    """Notices that wait for one subscriber. One more, and it is dropped."""
    waiting_bytes: int = 1_000_000
    largest: int = 16_384
    """Bytes of one notice. A larger one is passed over."""
    subscribers: int = 8
    """Of one channel. With one more the oldest is dropped: often its connection is dead, and nobody knows yet."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A notice of the window, as JSON. The garbage collector passes it over: there are 100,000."""

    partition: int
    offset: int
    id: str
    notice: bytes


class Position(NamedTuple):
    """How far a page has seen its channel: the next offset, by partition. Other partitions have nothing of it."""

    epoch: str
    """Of which topic, and with how many partitions: keys lie elsewhere in another one."""
    nexts: Mapping[int, int]

    def __str__(self) -> str:
        return f"{self.epoch}.{','.join(f'{partition}:{at}' for partition, at in self.nexts.items())}"

    @classmethod
    def parse(cls, text: str) -> Position | None:
        """None for what is no position."""
        if (found := POSITION.fullmatch(text)) is None:
            return None
        topic, partitions, nexts = found.groups()
        pairs = (one.split(":") for one in nexts.split(","))
        return cls(f"{topic}.{partitions}", {int(partition): int(at) for partition, at in pairs})


class Window:
    """The newest notices of a topic, found by channel. The oldest leave first, whatever their channel.

    Of partition p it has every notice from `starts[p]` to `ends[p]`. Not for use by several threads at once.
    """

    def __init__(self, topic_id: str, starts: Mapping[int, int], bounds: Bounds) -> None:
        self.epoch = f"{topic_id}.{len(starts)}"
        self.starts, self.ends = dict(starts), dict(starts)
        self.size = 0
        """Bytes of its notices."""
        self._bounds = bounds
        self._order: deque[str] = deque()  # the channel of each notice, oldest first
        self._channels: dict[str, deque[Entry]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def add(self, channel: str, entry: Entry) -> None:
        """The newest one."""
        if (entries := self._channels.get(channel)) is None:
            entries = self._channels[channel] = deque()
        entries.append(entry)
        self._order.append(channel)
        self.size += len(entry.notice)
        while len(self._order) > self._bounds.window or self.size > self._bounds.window_bytes:
            self._forget()

    def _forget(self) -> None:
        channel = self._order.popleft()
        entries = self._channels[channel]
        oldest = entries.popleft()
        if not entries:
            del self._channels[channel]
        self.size -= len(oldest.notice)
        self.starts[oldest.partition] = oldest.offset + 1

    def since(self, channel: str, position: Position) -> list[Entry] | None:
        """What a page at this position has missed of its channel; None if that cannot be told."""
        if position.epoch != self.epoch:
            return None
        if any(at < self.starts.get(partition, at + 1) for partition, at in position.nexts.items()):
            return None
        entries = self._channels.get(channel, ())
        if any(entry.partition not in position.nexts for entry in entries):
            return None  # another client's partitioner puts this channel elsewhere
        return [entry for entry in entries if entry.offset >= position.nexts[entry.partition]]

    def position(self, seen: Mapping[int, int] | None = None) -> Position:
        """Where a page is that has seen all of this, and what it says it has seen."""
        return Position(self.epoch, {at: max(end, (seen or {}).get(at, 0)) for at, end in self.ends.items()})
