"""Records that fail: retried in their lane, through retry topics, or set aside; never early, never lost."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import NewPartitions
from consuming import Member, Untellable, committed, fresh_group, fresh_topic, put, put_with_header
from processes import wait_until

import labkit.kafka.consumer.commits as commits
import labkit.kafka.consumer.loop as loop
import labkit.kafka.consumer.workers as workers
import labkit.patterns.retries as module
from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import PoisonRecord
from labkit.kafka.lag import lag
from labkit.kafka.producer import Producer, producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import lanes_topic, skips_topic
from labkit.patterns.dead_letters import DeadLetter, DeadLetters, dead_letters_topic
from labkit.patterns.retries import Policy, RetryingConsumer, blocking, dead_letter, exponential, retry_topics
from labkit.patterns.retry_history import HEADER, parse


class Handler:
    """Fails on chosen values, so often as told; notes every call with its time."""

    def __init__(self, fails: dict[Any, int], error: type[Exception] = ConnectionError) -> None:
        self.fails, self.error = fails, error
        self.calls: defaultdict[Any, list[float]] = defaultdict(list)
        self.records: list[Record[Any]] = []
        self.done: list[Any] = []

    def __call__(self, record: Record[Any]) -> None:
        value = record.value
        self.calls[value].append(time.time())
        self.records.append(record)
        if len(self.calls[value]) <= self.fails.get(value, 0):
            raise self.error(f"no answer for {value}")
        self.done.append(value)


ALWAYS = 10**9


def letters(topic: Topic[Any], group: str) -> list[DeadLetter]:
    """What is in the queue now."""
    with DeadLetters(topic, group) as found:
        return list(found.values())


def at_rest(consumer: RetryingConsumer) -> bool:
    """Whether nothing waits in any topic that it reads."""
    return not sum(lag(consumer.cluster, consumer.group, [topic.name for topic in consumer.sources]).values())


def run_to_rest(consumer: RetryingConsumer, timeout: float = 30.0) -> Member:
    """Let it run until nothing is left."""
    with Member(consumer) as member:
        member.journal.wait(lambda: at_rest(consumer), timeout, "no lag, retry topics included")
    return member


def soon_due(monkeypatch: pytest.MonkeyPatch, seconds: float) -> float:
    """What was set aside for a minute is due in so many seconds; when that is. However long a test was held up before,
    nobody handled it meanwhile."""
    due = time.time() + seconds

    def moved(header: Any) -> Any:
        history = parse(header)
        late = history is not None and history.due is not None and history.due > due + 10
        return msgspec.structs.replace(history, due=due) if late else history

    monkeypatch.setattr(module, "parse", moved)
    return due


# -- Blocking


def test_the_fourth_call_succeeds_and_none_is_early(cluster: Cluster) -> None:
    """correctness 11, 13: delays [0.2, 0.2, 0.2], three failures; key, value and headers are intact; order is kept."""
    topic, group = fresh_topic(cluster), fresh_group()
    sender = Producer(cluster)
    sender.send(topic.name, b"0", "k", {"tenant": "t1"})
    sender.flush()
    put(topic, 1, 2, key="k")
    handler = Handler({0: 3})
    run_to_rest(RetryingConsumer(topic, handler, group, retry=blocking(0.2, 0.2, 0.2)))
    assert handler.done == sorted(handler.done)
    assert [len(handler.calls[value]) for value in (0, 1, 2)] == [4, 1, 1]
    gaps = [b - a for a, b in zip(handler.calls[0], handler.calls[0][1:], strict=False)]
    assert all(gap >= 0.2 for gap in gaps)
    first = next(record for record in handler.records if "tenant" in record.headers)
    assert (first.key, first.headers["tenant"]) == ("k", "t1")
    assert letters(topic, group) == []


def test_a_handler_that_meets_poison_elsewhere_is_retried(cluster: Cluster) -> None:
    """Its own record is sound: what it looked up in a store is not, until somebody writes that anew."""
    topic, group, calls = fresh_topic(cluster), fresh_group(), []
    put(topic, 1)

    def look_up(record: Record[int]) -> None:
        calls.append(record.value)
        if len(calls) < 3:
            raise PoisonRecord("elsewhere", 0, 7, "no JSON")

    run_to_rest(RetryingConsumer(topic, look_up, group, retry=blocking(0.05, 0.05)))
    assert calls == [1, 1, 1]
    assert letters(topic, group) == []


def test_an_error_that_quotes_half_a_character_is_set_aside_too(cluster: Cluster) -> None:
    """No JSON can be made of it as it is."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1, 2)

    def refuse(record: Record[int]) -> None:
        if record.value == 1:
            raise ValueError("cannot read \ud83d")

    run_to_rest(RetryingConsumer(topic, refuse, group, retry=blocking(0.05).then(retry_topics(0.05))))
    (letter,) = letters(topic, group)
    assert letter.error == "ValueError: cannot read ?"


