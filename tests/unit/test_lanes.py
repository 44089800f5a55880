"""Lanes and partitions: positions, states, what a revoke leaves."""

from __future__ import annotations

import random
from typing import cast

import pytest

from labkit.kafka.consumer.failures import FailedRecord
from labkit.kafka.consumer.lanes import Lane, LaneState, Partition
from labkit.kafka.records import Message


class Fetched:
    """As much of a client's message as a lane looks at."""

    def __init__(self, offset: int, key: bytes | None = None) -> None:
        self._offset, self._key = offset, key

    def topic(self) -> str:
        return "t"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset

    def key(self) -> bytes | None:
        return self._key


def fetched(*offsets: int, key: bytes | None = None) -> list[Message]:
    return [cast(Message, Fetched(offset, key)) for offset in offsets]


def finish(lane: Lane) -> None:
    """What a worker does with a lane's first record."""
    lane.queue.popleft()
    if not lane.queue:
        assert lane.partition.rest(lane)


def test_the_position_is_the_lowest_unfinished_offset() -> None:
    """correctness 1: whatever is finished first, only the contiguous prefix counts."""
    chance = random.Random(7)
    for _ in range(50):
        partition = Partition("t", 0, 100)
        offsets = sorted(chance.sample(range(100, 200), 30))  # gaps, as compaction and commit markers leave them
        unfinished = set(offsets)
        for offset in offsets:
            partition.add(fetched(offset, key=chance.choice([b"a", b"b", b"c", None])), by_key=True)
        while unfinished:
            assert partition.position() == min(unfinished)
            lane = chance.choice([lane for lane in partition.lanes.values() if lane.queue])
            unfinished.remove(lane.queue[0].offset())
            finish(lane)
        assert partition.position() == partition.next_offset == offsets[-1] + 1


def test_a_partition_is_one_lane_or_one_for_each_key() -> None:
    records = [*fetched(0, key=b"a"), *fetched(1, key=b"b"), *fetched(2, key=b"a"), *fetched(3)]
    whole, by_key = Partition("t", 0, 0), Partition("t", 0, 0)
    assert len(whole.add(records, by_key=False)) == 1
    assert len(by_key.add(records, by_key=True)) == 3
    assert [message.offset() for message in by_key.lanes[b"a"].queue] == [0, 2]


def test_a_record_fetched_twice_is_queued_once() -> None:
    partition = Partition("t", 0, 5)
    partition.add(fetched(3, 4, 5, 6), by_key=False)
    partition.add(fetched(5, 6, 7), by_key=False)
    assert [message.offset() for message in partition.lanes[None].queue] == [5, 6, 7]


def test_a_running_lane_is_not_woken_again() -> None:
    partition = Partition("t", 0, 0)
    assert len(partition.add(fetched(0), by_key=False)) == 1
    assert partition.add(fetched(1), by_key=False) == []


def test_a_worker_may_leave_only_an_empty_lane() -> None:
    partition = Partition("t", 0, 0)
    (lane,) = partition.add(fetched(0), by_key=False)
    assert not partition.rest(lane)
    lane.queue.popleft()
    assert partition.rest(lane)
    assert partition.lanes == {}
    assert partition.position() == 1


def test_what_a_revoked_partition_has_queued_still_counts_as_unfinished() -> None:
    """correctness 1, 5: a worker that gives up a revoked lane must not make its records look finished."""
    partition = Partition("t", 0, 0)
    (lane,) = partition.add(fetched(0, 1, 2), by_key=False)
    lane.queue.popleft()
    partition.active = False
    assert partition.rest(lane)
    assert partition.position() == 1


def test_the_end_moves_the_position_over_markers_but_not_over_unfinished_records() -> None:
    """correctness 7: the end of a partition lies past commit markers."""
    partition = Partition("t", 0, 0)
    (lane,) = partition.add(fetched(0), by_key=False)
    partition.reached(3)
    assert partition.position() == 0
    assert partition.ahead() == 3
    finish(lane)
    assert partition.position() == 3
    assert partition.ahead() == 0
    partition.reached(2)
    assert partition.position() == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (LaneState.IDLE, LaneState.IDLE),
        (LaneState.IDLE, LaneState.BACKING_OFF),
        (LaneState.RUNNING, LaneState.RUNNING),
        (LaneState.BACKING_OFF, LaneState.IDLE),
    ],
)
def test_a_change_of_state_that_makes_no_sense_raises(before: LaneState, after: LaneState) -> None:
    lane = Lane(Partition("t", 0, 0), None)
    lane.state = before
    with pytest.raises(AssertionError, match="cannot go from"):
        lane.to(after)


def test_attempts_are_counted() -> None:
    (message,) = fetched(4, key=b"k")
    woken: list[FailedRecord] = []
    failed = FailedRecord(message, woken.append)
    failed.fail(None, ValueError("first"))
    failed.fail(None, ValueError("second"))
    assert (failed.place, failed.key, failed.attempt, str(failed.error)) == ("t/0/4", "k", 2, "second")
    assert 0 < failed.since <= failed.times[0] <= failed.times[1]
    failed.put_command("skip it")
    assert (failed.command, woken) == ("skip it", [failed])
