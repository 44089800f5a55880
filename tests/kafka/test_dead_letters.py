"""The dead-letter queue: what is in it, what is put back, what leaves it; an interrupted replay loses none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from consuming import Member, alter, fresh_group, fresh_topic, put
from processes import wait_until

import labkit.patterns.dead_letters as module
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import DeliveryFailed, LabkitError, TopicMissing
from labkit.kafka.lag import end_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import RetryingConsumer, dead_letter, retry_topics


class Provider:
    """Is down until told otherwise."""

    def __init__(self) -> None:
        self.up = False
        self.calls: Counter[int] = Counter()
        self.records: list[Record[int]] = []

    def __call__(self, record: Record[int]) -> None:
        self.calls[record.value] += 1
        if not self.up:
            raise ConnectionError("the provider is down")
        self.records.append(record)


@pytest.fixture
def place(cluster: Cluster) -> tuple[Topic[Any], str]:
    return fresh_topic(cluster, 2), fresh_group()


@pytest.fixture
def provider() -> Provider:
    return Provider()


@pytest.fixture
def member(place: tuple[Topic[Any], str], provider: Provider) -> Iterator[Member]:
    topic, group = place
    consumer = RetryingConsumer(topic, provider, group, retry=retry_topics(0.05))
    consumer.prepare()
    with Member(consumer) as running:
        yield running


@pytest.fixture
def queue(place: tuple[Topic[Any], str], member: Member) -> Iterator[DeadLetters]:
    with DeadLetters(*place) as found:
        yield found


def holds(queue: DeadLetters, count: int) -> None:
    wait_until(lambda: len(queue) == count, 20, f"{count} dead letters, not {len(queue)}")


def test_what_is_replayed_and_succeeds_leaves_the_queue_with_its_identity(
    place: tuple[Topic[Any], str], member: Member, provider: Provider, queue: DeadLetters
) -> None:
    """correctness 18: one, a selection, all; key, value and headers as they were; others do not see it again."""
    topic, _ = place
    sender = Producer(topic.cluster)
    for value in range(5):
        sender.send(topic.name, str(value).encode(), "ada", {"tenant": f"t{value}"})
    sender.flush()
    holds(queue, 5)
    provider.up = True
    places = list(queue)
    assert queue.replay(places[3]) == 1
    holds(queue, 4)
    assert queue.replay(*places[:2]) == 2
    holds(queue, 2)
    assert queue.replay() == 2
    holds(queue, 0)
    assert queue.replay() == 0
    assert Counter(record.value for record in provider.records) == Counter(range(5))
    assert {(record.key, record.headers["tenant"]) for record in provider.records} == {
        ("ada", f"t{value}") for value in range(5)
    }
    assert provider.calls == dict.fromkeys(range(5), 3)
    ends = end_offsets(topic.cluster, [topic.name])
    assert sum(ends.values()) == 5  # nothing was sent to the topic that others read too
    with pytest.raises(LabkitError, match="is not among the 0 dead letters"):
        queue.replay(places[0])


def test_letters_that_leave_while_they_are_looked_at_disturb_nobody(
    place: tuple[Topic[Any], str], member: Member, queue: DeadLetters
) -> None:
    put(place[0], *range(5))
    holds(queue, 5)
    values, items = iter(queue.values()), iter(queue.items())
    first = next(values)
    next(items)
    assert queue.purge() == 5
    assert sorted((first.value or "", *(one.value or "" for one in values))) == [str(value) for value in range(5)]
    assert len(list(items)) == 4


def test_what_fails_again_stays_with_all_its_attempts(
    place: tuple[Topic[Any], str], provider: Provider, queue: DeadLetters
) -> None:
    """correctness 16, 18: through the retry topic again; the first origin is kept."""
    put(place[0], 7, partition=1, key="k")
    holds(queue, 1)
    (origin,) = queue
    first = queue[origin]
    assert (first.attempts, first.replayed) == (2, None)
    queue.replay()
    wait_until(lambda: queue[origin].attempts == 4, 20, "two more attempts")
    again = queue[origin]
    assert again.replayed is None  # it came back: not under way any more
    assert (again.topic, again.partition, again.offset, again.timestamp) == (
        *(first.topic, first.partition, first.offset, first.timestamp),
    )
    assert again.failed[:2] == first.failed
    assert provider.calls[7] == 4
    provider.up = True
    queue.replay(origin)
    holds(queue, 0)


def test_an_interrupted_replay_loses_none(
    place: tuple[Topic[Any], str], provider: Provider, queue: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 18: cut short after each number of records; said again, all are handled."""
    put(place[0], *range(4), key="k")
    holds(queue, 4)
    provider.up = True

    class Dying(Producer):
        left = 4 + 2  # they are marked first

        def send(self, *args: Any, **more: Any) -> None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            super().send(*args, **more)

    dying = Dying(place[0].cluster, reports=True)
    monkeypatch.setattr("labkit.kafka.producer.producer", lambda cluster, reports, copies: dying)
    with pytest.raises(KeyboardInterrupt):
        queue.replay()
    holds(queue, 2)
    assert all(letter.replayed is not None for letter in queue.values())  # it says that somebody tried
    monkeypatch.undo()
    with DeadLetters(*place) as other:  # another process, say
        other.replay()
    holds(queue, 0)
    assert set(provider.calls) == set(range(4))