def test_an_error_without_a_text_is_set_aside_too(cluster: Cluster) -> None:
    """correctness 36"""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1, 2)
    handler = Handler({1: ALWAYS}, error=Untellable)
    run_to_rest(RetryingConsumer(topic, handler, group, retry=blocking(0.05).then(retry_topics(0.05))))
    (letter,) = letters(topic, group)
    assert (letter.attempts, letter.error) == (3, "Untellable: (its text cannot be read: RuntimeError)")
    assert handler.done == [2]


def test_a_header_whose_name_is_no_text_harms_nobody(cluster: Cluster) -> None:
    """correctness 16: the client hands it out as a null pointer, by which the process died, again and again."""
    topic, group = fresh_topic(cluster), fresh_group()
    many = range(1, 100)  # Python calls in another way what it calls often
    put(topic, *many)
    put_with_header(topic, b"\xff\xfe")
    put(topic, 100)
    handler = Handler({0: ALWAYS})

    def handle(record: Record[Any]) -> None:
        assert bool(record.headers) == (record.topic != topic.name or record.value != 0)
        handler(record)

    run_to_rest(RetryingConsumer(topic, handle, group, retry=blocking(0.01).then(retry_topics(0.01))))
    (letter,) = letters(topic, group)
    assert (letter.offset, letter.attempts, len(handler.calls[0])) == (99, 3, 3)
    assert handler.done == [*many, 100]


@pytest.mark.long  # test_retry_policies.py compares the names
def test_names_that_differ_by_where_a_dot_is_do_not_collide(cluster: Cluster) -> None:
    """correctness 12: Kafka takes "." and "_" for the same, and would not make the second consumer's topics."""
    topic = fresh_topic(cluster)
    other = replace(topic, name=f"{topic.name}.eu")
    other.create()
    group = fresh_group().replace(".", "-")
    for source, name in ((topic, f"eu.{group}"), (other, group)):
        put(source, 1, 2)
        handler = Handler({1: 1, 2: ALWAYS})
        run_to_rest(RetryingConsumer(source, handler, name, retry=retry_topics(0.01)))
        assert handler.done == [1]
        assert [letter.value for letter in letters(source, name)] == ["2"]


def test_what_is_in_its_own_topics_is_read_from_the_beginning(cluster: Cluster) -> None:
    """`start="latest"` is about the topics it was given: what is in the others is its own work."""
    topic, group = fresh_topic(cluster), fresh_group()
    handler = Handler({})
    consumer = RetryingConsumer(topic, handler, group, start="latest", retry=retry_topics(0.05))
    consumer.prepare()
    put(topic, 1)
    put(consumer.own_topics(topic)[1], 2)
    with Member(consumer):
        wait_until(lambda: handler.done, 20, "what is in the retry topic")
    assert handler.done == [2]


