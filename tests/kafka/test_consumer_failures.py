"""What becomes of records that fail, and of consumers that cannot go on."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
from functools import partial, wraps
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from consuming import Journal, Member, Untellable, Untraceable, alter, committed, fresh_group, fresh_topic, put

import labkit.kafka.consumer.loop as module
import labkit.kafka.consumer.workers as workers
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import Decision, FailedRecord, Retry, SetAside, Stop, keep_trying
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import DeliveryFailed, HandlerExit, LabkitError, PoisonRecord, TopicMissing
from labkit.kafka.producer import Producer, producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import CAUSE, Record, encode
from labkit.kafka.topics import Topic


def test_a_failing_record_is_tried_until_it_succeeds_and_keeps_its_order(cluster: Cluster) -> None:
    """correctness 2, 7: three failures, then it goes on; attempts are counted, the policy sees key and value."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(5), key="k")
    handled: list[int] = []
    failures: list[tuple[int, float, Any]] = []

    def handle(record: Record[int]) -> None:
        if record.value == 2 and len(failures) < 3:
            raise ValueError("not yet")
        handled.append(record.value)

    def policy(failed: FailedRecord) -> Decision:
        failures.append((failed.attempt, failed.since, failed.record))
        return Retry(0.05)

    with Member(Consumer(topic, handle, group, on_failure=policy)) as member:
        member.wait_committed({0: 5})
        (recovered,) = member.journal.of(Step.RECOVERED)
    assert handled == [0, 1, 2, 3, 4]
    assert [attempt for attempt, _, _ in failures] == [1, 2, 3]
    assert len({since for _, since, _ in failures}) == 1
    assert all((record.key, record.value) == ("k", 2) for _, _, record in failures)
    assert recovered.place == f"{topic.name}/0/2"
    assert len(recovered.times) == 3


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (None, Untellable),
        (10, Untraceable),
        pytest.param(None, Untraceable, marks=pytest.mark.long),
        pytest.param(10, Untellable, marks=pytest.mark.long),
    ],
)
def test_an_error_without_a_text_is_an_error_like_any_other(
    cluster: Cluster, batch: int | None, error: type[Exception]
) -> None:
    """correctness 36: the whole consumer ended of it, again after each restart."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(5))
    failures: list[FailedRecord] = []

    def handle(_: Any) -> None:
        if len(failures) < 2:
            raise error

    def policy(failed: FailedRecord) -> Decision:
        failures.append(failed)
        if len(failures) == 1:
            raise error
        return Retry(0.05)

    with Member(Consumer(topic, handle, group, batch=batch, on_failure=policy)) as member:
        member.wait_committed({0: 5})
    assert len(failures) == 2


def test_a_failing_partition_leaves_the_others_alone(cluster: Cluster) -> None:
    """correctness 7: p0 fails for ever while p1's records go on."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in (0, 1):
        put(topic, *range(50), partition=partition)

    def handle(record: Record[int]) -> None:
        if record.partition == 0 and record.value == 3:
            raise ValueError("for ever")

    with Member(Consumer(topic, handle, group, on_failure=keep_trying(0.02, 0.05))) as member:
        member.wait_committed({0: 3, 1: 50})
        member.journal.wait_for(Step.FAILED, 5)
        put(topic, 50, partition=1)
        member.wait_committed({0: 3, 1: 51})


