"""Blocked lanes: seen from anywhere, skipped at once in any back-off, by place, with a trace, never twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from consuming import Member, alter, committed, fresh_group, fresh_topic, put
from processes import wait_until

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import BlockedLanes, Skip, lanes_topic
from labkit.patterns.dead_letters import dead_letters_topic
from labkit.patterns.retries import Policy, RetryingConsumer, blocking


class Stubborn:
    """Fails on chosen values, always; counts its calls."""

    def __init__(self, *values: int) -> None:
        self.values, self.calls = values, Counter[int]()
        self.done: list[int] = []
        self.called = 0.0  # when it was called last

    def __call__(self, record: Record[int]) -> None:
        self.calls[record.value] += 1
        self.called = time.monotonic()
        if record.value in self.values:
            raise ConnectionError(f"no answer for {record.value}")
        self.done.append(record.value)


@contextmanager
def looking(topic: Topic[Any], group: str) -> Iterator[BlockedLanes]:
    with BlockedLanes(topic, group) as lanes:
        yield lanes


def consumer_of(topic: Topic[Any], handler: Any, group: str, retry: Policy | None = None, **more: Any) -> Any:
    made = RetryingConsumer(topic, handler, group, retry=retry or blocking(60, 60), **more)
    made.prepare()
    return made


def blocked_at(lanes: BlockedLanes, *places: str) -> None:
    wait_until(lambda: set(lanes) == set(places), 15, f"blocked at {places}, not {list(lanes)}")


def test_a_blocked_lane_is_seen_and_a_skip_takes_effect_in_its_back_off(cluster: Cluster) -> None:
    """correctness 15: in a back-off of a minute; it names who, when and which record; the next failure blocks again."""
    topic, group = fresh_topic(cluster), fresh_group()
    handler = Stubborn(1, 3, 5, 7)
    with Member(consumer_of(topic, handler, group)) as member, looking(topic, group) as lanes:
        begun = time.time()
        put(topic, *range(9), key="ada")
        blocked_at(lanes, f"{topic.name}/0/1")
        (one,) = lanes.values()
        assert (one.topic, one.partition, one.offset, one.key, one.value) == (topic.name, 0, 1, "ada", "1")
        assert (one.attempts, one.error) == (1, "ConnectionError: no answer for 1")
        assert begun < one.since < time.time()
        assert one.next_attempt - one.since >= 59.9

        for offset in (1, 3, 5, 7):
            blocked_at(lanes, f"{topic.name}/0/{offset}")
            assert lanes.skip(f"{topic.name}/0/{offset}").offset == offset
        member.wait_committed({0: 9})
        assert handler.done == [0, 2, 4, 6, 8]
        assert {handler.calls[value] for value in handler.values} == {1}
        trace = lanes.skipped()
        assert [(one.offset, one.key, one.value, one.attempts) for one in trace] == [
            (offset, "ada", str(offset), 1) for offset in (1, 3, 5, 7)
        ]
        assert all("@" in one.by and begun < one.at < time.time() for one in trace)
        wait_until(lambda: len(lanes.store) == 0, 10, "the end of commands that have done their work")


@pytest.mark.long
def test_a_skip_takes_effect_within_200_ms(cluster: Cluster) -> None:
    """correctness 15: the best of four, whatever else the machine does."""
    topic, group = fresh_topic(cluster), fresh_group()
    handler, took = Stubborn(1, 3, 5, 7), []
    with Member(consumer_of(topic, handler, group)), looking(topic, group) as lanes:
        put(topic, *range(9))
        for offset in (1, 3, 5, 7):
            blocked_at(lanes, f"{topic.name}/0/{offset}")
            began = time.monotonic()
            lanes.skip(f"{topic.name}/0/{offset}")
            wait_until(lambda: handler.called > began, 15, "the next record's turn")  # noqa: B023
            took.append(handler.called - began)
    assert min(took) < 0.2, took


def test_a_skip_of_what_is_not_blocked_is_refused(cluster: Cluster) -> None:
    """correctness 15: nothing blocked; an old offset; a later one."""
    topic, group = fresh_topic(cluster), fresh_group()
    with Member(consumer_of(topic, Stubborn(1), group)), looking(topic, group) as lanes:
        with pytest.raises(LabkitError, match="it is blocked by nothing"):
            lanes.skip(f"{topic.name}/0/1")
        with pytest.raises(LabkitError, match="skips nothing"):
            lanes.resume()
        put(topic, *range(3))
        blocked_at(lanes, f"{topic.name}/0/1")
        assert repr(lanes) == f"BlockedLanes({topic.short} of {group}, 1)"
        for offset in (0, 2):
            with pytest.raises(LabkitError, match=f"is not blocked by .*/0/{offset}: in that partition .*/0/1"):
                lanes.skip(f"{topic.name}/0/{offset}")
        assert lanes.skipped() == []
    assert repr(lanes).endswith(", closed)")


def test_a_forged_skip_of_another_offset_does_nothing(cluster: Cluster) -> None:
    """correctness 15: one that goes around the checks, too; nonsense in the topic harms nobody."""
    topic, group = fresh_topic(cluster), fresh_group()
    with Member(consumer_of(topic, Stubborn(1), group)) as member, looking(topic, group) as lanes:
        put(topic, *range(3))
        blocked_at(lanes, f"{topic.name}/0/1")
        sender, control = Producer(cluster), lanes_topic(topic, group)
        for place in (f"{topic.name}/0/0", f"{topic.name}/0/2", f"{topic.name}/1/1", "x", "", f"{topic.name}/0/ü"):
            sender.send(control.name, encode(Skip("me", 0.0)), f"skip {place}")
        sender.send(control.name, b"nonsense", f"skip {topic.name}/0/1")
        sender.send(control.name, encode(Skip("me", 0.0)), "all")
        sender.flush()
        wait_until(lambda: f"skip {topic.name}/0/0" not in lanes.store, 10, "an old command to be taken back")
        put(topic, 3)
        assert set(lanes) == {f"{topic.name}/0/1"}
        assert lanes.skip(f"{topic.name}/0/1").offset == 1  # a real one still works
        member.journal.wait(lambda: lanes.skipped())
        # The forged one for offset 2 met a record that did not fail.
        member.wait_committed({0: 4})
        assert [one.offset for one in lanes.skipped()] == [1]


def test_skip_all_until_resume(cluster: Cluster) -> None:
    """Every failing record is skipped, each with its trace; then failures block again."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    handler = Stubborn(1, 2, 4, 11)
    with Member(consumer_of(topic, handler, group)) as member, looking(topic, group) as lanes:
        put(topic, *range(4), partition=0)
        put(topic, 11, partition=1)
        blocked_at(lanes, f"{topic.name}/0/1", f"{topic.name}/1/0")
        assert lanes.skip_all() == 2
        member.wait_committed({0: 4, 1: 1})
        assert lanes.skipping
        assert set(lanes) == set()
        lanes.resume()
        assert not lanes.skipping
        old = f"skip {topic.name}/0/0"  # the consumer takes it back once it has heard all that was said before
        lanes.store.put(old, Skip("me", 0.0))
        wait_until(lambda: old not in lanes.store, 20, "the consumer to hear of it")
        put(topic, 4, partition=0)
        blocked_at(lanes, f"{topic.name}/0/4")
        assert lanes.skip_all() == 1
        member.wait_committed({0: 5, 1: 1})
        lanes.resume()
        assert sorted(int(one.value or -1) for one in lanes.skipped()) == [1, 2, 4, 11]
    assert handler.done == [0, 3]