def test_exponential_makes_exactly_its_calls_then_the_queue(cluster: Cluster) -> None:
    """correctness 13, 16: times=3 means 1 + 3 calls; the letter names the source and every attempt."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 7, key="k")
    handler = Handler({7: ALWAYS})
    policy = blocking(exponential(0.05, cap=0.1, times=3)).then(dead_letter())
    run_to_rest(RetryingConsumer(topic, handler, group, retry=policy))
    (letter,) = letters(topic, group)
    calls = handler.calls[7]
    assert len(calls) == 4
    assert letter.place == f"{topic.name}/0/0"
    assert (letter.group, letter.key, letter.value, letter.attempts) == (group, "k", "7", 4)
    assert letter.error == "ConnectionError: no answer for 7"
    assert all(called <= failed for called, failed in zip(calls, letter.failed, strict=True))


def test_for_ever_keeps_order_and_blocks_only_its_partition(cluster: Cluster) -> None:
    """correctness 7, 13: p0 fails twelve times while p1's records go on; then p0 goes on in order."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put(topic, *range(3), partition=0)
    put(topic, *range(10, 30), partition=1)
    handler = Handler({})

    def handle(record: Record[int]) -> None:
        others = [value for value in handler.done if value >= 10]
        handler.fails[1] = 12 if len(others) == 20 else 1_000_000  # not before the others are done
        handler(record)

    run_to_rest(RetryingConsumer(topic, handle, group, retry=blocking(exponential(0.02, cap=0.1))))
    assert len(handler.calls[1]) >= 13
    assert [value for value in handler.done if value < 10] == [0, 1, 2]


def refuse(record: Record[int]) -> None:
    raise ConnectionError("no")


@pytest.mark.long
def test_order_by_key(cluster: Cluster) -> None:
    """correctness 13, 14"""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1, key="a")
    put(topic, 2, key="b")
    member = run_to_rest(
        RetryingConsumer(topic, refuse, group, order="key", retry=blocking(0.1).then(retry_topics(0.1)))
    )
    assert len(member.journal.of(Step.FAILED)) == 6  # two records: two blocking calls, one of the retry topic
    assert [letter.attempts for letter in letters(topic, group)] == [3, 3]


@pytest.mark.long  # test_consumer_group.py has a rebalance in a back-off
def test_blocking_longer_than_the_poll_interval_evicts_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 2"""
    real = loop.Client
    monkeypatch.setattr(loop, "Client", lambda config: real({**config, "max.poll.interval.ms": 6000}))
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)
    handler = Handler({1: 1})
    member = run_to_rest(RetryingConsumer(topic, handler, group, retry=blocking(6.5)))
    assert len(handler.calls[1]) == 2
    assert len(member.journal.of(Step.ASSIGNED)) == 1
    assert not member.journal.of(Step.LOST)


@pytest.mark.long  # test_consumer_group.py stops one too
def test_a_shutdown_in_a_long_back_off_is_quick_and_loses_nothing(cluster: Cluster) -> None:
    """correctness 5: returns at once; the record is delivered again, its attempts counted anew."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0, 1)
    handler = Handler({1: 1})
    consumer = RetryingConsumer(topic, handler, group, retry=blocking(60), drain=60)
    with Member(consumer) as member:
        member.journal.wait_for(Step.FAILED)
        member.stop(30)  # neither the back-off nor the drain is waited for
    assert committed(topic, group) == {0: 1}
    run_to_rest(consumer)
    assert handler.done == [0, 1]
    assert letters(topic, group) == []