def test_poison_names_its_place_and_blocks_only_its_lane(cluster: Cluster) -> None:
    """correctness 7: with the default policy, in key order."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1, b"{poison", 2, key="a")
    put(topic, 3, 4, key="b")
    with Member(Consumer(topic, lambda record: None, group, order="key")) as member:
        member.journal.wait(lambda: len(member.journal.of(Step.HANDLED)) == 3)
        failure = member.journal.wait_for(Step.FAILED)[0]
        member.wait_committed({0: 1})
    assert failure.place == f"{topic.name}/0/1"
    assert isinstance(failure.error, PoisonRecord)
    assert (failure.record, failure.key) == (None, "a")
    assert {record.value for record in member.journal.of(Step.HANDLED)} == {1, 3, 4}


def test_what_is_set_aside_names_the_poison_as_its_cause(cluster: Cluster) -> None:
    """And not the record before it: a verdict and a dead-letter queue go by it."""
    topic, dead = fresh_topic(cluster), fresh_topic(cluster, value=str)
    put(topic, 1, 2, b"{poison", 3, b"{poison")

    def policy(failed: FailedRecord) -> Decision:
        return SetAside(dead.name, None, encode(failed.place))

    with Member(Consumer(topic, lambda record: None, fresh_group(), on_failure=policy)) as member:
        member.wait_committed({0: 5})
    assert [record.value for record in member.journal.of(Step.HANDLED)] == [1, 2, 3]
    with Reader(dead) as reader:
        found = {record.value: record.headers[CAUSE] for record in reader.read_to_end()}
    assert found == {place: place for place in (f"{topic.name}/0/2", f"{topic.name}/0/4")}


def test_what_cannot_be_set_aside_blocks_its_lane_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 10, 17: its topic is not there. The policy is asked again, the handler is not; other lanes go on."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    nowhere = Topic(cluster, f"{topic.name}.nowhere", 1, str)
    monkeypatch.setattr(workers, "AGAIN", 0.01)
    put(topic, 1, partition=0)
    put(topic, *range(5), partition=1)
    asked, called = threading.Semaphore(0), []

    def handle(record: Record[int]) -> None:
        if record.partition == 0:
            called.append(record)
            raise ValueError("no")

    def policy(failed: FailedRecord) -> Decision:
        asked.release()
        return SetAside(nowhere.name, None, b'""')

    with Member(Consumer(topic, handle, group, on_failure=policy)) as member:
        member.wait_committed({1: 5})
        assert all(asked.acquire(timeout=20) for _ in range(3))
        blocked = member.journal.wait_for(Step.BLOCKED)[0]
        assert nowhere.name in str(blocked.refused)
        nowhere.create()
        member.wait_committed({0: 1, 1: 5})
    assert len(called) == 1
    assert len(member.journal.of(Step.FAILED)) == 1


@pytest.mark.parametrize(
    "broken",
    [
        lambda failure: 1 / 0 if failure.attempt == 1 else None,
        lambda failure: Retry(-1.0 if failure.attempt == 1 else float("nan")),
    ],
    ids=["raises, then answers nonsense", "negative, then not a number"],
)
def test_a_broken_policy_neither_loses_the_record_nor_spins(cluster: Cluster, broken: Any) -> None:
    """correctness 17: it is asked again after 0.5 s, 1 s …"""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1, 2)
    calls: list[float] = []

    def handle(record: Record[int]) -> None:
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise ValueError("no")

    with Member(Consumer(topic, handle, group, on_failure=broken)) as member:
        member.wait_committed({0: 2})
    assert len(calls) == 4
    assert calls[1] - calls[0] >= 0.5
    assert calls[2] - calls[1] >= 1.0


def test_a_policy_may_retry_at_once(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)
    with Member(Consumer(topic, lambda record: 1 / 0, group, on_failure=lambda failure: Retry(0))) as member:
        failures = member.journal.wait_for(Step.FAILED, 3)
    assert [failure.decision for failure in failures[:3]] == [Retry(0)] * 3


def test_a_client_that_cannot_subscribe_is_closed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    topic, closed = fresh_topic(cluster), threading.Event()

    class Refusing(module.Client):
        def subscribe(self, *_: Any, **__: Any) -> None:
            raise KafkaException(KafkaError(KafkaError._FATAL))

        def close(self) -> None:
            closed.set()
            super().close()

    monkeypatch.setattr(module, "Client", Refusing)
    with pytest.raises(KafkaException):
        Consumer(topic, print, fresh_group()).run(threading.Event())
    assert closed.wait(5)


def test_stop_raises_the_handlers_error_and_commits_what_others_finished(cluster: Cluster) -> None:
    """correctness 1"""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put(topic, *range(5), partition=1)
    calm = threading.Event()

    def handle(record: Record[int]) -> None:
        if record.partition == 0 and record.value == 1:
            calm.wait(10)
            raise KeyError("the handler's own")

    with Member(Consumer(topic, handle, group, on_failure=lambda failure: Stop())) as member:
        put(topic, 0, 1, 2, partition=0)
        member.journal.wait(lambda: len(member.journal.of(Step.HANDLED)) == 6)
        calm.set()
        assert isinstance(member.ends(), KeyError)
    assert committed(topic, group) == {0: 1, 1: 5}


@pytest.mark.parametrize("order", ["partition", "key"])
def test_a_handler_that_exits_is_not_committed(cluster: Cluster, order: Any) -> None:
    """correctness 1"""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0, 1, 2)

    def handle(record: Record[int]) -> None:
        if record.value == 1:
            sys.exit("enough")

    with Member(Consumer(topic, handle, group, order=order)) as member:
        error = member.ends()
    assert isinstance(error, HandlerExit)
    assert f"{topic.name}/0/1" in str(error)
    assert committed(topic, group) == {0: 1}


class UntellableExit(SystemExit):
    def __repr__(self) -> str:
        raise RuntimeError("no text")


def test_an_exit_without_a_text_is_told_with_its_place(cluster: Cluster) -> None:
    """correctness 36"""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0)

    def handle(record: Record[int]) -> None:
        raise UntellableExit

    with Member(Consumer(topic, handle, group)) as member:
        error = member.ends()
    assert isinstance(error, HandlerExit)
    assert f"{topic.name}/0/0" in str(error)


def test_an_exit_in_a_policy_ends_the_consumer(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0)
    with Member(Consumer(topic, lambda record: 1 / 0, group, on_failure=lambda failure: sys.exit(1))) as member:
        assert isinstance(member.ends(), HandlerExit)
    assert committed(topic, group) == {}


@pytest.mark.parametrize("step", [Step.HANDLING, Step.HANDLED, Step.COMMITTING, Step.ASSIGNED])
def test_an_error_in_a_hook_never_loses_a_record(cluster: Cluster, step: Step) -> None:
    """correctness 1: before the handler it counts as the record's failure, elsewhere it ends the consumer."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 0)

    def hook(told: Step, subject: object) -> None:
        if told is step:
            raise ZeroDivisionError("the hook's own")

    with Member(Consumer(topic, lambda record: None, group, on_step=hook)) as member:
        if step is Step.HANDLING:
            assert isinstance(member.journal.wait_for(Step.FAILED)[0].error, ZeroDivisionError)
        else:
            assert isinstance(member.ends(), ZeroDivisionError)
    if step is not Step.ASSIGNED:  # there the record may have been handled in the meantime
        assert committed(topic, group) == {}