def test_by_key_only_the_blocked_key_is_skipped(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    handler = Stubborn(1, 2)
    consumer = consumer_of(topic, handler, group, order="key")
    with Member(consumer) as member, looking(topic, group) as lanes:
        for value, key in ((1, "a"), (2, "b"), (3, "a"), (4, "b")):
            put(topic, value, key=key)
        blocked_at(lanes, f"{topic.name}/0/0", f"{topic.name}/0/1")
        lanes.skip(f"{topic.name}/0/1")
        member.journal.wait(lambda: handler.done == [4])
        assert list(lanes) == [f"{topic.name}/0/0"]


def test_a_skip_before_a_restart_does_not_fire_again(cluster: Cluster) -> None:
    """correctness 15: not though its command had stayed in the topic, as after a crash between commit and tombstone."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(3))
    with Member(consumer_of(topic, Stubborn(1), group)) as member, looking(topic, group) as lanes:
        blocked_at(lanes, f"{topic.name}/0/1")
        lanes.skip(f"{topic.name}/0/1")
        member.wait_committed({0: 3})
    with looking(topic, group) as lanes:
        lanes.store.put(f"skip {topic.name}/0/1", Skip("a crashed pod left it", 0.0))
        handler = Stubborn(3)
        with Member(consumer_of(topic, handler, group)):
            put(topic, 3)
            blocked_at(lanes, f"{topic.name}/0/3")
            wait_until(lambda: f"skip {topic.name}/0/1" not in lanes.store, 10, "the old command to be taken back")
        assert len(lanes.skipped()) == 1
        assert handler.calls == {3: 1}


def test_a_skip_survives_a_crash_before_the_commit(cluster: Cluster) -> None:
    """The command stays until its record is committed: a record that is delivered again is skipped again."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(3))
    consumer_of(topic, print, group)
    with looking(topic, group) as lanes:
        lanes.store.put(f"skip {topic.name}/0/1", Skip("ada", 0.0))
        handler = Stubborn(1, 2)
        with Member(consumer_of(topic, handler, group)) as member:
            blocked_at(lanes, f"{topic.name}/0/2")
            member.wait_committed({0: 2})
            wait_until(lambda: f"skip {topic.name}/0/1" not in lanes.store, 10, "its tombstone")
        assert [one.by for one in lanes.skipped()] == ["ada"]


def test_what_a_dead_owner_left_is_taken_back(cluster: Cluster) -> None:
    """A pod that was killed while blocked: the next one handles the record, and the board must not show the old one."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0, 1)
    with Member(consumer_of(topic, Stubborn(1), group)), looking(topic, group) as lanes:
        blocked_at(lanes, f"{topic.name}/0/1")
        left = lanes[f"{topic.name}/0/1"]
    with looking(topic, group) as lanes:
        assert len(lanes) == 0  # one that leaves in good order takes it back itself
        lanes.store.put(f"blocked {left.place}", left)
        handler = Stubborn()
        with Member(consumer_of(topic, handler, group)):
            wait_until(lambda: handler.done == [1], 15)
            blocked_at(lanes)
    assert committed(topic, group) == {0: 2}


def test_a_lane_that_cannot_set_aside_is_blocked_and_can_be_skipped(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 17: a dead letter that the broker refuses (too large) blocks its lane alone, and says why."""
    topic, group = fresh_topic(cluster, value=str), fresh_group()
    put(topic, "stuck", "fine")

    def handle(record: Record[str]) -> None:
        if record.value != "fine":
            raise ConnectionError("no")

    consumer = consumer_of(topic, handle, group, blocking(0.05))
    alter(dead_letters_topic(topic, group), {"max.message.bytes": "10"})
    with Member(consumer) as member, looking(topic, group) as lanes:
        refused = lambda: any(one.error.startswith("DeliveryFailed") for one in lanes.values())  # noqa: E731
        wait_until(refused, 20, "why it is blocked now")
        lanes.skip(f"{topic.name}/0/0")
        member.wait_committed({0: 2})
        assert len(member.journal.of(Step.FAILED)) == 2