@pytest.mark.long  # test_consumer_group.py has one too
def test_a_rebalance_during_a_long_back_off_moves_the_blocked_partition(cluster: Cluster) -> None:
    """correctness 5: the next owner blocks on the same record; nothing is committed past it, and nothing set aside."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in (0, 1):
        put(topic, partition, partition=partition)
    handler = Handler({0: ALWAYS, 1: ALWAYS})
    consumer = RetryingConsumer(topic, handler, group, retry=blocking(30, 30))
    with Member(consumer) as first:
        first.journal.wait_for(Step.FAILED, 2)
        with Member(consumer) as second:
            second.journal.wait_for(Step.FAILED)
            assert sum(map(len, handler.calls.values())) == 3
            mine, others = first.journal.assigned(), second.journal.assigned()
            assert [sum(name == topic.name for name, _ in held) for held in (mine, others)] == [1, 1]
            assert {number for _, number in mine} != {number for _, number in others}  # its own topics go along
    assert committed(topic, group) == {}
    assert letters(topic, group) == []


# -- Retry topics


def test_retry_topics_hold_nobody_up_and_are_never_early(cluster: Cluster) -> None:
    """correctness 11: due = failure + delay, through both topics; what came later is handled at once."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put(topic, *range(40), key="k")
    handler = Handler(dict.fromkeys(range(0, 40, 4), 2))
    run_to_rest(RetryingConsumer(topic, handler, group, retry=retry_topics(0.5, 0.6)))
    assert sorted(handler.done) == list(range(40))
    for value in range(0, 40, 4):
        first, second, third = handler.calls[value]
        assert second - first >= 0.5
        assert third - second >= 0.6
    overtaken = [value for value in range(0, 40, 4) if handler.done.index(value + 1) < handler.done.index(value)]
    assert len(overtaken) > 5  # a halted machine may hold one or two up
    assert letters(topic, group) == []


def test_blocking_then_topics_then_queue_with_exact_counts(cluster: Cluster) -> None:
    """correctness 10, 16: 1 + 1 calls in the source, one in each retry topic; the queue names the main topic."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put(topic, 3, partition=1, key="k")
    handler = Handler({3: ALWAYS})
    policy = blocking(0.1).then(retry_topics(0.1, 0.2)).then(dead_letter())
    run_to_rest(RetryingConsumer(topic, handler, group, retry=policy))
    assert len(handler.calls[3]) == 4
    (letter,) = letters(topic, group)
    assert (letter.place, letter.attempts, len(letter.failed)) == (f"{topic.name}/1/0", 4, 4)
    assert list(letter.failed) == sorted(letter.failed)
    assert handler.calls[3][0] > letter.timestamp
    last = handler.records[-1]
    history = parse(last.headers[HEADER])
    assert history is not None
    assert (history.place, history.group, history.attempts, history.error) == (letter.place, group, 3, letter.error)
    assert history.due == history.failed[-1] + 0.2


@pytest.mark.long
def test_a_history_is_bounded_however_often_and_loudly_a_record_fails(cluster: Cluster) -> None:
    """correctness 16: or its header would be too long to be believed, and its origin be lost."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)

    def shout(record: Record[int]) -> None:
        raise ConnectionError("no " * 10_000)

    policy = blocking(exponential(0.001, cap=0.001, times=60)).then(retry_topics(0.05, 0))
    run_to_rest(RetryingConsumer(topic, shout, group, retry=policy))
    (letter,) = letters(topic, group)
    assert (letter.place, letter.attempts, len(letter.failed), len(letter.error)) == (f"{topic.name}/0/0", 63, 50, 500)


@pytest.mark.long
def test_what_becomes_non_retriable_in_a_retry_topic_is_called_no_more(cluster: Cluster) -> None:
    """correctness 14"""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)
    calls = []

    def refuse(record: Record[int]) -> None:
        calls.append(record.topic)
        raise ValueError("never") if len(calls) > 1 else ConnectionError("not now")

    run_to_rest(RetryingConsumer(topic, refuse, group, retry=retry_topics(0.05, 0.05, non_retriable=(ValueError,))))
    assert len(calls) == 2
    assert [one.error for one in letters(topic, group)] == ["ValueError: never"]