def test_nothing_is_committed_when_what_a_handler_sent_is_refused(cluster: Cluster) -> None:
    """correctness 10: refused after the handler returned."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, 1)
    with Member(Consumer(topic, lambda record: output.send(record.value), group)) as member:
        member.wait_committed({0: 1})
        cluster.delete_topics([output.name])
        put(topic, 2)
        error = member.ends()
    assert isinstance(error, DeliveryFailed)
    assert output.name in str(error)
    assert committed(topic, group) == {0: 1}


@pytest.mark.long
def test_nothing_is_committed_when_another_handler_was_told_of_the_refusal(cluster: Cluster) -> None:
    """correctness 10: the second record's own flush must not make the first one's loss look fine."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    small = Topic(cluster, f"{topic.name}.small", 1, str)
    small.create()
    put(topic, 0, partition=0)
    told: list[DeliveryFailed] = []
    sent = threading.Event()

    def handle(record: Record[int]) -> None:
        if record.partition == 0:
            small.send("x" * 5000)
            if record.value:
                sent.set()
        else:
            try:
                small.flush()
            except DeliveryFailed as error:
                told.append(error)

    with Member(Consumer(topic, handle, group, commit_interval=1.0)) as member:
        member.wait_committed({0: 1})
        alter(small, {"max.message.bytes": "1000"})  # after its handler has learned what it takes
        put(topic, 1, partition=0)
        assert sent.wait(10)
        put(topic, 2, partition=1)
        assert isinstance(member.ends(), DeliveryFailed)
    assert committed(topic, group) == {0: 1}


def test_a_handler_that_fails_has_sent_nothing(cluster: Cluster) -> None:
    """correctness 34: it sends two records and raises, three times, and then succeeds."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, 1)
    calls: list[int] = []

    def handle(record: Record[int]) -> None:
        calls.append(record.value)
        output.send(10)
        output.send(20)
        if len(calls) <= 3:
            raise ValueError("not yet")

    with Member(Consumer(topic, handle, group, on_failure=keep_trying(0.01))) as member:
        member.wait_committed({0: 1})
    assert len(calls) == 4
    with Reader(output) as reader:
        assert [record.value for record in reader.read_to_end()] == [10, 20]


def test_what_a_hook_sends_is_no_output_of_the_record(cluster: Cluster) -> None:
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(3))
    calls: list[int] = []

    def hook(step: Step, subject: Any) -> None:
        if step in (Step.HANDLING, Step.HANDLED):
            output.send(subject.value)

    def handle(record: Record[int]) -> None:
        calls.append(record.value)
        if len(calls) == 2:
            raise ValueError("once")

    consumer = Consumer(topic, handle, group, on_failure=lambda failed: Retry(0.01), on_step=hook)
    with Member(consumer) as member:
        member.wait_committed({0: 3})
    with Reader(output) as reader:
        assert [record.value for record in reader.read_to_end()] == [0, 0, 1, 1, 1, 2, 2]


def test_a_batch_that_fails_has_sent_nothing(cluster: Cluster) -> None:
    """correctness 34: of all its records once more, one by one, each is sent once."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(20))

    def handle(batch: list[Any]) -> None:
        for record in batch:
            output.send(record.value)
        if len(batch) > 1:
            raise ValueError("too many at once")

    with Member(Consumer(topic, handle, group, batch=10)) as member:
        member.wait_committed({0: 20})
    with Reader(output) as reader:
        assert [record.value for record in reader.read_to_end()] == list(range(20))


