"""Handlers that take batches, and consumers that are told where to read on."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
from consuming import Member, committed, fresh_group, fresh_topic, put, trim

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import Decision, FailedRecord, Retry, SetAside, Stop
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError, PoisonRecord, Unavailable
from labkit.kafka.reader import Reader


def test_a_batch_is_of_one_partition_in_order_and_no_longer_than_asked(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in range(2):
        put(topic, *range(300), partition=partition)
    batches: list[list[Any]] = []
    with Member(Consumer(topic, batches.append, group, batch=100)) as member:
        member.wait_committed({0: 300, 1: 300})
    assert all(1 <= len(batch) <= 100 and len({one.partition for one in batch}) == 1 for batch in batches)
    assert len(batches) < 60  # what has been fetched is handed over together
    for partition in range(2):
        seen = [one.value for batch in batches for one in batch if one.partition == partition]
        assert seen == list(range(300))
    assert len(member.journal.of(Step.HANDLED)) == 600


def test_one_record_makes_a_batch_at_once(cluster: Cluster) -> None:
    """correctness 8"""
    topic, group = fresh_topic(cluster), fresh_group()
    batches: list[list[Any]] = []
    with Member(Consumer(topic, batches.append, group, batch=100)) as member:
        member.journal.wait_for(Step.ASSIGNED)
        put(topic, 1)
        member.journal.wait(lambda: batches)


def test_a_record_that_does_not_decode_comes_in_its_place(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0, b"{", 2)
    batches: list[list[Any]] = []
    with Member(Consumer(topic, batches.append, group, batch=10)) as member:
        member.wait_committed({0: 3})
    found = [one for batch in batches for one in batch]
    assert [one.offset for one in found] == [0, 1, 2]
    assert isinstance(found[1], PoisonRecord)


@dataclass
class Checked:
    rate: int

    def __post_init__(self) -> None:
        raise KeyError(self.rate)  # not what msgspec makes of a ValueError


@pytest.mark.parametrize("batch", [None, 10])
def test_a_value_type_whose_own_check_raises_is_poison(cluster: Cluster, batch: int | None) -> None:
    """The consumer ended of it, and again after each restart."""
    topic, group = fresh_topic(cluster, value=Checked), fresh_group()
    put(topic, b'{"rate":7}')
    handled: list[Any] = []
    errors: list[BaseException] = []

    def policy(failed: FailedRecord) -> Decision:
        errors.append(failed.error)
        return Retry(60)

    with Member(Consumer(topic, handled.append, group, batch=batch, on_failure=policy)) as member:
        member.journal.wait(lambda: errors or handled)
    (poison,) = errors or handled[0]
    assert isinstance(poison, PoisonRecord)
    assert "KeyError: 7" in str(poison)


def test_a_batch_that_grows_while_its_first_record_is_tried_again(cluster: Cluster) -> None:
    """Each call of a failing record is one attempt that the policy knows of."""
    topic, group = fresh_topic(cluster), fresh_group()
    calls: list[list[int]] = []

    def handle(batch: list[Any]) -> None:
        calls.append([one.value for one in batch])
        if 0 in calls[-1] and len(calls) < 4:
            put(topic, len(calls))
            raise ValueError("not yet")

    with Member(Consumer(topic, handle, group, batch=10, on_failure=lambda failed: Retry(0.2))) as member:
        put(topic, 0)
        member.wait_committed({0: 4})
    assert [call for call in calls if 0 in call] == [[0]] * 4
    assert len(member.journal.of(Step.FAILED)) == 3


def test_of_a_batch_that_fails_the_policy_gets_the_record_that_does_it(cluster: Cluster) -> None:
    """All others are handled; only that one is asked about, and set aside."""
    topic, aside, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(50))
    handled: list[int] = []
    asked: list[tuple[int, int]] = []

    def handle(batch: list[Any]) -> None:
        if any(one.value == 20 for one in batch):
            raise ValueError("not that one")
        handled.extend(one.value for one in batch)

    def decide(failed: FailedRecord) -> Decision:
        asked.append((failed.offset, failed.attempt))
        return SetAside(aside.name, None, failed.message.value())

    with Member(Consumer(topic, handle, group, batch=30, on_failure=decide)) as member:
        member.wait_committed({0: 50})
    assert handled == [number for number in range(50) if number != 20]
    assert asked == [(20, 1)]  # nobody asks about an innocent one
    assert [failed.offset for failed in member.journal.of(Step.FAILED)] == [20]
    with Reader(aside) as reader:
        assert [record.value for record in reader.read_to_end()] == [20]


def test_after_records_that_are_set_aside_the_next_ones_come_together_again(cluster: Cluster) -> None:
    topic, aside, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(200))
    sizes: list[int] = []

    def handle(batch: list[Any]) -> None:
        sizes.append(len(batch))
        raise ValueError("none of them")

    with Member(
        Consumer(topic, handle, group, batch=20, on_failure=lambda failed: SetAside(aside.name, None, b"0"))
    ) as member:
        member.wait_committed({0: 200})
    assert sizes.count(1) >= 200
    assert len([size for size in sizes if size > 1]) >= 3


def test_a_batch_handler_that_returns_a_coroutine_is_told_and_nothing_committed(cluster: Cluster) -> None:
    """As for a handler of single records: nobody would run it."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(20))

    async def later(batch: list[Any]) -> None: ...

    consumer = Consumer(topic, lambda batch: later(batch), group, batch=10, on_failure=lambda failure: Stop())
    with Member(consumer) as member:
        error = member.ends()
    assert "returned a coroutine" in str(error)
    assert committed(topic, group) == {}