def test_topics_come_with_the_consumer_and_keep_for_long_enough(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster, 3), fresh_group()
    consumer = RetryingConsumer(topic, print, group, retry=retry_topics(10, 1_000_000))
    consumer.prepare()
    consumer.prepare()
    there = cluster.topics()
    assert [there[own.name] for own in consumer.sources] == [3, 3, 3, 3]
    _, _, short, long = consumer.sources
    assert int(cluster.topic_config(short.name)["retention.ms"]) == (7 * 24 * 3600 + 10) * 1000
    assert int(cluster.topic_config(long.name)["retention.ms"]) == (7 * 24 * 3600 + 1_000_000) * 1000
    assert all(
        cluster.topic_config(own.name)["message.timestamp.type"] == "LogAppendTime" for own in consumer.sources[1:]
    )
    assert cluster.topic_config(dead_letters_topic(topic, group).name)["cleanup.policy"] == "compact"
    assert cluster.topic_config(lanes_topic(topic, group).name)["cleanup.policy"] == "compact"
    assert cluster.topic_config(skips_topic(topic, group).name)["retention.ms"] == "-1"


def test_two_groups_on_one_topic_do_not_take_each_others_retries(cluster: Cluster) -> None:
    """correctness 12"""
    topic, groups = fresh_topic(cluster), (fresh_group(), fresh_group())
    put(topic, 1, 2)
    one, other = Handler({1: 1}), Handler({2: 1})
    consumers = [
        RetryingConsumer(topic, handler, group, retry=retry_topics(0.2))
        for handler, group in zip((one, other), groups, strict=True)
    ]
    with Member(consumers[0]) as first, Member(consumers[1]):
        first.journal.wait(lambda: all(map(at_rest, consumers)) and len(one.done) == len(other.done) == 2, 30)
    assert {value: len(times) for value, times in one.calls.items()} == {1: 2, 2: 1}
    assert {value: len(times) for value, times in other.calls.items()} == {1: 1, 2: 2}


# -- The queue


def test_non_retriable_and_undecodable_records_go_straight_to_the_queue(cluster: Cluster) -> None:
    """correctness 14: one call, or none; bytes that are no text come back as they were."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1, key="k")
    put(topic, b"{\xffpoison", 2)
    handler = Handler({1: ALWAYS}, error=ZeroDivisionError)
    policy = blocking(30, non_retriable=(ArithmeticError,)).then(retry_topics(30))
    run_to_rest(RetryingConsumer(topic, handler, group, retry=policy))
    assert {value: len(times) for value, times in handler.calls.items()} == {1: 1, 2: 1}
    refused, poison = letters(topic, group)
    assert (refused.attempts, refused.error) == (1, "ZeroDivisionError: no answer for 1")
    assert (poison.offset, poison.raw_value, poison.attempts) == (1, b"{\xffpoison", 1)
    assert "does not decode" in poison.error


def test_two_always_failing_records_of_one_partition_both_reach_the_queue(cluster: Cluster) -> None:
    """Of one key, too: the queue is keyed by place."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(5), key="k")
    handler = Handler({1: ALWAYS, 3: ALWAYS})
    run_to_rest(RetryingConsumer(topic, handler, group, retry=blocking(0.05)))
    assert handler.done == [0, 2, 4]
    assert [letter.value for letter in letters(topic, group)] == ["1", "3"]