def test_a_handler_that_sends_ten_thousand_records(cluster: Cluster) -> None:
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, 1)
    with Member(Consumer(topic, lambda record: [output.send(n) for n in range(10_000)] and None, group)) as member:
        member.wait_committed({0: 1})
    with Reader(output) as reader:
        assert [record.value for record in reader.read_to_end()] == list(range(10_000))


def test_what_cannot_be_sent_fails_in_the_handler(cluster: Cluster) -> None:
    """correctness 10, 34, 35: while its policy can still be asked, and its lane alone is blocked by it."""
    topic, group = fresh_topic(cluster), fresh_group()
    output = fresh_topic(cluster, value=object)
    wrong = [
        (lambda: output.send("x" * 3_000_000), "too large"),
        (lambda: output.send("x" * 1_039_900), "too large"),  # with its headers
        (lambda: (output.send(1), output.flush()), "deliver()"),
        (lambda: output.send(1, headers={"name": "\ud800"}), "surrogates"),
        (lambda: output.send({"rate": float("nan")}), "NaN"),
        (lambda: output.send([1.0, [float("inf")]]), "NaN"),
        (lambda: output.send(object()), "object"),
        (lambda: producer(cluster).send(output.name, b"1", partition=7), "no partition 7"),
        (lambda: Topic(cluster, f"{output.name}.missing", 1, int).send(1), "does not exist"),
    ]
    put(topic, *range(len(wrong)))
    errors: list[str] = []

    def policy(failed: FailedRecord) -> Decision:
        errors.append(str(failed.error))
        return SetAside(output.name, None, b"1")

    with Member(Consumer(topic, lambda record: wrong[record.value][0](), group, on_failure=policy)) as member:
        member.wait_committed({0: len(wrong)})
    assert len(errors) == len(wrong)
    for error, (_, words) in zip(errors, wrong, strict=True):
        assert words in error


def test_what_threads_of_a_handler_send(cluster: Cluster) -> None:
    """With a copy of its context they are refused, as they may be too late for it; without one they send at once."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, 1)
    refused: list[str] = []

    def send(value: int) -> None:
        try:
            output.send(value)
        except LabkitError as error:
            refused.append(str(error))

    def handle(record: Record[int]) -> None:
        copied = contextvars.copy_context()
        for target in (lambda: copied.run(send, 1), lambda: send(2)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        raise ValueError("no")

    with Member(Consumer(topic, handle, group, on_failure=lambda failed: Stop())) as member:
        assert str(member.ends()) == "no"
    output.flush()
    assert len(refused) == 1
    assert "without a copy of its context" in refused[0]
    with Reader(output) as reader:
        assert [record.value for record in reader.read_to_end()] == [2]


def test_what_a_handler_delivered_stays_delivered(cluster: Cluster) -> None:
    """`deliver` has said that it is there: it is not held, and not taken back."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, 1)

    def handle(record: Record[int]) -> None:
        output.send(1)
        output.deliver([(2, None, None)])
        raise ValueError("no")

    with Member(Consumer(topic, handle, group, on_failure=lambda failed: Stop())) as member:
        assert str(member.ends()) == "no"
    with Reader(output) as reader:
        assert [record.value for record in reader.read_to_end()] == [2]