def test_a_batch_that_fails_for_a_while_is_handled_then(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(20))
    tries: list[int] = []
    handled: list[int] = []

    def together() -> int:
        """The first try with several: the very first may be of what was fetched first, alone."""
        return next((number for number, size in enumerate(tries) if size > 1), len(tries))

    def handle(batch: list[Any]) -> None:
        tries.append(len(batch))
        if 0 < len(tries) - together() <= 3:
            raise ValueError("away")
        handled.extend(one.value for one in batch)

    with Member(Consumer(topic, handle, group, batch=20, on_failure=lambda failure: Retry(0.01))) as member:
        member.wait_committed({0: 20})
        put(topic, *range(20, 40))
        member.wait_committed({0: 40})
    assert handled == list(range(40))
    assert tries[together() + 1 :][:3] == [1, 1, 1]
    assert len(member.journal.of(Step.RECOVERED)) == 1
    assert max(tries[len(tries) - 2 :]) > 1  # later ones come together again


def test_a_batch_may_stop_the_consumer(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(20))

    def handle(batch: list[Any]) -> None:
        raise ValueError("over")

    with Member(Consumer(topic, handle, group, batch=20, on_failure=lambda failure: Stop())) as member:
        assert str(member.ends()) == "over"
    assert committed(topic, group) == {}


def test_positions_are_read_from_instead_of_what_the_group_has_committed(cluster: Cluster) -> None:
    """Forwards and backwards; the group's offsets, so its lag, follow at once."""
    topic, group = fresh_topic(cluster, 3), fresh_group()
    for partition in range(3):
        put(topic, *range(10), partition=partition)
    with Member(Consumer(topic, lambda record: None, group)) as member:
        member.wait_committed({0: 10, 1: 10, 2: 10})
    asked: list[Any] = []
    seen: list[tuple[int, int]] = []
    going = threading.Event()

    def positions(partitions: Any) -> dict[tuple[str, int], int]:
        asked.extend(partitions)
        return {(topic.name, 0): 4, (topic.name, 1): 10}

    def handle(record: Any) -> None:
        going.wait(10)
        seen.append((record.partition, record.offset))

    with Member(Consumer(topic, handle, group, positions=positions)) as member:
        member.journal.wait_for(Step.ASSIGNED)
        assert committed(topic, group) == {0: 4, 1: 10, 2: 0}
        going.set()
        member.wait_committed({0: 10, 1: 10, 2: 10})
    assert sorted(asked) == [(topic.name, number) for number in range(3)]
    assert sorted(seen) == [(0, number) for number in range(4, 10)] + [(2, number) for number in range(10)]


def test_positions_that_cannot_be_told_end_the_consumer(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)

    def positions(partitions: Any) -> dict[tuple[str, int], int]:
        raise LabkitError("the view must be built anew")

    with Member(Consumer(topic, lambda record: None, group, positions=positions)) as member:
        assert str(member.ends()) == "the view must be built anew"


def test_who_tells_positions_and_is_away_is_waited_for(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(5))
    asked: list[Any] = []
    seen: list[int] = []

    def positions(partitions: Any) -> dict[tuple[str, int], int]:
        asked.append(partitions)
        if len(asked) < 3:
            raise Unavailable("its database does not answer")
        return {(topic.name, 0): 3}

    handler = lambda record: seen.append(record.offset)  # noqa: E731
    with Member(Consumer(topic, handler, group, positions=positions)) as member:
        member.wait_committed({0: 5})
    assert seen == [3, 4]


def test_who_tells_positions_and_stays_away_ends_the_consumer(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labkit.kafka.consumer.assignment.AWAY", 0.3)

    def positions(partitions: Any) -> dict[tuple[str, int], int]:
        raise Unavailable("its database does not answer")

    with Member(Consumer(fresh_topic(cluster), print, fresh_group(), positions=positions)) as member:
        assert str(member.ends()) == "its database does not answer"


def test_a_position_whose_records_are_gone_ends_the_consumer(cluster: Cluster) -> None:
    """Reading on at what is left would pass over what retention has deleted, and nobody would know."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    trim(topic, 6)
    told = {(topic.name, 0): 5}
    with Member(Consumer(topic, lambda record: None, group, positions=lambda partitions: told)) as member:
        error = member.ends()
    assert isinstance(error, LabkitError)
    assert f"{topic.name}/0 from offset 5 on, but its records before offset 6" in str(error)
    assert not member.journal.of(Step.HANDLING)
    told[topic.name, 0] = 6
    with Member(Consumer(topic, lambda record: None, group, positions=lambda partitions: told)) as member:
        member.wait_committed({0: 10})


def test_what_makes_no_sense_is_refused(cluster: Cluster) -> None:
    with pytest.raises(LabkitError, match="at least 1"):
        Consumer(fresh_topic(cluster), print, batch=0)