@pytest.mark.long  # test_blocked_lanes.py has one that is refused
@pytest.mark.parametrize("policy", [retry_topics(0.1), dead_letter()], ids=["retry topic", "queue"])
def test_what_cannot_be_published_three_times_waits_and_is_not_lost(
    cluster: Cluster, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 10, 17: refused by the broker three times, then taken. The handler is not called for that; the lane
    waits longer each time, shown as blocked; nothing is committed before, and other partitions go on."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put(topic, 1, partition=0)
    put(topic, *range(10, 15), partition=1)
    monkeypatch.setattr(workers, "AGAIN", 0.1)
    tries: list[float] = []
    at_third: list[dict[int, int]] = []

    class Refused(Producer):
        def send(self, topic_name: str, value: Any, *rest: Any, **more: Any) -> None:
            if "retry" in topic_name or "dead" in topic_name:
                tries.append(time.monotonic())
                if len(tries) == 3:
                    at_third.append(committed(topic, group))
                if len(tries) <= 3:
                    topic_name = f"{topic.name}.missing"  # the broker's own refusal
            super().send(topic_name, value, *rest, **more)

    refused = Refused(cluster, timeout=1.0, reports=True)
    monkeypatch.setattr(commits, "producer", lambda cluster, **kind: refused if kind else producer(cluster))
    handler = Handler({1: 1})
    run_to_rest(RetryingConsumer(topic, handler, group, retry=policy))
    assert len(tries) == 4
    assert len(handler.calls[1]) == (2 if policy.topics else 1)
    assert 0 not in at_third[0]
    assert sorted(value for value in handler.done if value >= 10) == list(range(10, 15))
    assert len(letters(topic, group)) == (0 if policy.topics else 1)
    assert all(later - sooner >= 0.1 for sooner, later in itertools.pairwise(tries))


@pytest.mark.long
def test_many_lanes_whose_dead_letters_are_refused_at_once_are_all_blocked(cluster: Cluster) -> None:
    """The process died of it: a hook polled the client from within the client's own callback."""
    topic, group = fresh_topic(cluster), fresh_group()
    consumer = RetryingConsumer(topic, refuse, group, order="key", retry=dead_letter())
    with Member(consumer) as member:
        member.journal.wait_for(Step.ASSIGNED)
        cluster.delete_topics([dead_letters_topic(topic, group).name])
        for number in range(8):
            put(topic, number, key=str(number))

        def blocked() -> set[str]:
            return {failed.place for failed in member.journal.of(Step.BLOCKED) if failed.refused is not None}

        member.journal.wait(lambda: len(blocked()) == 8, what="eight blocked lanes")
    assert committed(topic, group) == {}
    run_to_rest(consumer)  # makes the topic anew
    assert len(letters(topic, group)) == 8


@pytest.mark.long
def test_a_retry_topic_deleted_under_way_blocks_the_lane_and_loses_nothing(cluster: Cluster) -> None:
    """Named where one looks for what is blocked; the next start makes it anew."""
    topic, group = fresh_topic(cluster), fresh_group()
    consumer = RetryingConsumer(topic, Handler({1: ALWAYS}), group, retry=retry_topics(0.1))
    put(topic, 0)
    missing = consumer.sources[2].name
    with Member(consumer) as member:
        member.wait_committed({0: 1})
        cluster.delete_topics([missing])
        put(topic, 1)
        blocked = member.journal.wait_for(Step.BLOCKED)[0]
        member.journal.wait(lambda: missing in str(blocked.refused), what="why it is blocked")
    assert committed(topic, group) == {0: 1}
    handler = Handler({1: 1})
    run_to_rest(replace(consumer, handler=handler))  # makes it anew
    assert handler.done == [1]
    assert len(handler.calls[1]) == 2


def test_what_waits_in_topics_of_an_earlier_policy_is_handled_under_the_next_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each when it was to be, and what fails then goes on as the present policy says."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1, 2)
    handler = Handler({1: 2, 2: ALWAYS})
    consumer = RetryingConsumer(topic, handler, group, retry=retry_topics(60, 61))
    with Member(consumer) as member:
        member.wait_committed({0: 2})
    assert handler.done == []
    changed = replace(consumer, retry=retry_topics(0.1, 0.2))
    assert sum(lag(cluster, group, [topic.name for topic in changed.prepare().sources]).values()) == 2
    due = soon_due(monkeypatch, 1)
    run_to_rest(changed.prepare())
    assert handler.done == [1]
    assert {value: len(times) for value, times in handler.calls.items()} == {1: 3, 2: 3}  # then 0.2 s, then the end
    assert all(times[1] >= due for times in handler.calls.values())
    (letter,) = letters(topic, group)
    assert (letter.place, letter.attempts) == (f"{topic.name}/0/1", 3)


@pytest.mark.parametrize(
    "policy",
    [blocking(0.05, 0.05), pytest.param(blocking(exponential(0.05, cap=0.1)), marks=pytest.mark.long)],
    ids=["so often", "for ever"],
)
def test_what_an_earlier_policy_set_aside_begins_with_the_next_one(
    cluster: Cluster, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the dead letters after one more call: the policy of now has not given up."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)
    handler = Handler({1: 3})
    consumer = RetryingConsumer(topic, handler, group, retry=retry_topics(60))
    with Member(consumer) as member:
        member.wait_committed({0: 1})
    soon_due(monkeypatch, 0)
    run_to_rest(replace(consumer, retry=policy).prepare())
    assert len(handler.calls[1]) == 4
    assert letters(topic, group) == []


@pytest.mark.long
def test_a_member_ends_when_another_policy_of_its_group_left_topics_it_does_not_read(cluster: Cluster) -> None:
    """What a member of another version set aside would wait in vain, and be gone in a week."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    handler = Handler({1: 1})
    consumer = RetryingConsumer(topic, handler, group, retry=retry_topics(0.2))
    with Member(consumer) as first:
        first.journal.wait_for(Step.ASSIGNED)
        other = replace(consumer, retry=retry_topics(0.7))
        with Member(other) as second:
            second.journal.wait_for(Step.ASSIGNED)
            ((_, number, _), *_) = second.journal.of(Step.ASSIGNED)[0]
            put(topic, 1, partition=number)
            second.wait_committed({number: 1})
        error = first.ends(20)
    assert "another member of" in str(error)
    assert "retry1-700ms" in str(error)
    run_to_rest(consumer.prepare())
    assert handler.done == [1]


@pytest.mark.long  # test_partitions_added.py has that, and more
def test_partitions_added_to_the_source_are_retried_too(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    handler = Handler({5: 1})
    consumer = RetryingConsumer(topic, handler, group, retry=retry_topics(0.2))
    put(topic, 0, partition=0)
    with Member(consumer) as member:
        member.wait_committed({0: 1})
        admin(cluster).create_partitions([NewPartitions(topic.name, 3)])[topic.name].result(10)
        wait_until(lambda: cluster.topics()[topic.name] == 3)
        sender = Producer(cluster)  # one that does not know the topic as it was
        sender.send(topic.name, b"5", partition=2)
        sender.flush()
        member.journal.wait(lambda: 5 in handler.done, 20)
    run_to_rest(replace(consumer, topics=replace(topic, partitions=3)))  # upgraded: its retry topics stay as they are
    assert len(handler.calls[5]) == 2


# -- Errors that wrap others


def wrapped() -> Exception:
    error = RuntimeError("while charging")
    error.__cause__ = KeyError("customer")
    error.__cause__.__cause__ = ValueError("no such card")
    return error


def ring() -> Exception:
    error, other = RuntimeError("a"), RuntimeError("b")
    error.__cause__, other.__cause__ = other, error
    return error


def beside() -> Exception:
    error = ConnectionError("no answer")
    error.__context__ = ValueError("dealt with before")
    return error


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (wrapped, 1),
        (lambda: ExceptionGroup("two", [ConnectionError(), ExceptionGroup("one", [ValueError()])]), 1),
        pytest.param(lambda: ExceptionGroup("one", [wrapped()]), 1, marks=pytest.mark.long),
        (beside, 2),
        (ring, 2),
        pytest.param(lambda: ExceptionGroup("two", [ConnectionError(), KeyError()]), 2, marks=pytest.mark.long),
    ],
    ids=["raised from", "grouped", "both", "context", "ring", "none"],
)
def test_an_error_that_another_one_wraps_is_seen(cluster: Cluster, error: Any, calls: int) -> None:
    """correctness 14: what an error was raised from, or groups; not what was being dealt with when it came."""
    topic, group, called = fresh_topic(cluster), fresh_group(), []
    put(topic, 1)

    def handle(record: Record[int]) -> None:
        called.append(record.value)
        raise error()

    policy = blocking(0.01, non_retriable=(ValueError,))
    with Member(RetryingConsumer(topic, handle, group, retry=policy)) as member:
        member.wait_committed({0: 1})
    assert len(called) == calls


# -- Headers from outside


def test_forged_headers_neither_crash_nor_hold_up_nor_loop(cluster: Cluster) -> None:
    """correctness 16: in a retry topic the wait is at most the topic's delay, whatever a header says."""
    topic, group = fresh_topic(cluster), fresh_group()
    handler = Handler(dict.fromkeys(range(10), ALWAYS))
    consumer = RetryingConsumer(topic, handler, group, retry=retry_topics(0.3))
    consumer.prepare()
    origin = {"topic": "elsewhere", "partition": 9, "offset": 9, "timestamp": 1.0, "group": "other"}
    forged = [
        *(None, "", "{", "nonsense", "[1]"),
        *(json.dumps({**origin, "due": time.time() + 1e9}), json.dumps({**origin, "due": -5})),
        *(json.dumps({**origin, "attempts": 10**17, "due": 0}), json.dumps({**origin, "attempts": "many"})),
        json.dumps({**origin, "replayed": True}),
    ]
    sender = Producer(cluster)
    retries = consumer.sources[2]
    for value, header in enumerate(forged):
        sender.send(retries.name, str(value).encode(), "k", None if header is None else {HEADER: header})
        sender.send(topic.name, str(100 + value).encode(), "k", None if header is None else {HEADER: header})
    sender.flush()
    run_to_rest(consumer)
    assert {value: len(times) for value, times in handler.calls.items() if value < 100} == dict.fromkeys(range(10), 1)
    assert Counter(value for value in handler.done) == Counter(range(100, 110))


def test_a_header_forged_in_the_source_is_not_believed(cluster: Cluster) -> None:
    """correctness 16: there the first attempt is the first, and the place is where the record lies."""
    topic, group = fresh_topic(cluster), fresh_group()
    handler = Handler({1: ALWAYS})
    forged = {"topic": "elsewhere", "partition": 9, "offset": 9, "timestamp": 1.0, "group": "other", "attempts": 1000}
    sender = Producer(cluster)
    sender.send(topic.name, b"1", "k", {HEADER: json.dumps({**forged, "due": time.time() + 1e9, "replayed": True})})
    sender.flush()
    run_to_rest(RetryingConsumer(topic, handler, group, retry=retry_topics(0.2)))
    (letter,) = letters(topic, group)
    assert (letter.place, letter.group, letter.attempts) == (f"{topic.name}/0/0", group, 2)


def test_a_replay_forged_from_elsewhere_takes_no_letter_away(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    handler = Handler({1: ALWAYS})
    consumer = RetryingConsumer(topic, handler, group, retry=dead_letter()).prepare()
    put(topic, 1)
    origin = {"partition": 0, "offset": 0, "timestamp": 1.0, "group": group, "replayed": True}
    sender = Producer(cluster)
    for value, name in enumerate(("elsewhere", "x" * 900_000), 2):
        header = json.dumps({**origin, "topic": name})
        sender.send(consumer.sources[1].name, str(value).encode(), "k", {HEADER: header})
    sender.flush()
    run_to_rest(consumer)
    assert sorted(handler.done) == [2, 3]
    assert len(letters(topic, group)) == 1


def test_a_consumer_without_failures_has_a_quiet_life(cluster: Cluster) -> None:
    """No hook comes with every record: the loop tells the policy only what is rare."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(100))
    seen: set[Step] = set()
    consumer = RetryingConsumer(
        topic, lambda record: None, group, retry=blocking(1), on_change=lambda step, _: seen.add(step)
    )
    stop = threading.Event()
    thread = threading.Thread(target=consumer.run, args=(stop,))
    thread.start()
    wait_until(lambda: committed(topic, group) == {0: 100}, 20)
    stop.set()
    thread.join(20)
    assert Step.COMMITTED in seen
    assert not seen & {Step.HANDLING, Step.HANDLED}
    with Reader(dead_letters_topic(topic, group)) as reader:
        assert reader.read_to_end() == []