@pytest.mark.long
def test_a_replay_that_is_refused_is_told_and_loses_none(
    place: tuple[Topic[Any], str], queue: DeadLetters, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place[0], 1)
    holds(queue, 1)
    missing = Topic(place[0].cluster, f"{place[0].name}.missing", 1, int)
    monkeypatch.setattr(module, "replay_topic", lambda topic, group: missing)
    with pytest.raises(DeliveryFailed, match="all are still here"):
        queue.replay()
    assert len(queue) == 1


def test_purge_removes_for_good(place: tuple[Topic[Any], str], queue: DeadLetters) -> None:
    put(place[0], *range(3), key="k")
    holds(queue, 3)
    assert repr(queue) == f"DeadLetters({place[0].short} of {place[1]}, 3)"
    first, *_ = queue
    with pytest.raises(LabkitError, match="is not among"):
        queue.purge(first, "elsewhere/0/0")
    assert queue.purge(first) == 1
    assert queue.purge() == 2
    with DeadLetters(*place) as other:
        assert len(other) == 0
    assert repr(other).endswith(", closed)")


def test_a_replayed_record_whose_consumer_stops_is_handled_by_the_next(cluster: Cluster) -> None:
    """correctness 18: put back while nobody runs; and twice, by two people: handled twice at most, and gone."""
    topic, group, provider = fresh_topic(cluster), fresh_group(), Provider()
    consumer = RetryingConsumer(topic, provider, group, retry=dead_letter())
    put(topic, 1)
    with Member(consumer) as member:
        member.wait_committed({0: 1})
    provider.up = True
    with DeadLetters(topic, group) as queue:
        queue.replay()
        queue.replay()
        assert len(queue) == 1
        with Member(consumer) as again:
            again.journal.wait(lambda: len(queue) == 0 and len(again.journal.of(Step.HANDLED)) == 2)
    assert provider.calls[1] == 3


def test_a_replayed_record_is_not_committed_before_it_has_left_the_queue(cluster: Cluster) -> None:
    """Or a crash in between would leave a letter that is finished: here the queue refuses to let it go."""
    topic, group, provider = fresh_topic(cluster), fresh_group(), Provider()
    consumer = RetryingConsumer(topic, provider, group, retry=dead_letter())
    put(topic, 1)
    with Member(consumer) as member:
        member.wait_committed({0: 1})
    with DeadLetters(topic, group) as queue:
        queue.replay()
        provider.up = True
        alter(queue.store.topic, {"max.message.bytes": "10"})
        with Member(consumer) as refused:
            assert isinstance(refused.ends(20), DeliveryFailed)
        assert len(queue) == 1
        alter(queue.store.topic, {"max.message.bytes": "1000000"})
        with Member(consumer):
            holds(queue, 0)
    assert provider.calls[1] == 3


def test_a_tombstone_and_bytes_that_are_no_text_come_back_as_they_were(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    sender = Producer(cluster)
    sender.send(topic.name, None, "gone")
    sender.send(topic.name, b"\xff\x00{", b"\xfe")
    sender.flush()

    def handle(record: Record[Any]) -> None:
        raise ConnectionError("no")

    consumer = RetryingConsumer(topic, handle, group, retry=dead_letter())
    with Member(consumer) as member:
        member.wait_committed({0: 2})
        with DeadLetters(topic, group) as queue:
            null, raw = queue.values()
            assert (null.key, null.value, null.raw_value) == ("gone", None, None)
            assert (raw.raw_key, raw.raw_value) == (b"\xfe", b"\xff\x00{")
            before = len(member.journal.of(Step.FAILED))
            queue.replay()
            failures = member.journal.wait_for(Step.FAILED, before + 2)[before:]
    assert {(failure.message.key(), failure.message.value()) for failure in failures} == {
        *((b"gone", None), (b"\xfe", b"\xff\x00{"))
    }


def test_a_queue_of_nobody_is_told(cluster: Cluster) -> None:
    with pytest.raises(TopicMissing):
        DeadLetters(fresh_topic(cluster), "nobody")
