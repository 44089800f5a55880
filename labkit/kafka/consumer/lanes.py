"""Lanes: the unit of order. A partition is one lane, or one lane for each of its keys.

The thread that polls appends to a lane. One worker at a time takes from it. A record leaves its queue only once it is
finished, so what may be committed follows from the queues alone: the lowest offset still in one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from labkit.kafka.consumer.failures import FailedRecord
from labkit.kafka.consumer.held_outputs import Held
from labkit.kafka.records import Message

if TYPE_CHECKING:
    from labkit.kafka.consumer.state import PartitionState


class LaneState(Enum):
    IDLE = "idle"
    """Nothing to do."""
    RUNNING = "running"
    """A worker has it, or will take it next."""
    BACKING_OFF = "backing off"
    """Its first record failed, or is not due yet; it waits for the next attempt."""
    SETTING_ASIDE = "setting aside"
    """Its first record is on its way to a topic where it is kept; the lane waits until that is confirmed."""


_ALLOWED = {
    (LaneState.IDLE, LaneState.RUNNING),
    (LaneState.RUNNING, LaneState.IDLE),
    (LaneState.RUNNING, LaneState.BACKING_OFF),
    (LaneState.BACKING_OFF, LaneState.RUNNING),
    (LaneState.RUNNING, LaneState.SETTING_ASIDE),
    (LaneState.SETTING_ASIDE, LaneState.RUNNING),
    (LaneState.SETTING_ASIDE, LaneState.BACKING_OFF),
}


class Lane:
    """Records that must be handled one after the other."""

    __slots__ = ("began", "due", "failed", "key", "one_by_one", "partition", "queue", "state")

    def __init__(self, partition: Partition, key: bytes | None) -> None:
        self.partition = partition
        self.key = key
        self.queue: deque[Message] = deque()
        self.state = LaneState.IDLE
        self.failed: FailedRecord | None = None  # its first record, while that keeps failing
        self.began: float | None = None  # consumer's clock at which the running handler was called
        self.due = 0.0  # monotonic time at which it goes on
        self.one_by_one = 0  # how many records come one by one, because a batch of them failed

    def to(self, state: LaneState) -> None:
        """Change state. A change that is not allowed is a bug, and raises."""
        if (self.state, state) not in _ALLOWED:
            raise AssertionError(f"a lane cannot go from {self.state.value} to {state.value}")
        self.state = state

    def busy(self) -> bool:
        """Whether its first record may be finished at any moment: a release waits for it."""
        failed = self.failed  # another thread may clear it
        return bool(failed and failed.in_flight) or self.began is not None


class Partition:
    """One assigned partition: its lanes, and how far it has got."""

    def __init__(self, topic: str, number: int, start: int) -> None:
        self.topic, self.number = topic, number
        self.next_offset = start  # after the last one fetched
        self.committed = start  # as far as we know
        self.commit_requested = start  # with the last commit
        self.lanes: dict[bytes | None, Lane] = {}
        self.held: list[Held] = []  # exactly once: what goes out with the commit, in the order of finishing
        self.lock = threading.Lock()  # guards lanes, their states and `held` against the workers
        self.active = True  # False once revoked or lost: no further record is started
        self.given_up = False  # True once its work is discarded
        self.paused = False
        self.seeking = False  # the client has to seek to next_offset; what it fetches before that is dropped
        self.at_end = False  # as far as we know, there is nothing more to fetch
        self.state: PartitionState | None = None  # what its handler keeps; co-partitioned topics share it

    def add(self, messages: list[Message], by_key: bool) -> list[Lane]:
        """Queue fetched messages, in the order of their offsets; returns the lanes that now want a worker."""
        messages = self.unseen(messages)
        woken: list[Lane] = []
        if messages:
            self.at_end = False
            with self.lock:
                if by_key:
                    for message in messages:
                        self._queue(message.key(), (message,), woken)
                else:
                    self._queue(None, messages, woken)
            self.next_offset = messages[-1].offset() + 1
        return woken

    def unseen(self, messages: list[Message]) -> list[Message]:
        """These without records that were fetched twice (by a seek or a rebalance): they are queued or done already."""
        if messages[0].offset() >= self.next_offset:
            return messages
        return [message for message in messages if message.offset() >= self.next_offset]

    def _queue(self, key: bytes | None, messages: Sequence[Message], woken: list[Lane]) -> None:
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(self, key)
        lane.queue.extend(messages)
        if lane.state is LaneState.IDLE:
            lane.to(LaneState.RUNNING)
            woken.append(lane)

    def reached(self, end: int) -> None:
        """Note the partition's end, so that a commit passes commit markers and compacted records."""
        self.next_offset = max(self.next_offset, end)
        self.at_end = True

    def finish(self, message: Message) -> None:
        """A handler with state is done with this record, and with all before it."""
        self.next_offset = max(self.next_offset, message.offset() + 1)
        if lane := self.lanes.get(None):  # it has waited there until it was due
            lane.queue.popleft()

    def rest(self, lane: Lane) -> bool:
        """Let a worker give up a lane that is empty, or whose partition is gone. False when there is more to do."""
        with self.lock:
            if lane.queue and self.active:
                return False
            lane.to(LaneState.IDLE)
            if not lane.queue:  # a revoked one's queue still says how far it got
                self.lanes.pop(lane.key, None)
            return True

    def position(self) -> int:
        """The lowest unfinished offset, or the next to be fetched: all before it is finished and may be committed.

        Only the thread that appends may call this: so a queue that it finds empty stays empty.
        """
        lowest = self.next_offset
        with self.lock:  # a batch leaves its queue as one
            for lane in self.lanes.values():
                try:
                    lowest = min(lowest, lane.queue[0].offset())
                except IndexError:
                    continue
        return lowest

    def held_below(self, position: int) -> list[Held]:
        """What is held for records below a position. A position never divides a batch."""
        with self.lock:
            return [held for held in self.held if held.messages[-1].offset() < position]

    def drop_held(self, position: int) -> None:
        """It is committed."""
        with self.lock:
            self.held = [held for held in self.held if held.messages[-1].offset() >= position]

    def replace_held(self, old: Held, new: Held) -> None:
        """Hold something else for the same record."""
        with self.lock:
            self.held = [new if held is old else held for held in self.held]

    def ahead(self) -> int:
        """How many offsets beyond the lowest unfinished one were fetched."""
        return self.next_offset - self.position() if self.lanes else 0