def test_what_a_handler_sends_names_its_cause(cluster: Cluster) -> None:
    topic, output, group = fresh_topic(cluster, 4), fresh_topic(cluster), fresh_group()
    sender = Producer(cluster)
    for value in range(40):
        sender.send(topic.name, str(value).encode(), f"key-{value}", {"correlation-id": f"c-{value}"})
    sender.flush()

    with Member(Consumer(topic, lambda record: output.send(record.value), group)) as member:
        member.journal.wait(lambda: sum(committed(topic, group).values()) == 40)
        handled = {record.value: record.place for record in member.journal.of(Step.HANDLED)}
    with Reader(output) as reader:
        records = reader.read_to_end()
    assert {record.value: record.headers[CAUSE] for record in records} == handled
    assert all(record.headers["correlation-id"] == f"c-{record.value}" for record in records)


def test_a_topic_that_does_not_exist_is_named(cluster: Cluster) -> None:
    missing = Topic(cluster, f"lab.{fresh_group()}.orders", 1, int)
    with pytest.raises(TopicMissing, match=rf"topic orders \({missing.name}\) does not exist"):
        Consumer(missing, print, "group").run(threading.Event())


@pytest.mark.parametrize(
    "again", [False, pytest.param(True, marks=pytest.mark.long)], ids=["deleted", "deleted and made anew"]
)
def test_a_topic_deleted_under_a_consumer_is_named(cluster: Cluster, again: bool) -> None:
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put(topic, *range(10), partition=0)
    with Member(Consumer(topic, lambda record: None, group)) as member:
        member.wait_committed({0: 10})
        cluster.delete_topics([topic.name])
        if again:
            topic.create()
            put(topic, *range(100, 103), partition=0)
        error = member.ends()
    assert isinstance(error, TopicMissing)
    assert topic.name in str(error)


def test_a_coroutine_that_nobody_runs_is_told(cluster: Cluster) -> None:
    """correctness 1: not taken for a handler that returned."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)

    async def handle(record: Record[int]) -> None:
        pass

    with Member(Consumer(topic, lambda record: handle(record), group)) as member:
        failure = member.journal.wait_for(Step.FAILED)[0]
    assert "plain `def`" in str(failure.error)
    assert committed(topic, group) == {}


class Handler:
    """A callable object whose call is a coroutine function."""

    async def __call__(self, record: Record[int]) -> None: ...


async def coroutine(times: int, record: Record[int]) -> None: ...


@pytest.mark.parametrize(
    ("handler", "name"),
    [
        (coroutine, "coroutine"),
        (partial(coroutine, 2), "coroutine"),
        (Handler(), "Handler"),
        (Handler().__call__, "Handler.__call__"),
        (partial(Handler()), "Handler"),
    ],
)
@pytest.mark.parametrize("batch", [None, 10])
def test_every_kind_of_coroutine_function_is_refused(handler: Any, name: str, batch: int | None) -> None:
    topic = Topic(Cluster("127.0.0.1:1"), "t", 1, int)
    with pytest.raises(LabkitError, match=f"the handler {name} is a coroutine function.*plain `def`.*asyncio.run"):
        Consumer(topic, handler, batch=batch)


def test_a_stray_yield_is_refused() -> None:
    """Its body would never run, and each record count as handled."""

    def handler(record: Record[int]) -> Any:
        yield record

    with pytest.raises(LabkitError, match="handler is a generator function"):
        Consumer(Topic(Cluster("127.0.0.1:1"), "t", 1, int), handler)


def test_a_handler_that_runs_a_coroutine_itself_is_none() -> None:
    """Though a decorator made it of one."""

    @wraps(coroutine)
    def handler(record: Record[int]) -> None:
        asyncio.run(coroutine(2, record))

    assert Consumer(Topic(Cluster("127.0.0.1:1"), "t", 1, int), handler).handler is handler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topics": ()}, "at least one topic"),
        ({"order": "time"}, "order is 'partition' or 'key'"),
        ({"start": "now"}, "start is 'earliest' or 'latest'"),
        ({"handler": 3}, "must be a function"),
        ({"workers": 0}, "workers must be positive"),
        ({"max_ahead": 0}, "max_ahead must be positive"),
    ],
)
def test_a_wrong_option_is_told_at_construction(change: dict[str, Any], message: str) -> None:
    topic = Topic(Cluster("127.0.0.1:1"), "t", 1, int)
    with pytest.raises(LabkitError, match=message):
        Consumer(**{"topics": topic, "handler": print, **change})


def test_a_consumer_without_a_group_says_how_to_name_one() -> None:
    with pytest.raises(LabkitError, match="needs a group"):
        Consumer(Topic(Cluster("127.0.0.1:1"), "t", 1, int), print).run(threading.Event(), Journal())
