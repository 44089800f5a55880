"""Partitions added to a topic while it is written and read: nothing is lost or done twice, and nobody is restarted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
from consuming import Journal, Member, fresh_group, fresh_topic, put
from lab_helpers import Order, Shipped, orders
from processes import wait_until

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError, TopicMismatch
from labkit.kafka.lag import end_offsets, lag
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.lab.pods.deployment import Deployment
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import RetryingConsumer, blocking, dead_letter, retry_topics
from labkit.runtime.which_kafka import Connection


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("added")
    yield lab
    lab._end(0)


def held(deployment: Deployment) -> list[int]:
    """The numbers of the partitions that its pods have."""
    reports = [pod.report for pod in deployment.pods]
    return sorted(int(place.rpartition("/")[2]) for one in reports if one is not None for place in one.assigned)


# -- The lab's call


def test_a_lab_adds_partitions_once_and_takes_none_away(lab: Lab) -> None:
    topic = lab.topic("orders", 2, Order)
    for _ in range(2):  # a cell may run twice
        grown = lab.add_partitions(topic, 3)
        assert grown == replace(topic, partitions=3) == lab.topics["orders"]
    assert lab.cluster.topics()[topic.name] == 3
    assert [(one.target, one.text, one.instant) for one in lab.faults if one.kind == "add partitions"] == [
        ("orders", "orders: 3 partitions", True)
    ]
    assert lab.topic("orders", 3, Order) == grown
    with pytest.raises(TopicMismatch, match="takes none away"):
        lab.add_partitions(grown, 2)
    for wrong in (0, 1001, "4"):
        with pytest.raises(LabkitError, match="1 to 1000"):
            lab.add_partitions(grown, wrong)  # type: ignore[arg-type]


@pytest.mark.long
def test_pods_are_ready_once_they_share_the_partitions_that_were_added(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(topic, print), replicas=2)
    lab.wait_ready(shop)
    assert held(shop) == [0]
    pods = [pod.child for pod in shop.pods]
    lab.add_partitions(topic, 3)
    lab.wait_ready(shop)
    assert held(shop) == [0, 1, 2]
    assert all(pod.report is not None and pod.report.assigned for pod in shop.pods)  # who had nothing to do, too
    assert [pod.child for pod in shop.pods] == pods


# -- Audit: settle, verdict and records


@pytest.mark.parametrize("guarantee", [pytest.param("at least once", marks=pytest.mark.long), "exactly once"])
def test_what_is_sent_while_partitions_are_added_is_done_settled_and_judged(
    lab: Lab, guarantee: Literal["at least once", "exactly once"]
) -> None:
    """The load, the pods and the board go on as they are; source and outputs grow under them."""
    ordered, shipped = lab.topic("orders", 2, Order), lab.topic("shipped", 2, Shipped)

    def ship(record: Record[Order]) -> None:
        shipped.send(Shipped(record.value.id), record.key)

    shop = lab.deploy("shop", Consumer(ordered, ship, guarantee=guarantee), replicas=2)
    lab.wait_ready(shop)
    lab._sampler.tally(shipped, "id")  # as a board does
    numbers = iter(range(100_000))
    going = threading.Event()
    going.set()

    def arriving() -> Iterator[Order]:
        while going.is_set():
            yield from orders(1, next(numbers))

    load = lab.load(ordered, arriving(), rate=200)
    wait_until(lambda: load.count > 50, what="a load under way")
    lab.add_partitions(shipped, 4)
    lab.add_partitions(ordered, 4)

    ends = lambda: end_offsets(lab.cluster, [ordered.name, shipped.name])  # noqa: E731
    wait_until(lambda: len(ends()) == 8 and all(ends().values()), what="all partitions to be used")
    assert not load.done
    assert not lab.settle(timeout=0)
    going.clear()
    verdict = lab.verdict(load, shipped, exactly_once=guarantee == "exactly once")
    assert (verdict.result, verdict.done) == ("valid", load.count), verdict.explain()
    assert len(lab.records(ordered, last=100_000)) == load.count
    wait_until(lambda: lab.figure("completed", "shipped") == load.count, what="the board to have counted all")
    assert sum(lag(lab.cluster, shop.group or "", [ordered.name]).values()) == 0
    assert shop.restarts == 0


@pytest.mark.long
def test_who_reads_added_partitions_beside_a_backlog_breaks_the_order_and_a_verdict_says_whose(lab: Lab) -> None:
    """Once the lag is 0 before partitions are added, it does not."""
    ordered, shipped = lab.topic("orders", 1, Order), lab.topic("shipped", 1, Shipped)
    held_up = lab.folder / "held up"

    def ship(record: Record[Order]) -> None:
        while record.partition == 0 and held_up.exists():
            threading.Event().wait(0.01)
        shipped.send(Shipped(record.value.id), record.key)

    shop = lab.deploy("shop", Consumer(ordered, ship))
    lab.wait_ready(shop)
    held_up.touch()
    before = lab.load(ordered, orders(10), rate=1000, key="customer")
    before.wait()
    grown = lab.add_partitions(ordered, 2)
    after = lab.load(grown, orders(10, 10), rate=1000, key="customer")
    after.wait()
    places = lab.records(grown, last=100).groupby("key").partition.agg(set)
    moved = {key for key, numbers in places.items() if len(numbers) == 2}
    assert 0 < len(moved) < 10
    wait_until(lambda: len(lab.records(shipped, last=100)) == len(moved), what="what is in the new partition")
    held_up.unlink()
    verdict = lab.verdict([before, after], shipped)
    assert (verdict.result, verdict.done) == ("invalid", 20)
    assert {one.kind for one in verdict.found} == {"out of order"}
    assert {one.key for one in verdict.found} == moved
    assert "out of order" in str(verdict)
    calm = lab.load(grown, orders(10, 20), rate=1000, key="customer")
    assert lab.settle()
    grown = lab.add_partitions(grown, 4)
    calmly = lab.load(grown, orders(10, 30), rate=1000, key="customer")
    assert lab.verdict([calm, calmly], shipped).result == "valid"


# -- Retry topics


class Shaky:
    """Fails on these values, so often as told; notes every call."""

    def __init__(self, fails: dict[int, int]) -> None:
        self.fails, self.calls, self.done = fails, Counter[int](), list[int]()

    def __call__(self, record: Record[int]) -> None:
        self.calls[record.value] += 1
        if self.calls[record.value] <= self.fails.get(record.value, 0):
            raise ConnectionError(f"no answer for {record.value}")
        self.done.append(record.value)


def send(topic: Topic[Any], *values: int) -> None:
    """Send each value to the partition of its last digit, by a producer that knows the topic as it is now."""
    sender = Producer(topic.cluster)
    for value in values:
        sender.send(topic.name, str(value).encode(), f"k{value}", partition=value % 10)
    sender.flush()


def waits_for_partition(journal: Journal, topic: Topic[Any], number: int) -> None:
    journal.wait(lambda: (topic.name, number) in journal.assigned(), what=f"partition {number}")


@pytest.mark.parametrize("guarantee", ["at least once", pytest.param("exactly once", marks=pytest.mark.long)])
def test_partitions_added_while_records_wait_in_retry_topics(
    cluster: Cluster, guarantee: Literal["at least once", "exactly once"]
) -> None:
    """What waits is handled, once; what fails in a new partition goes the same way, and its dead letter is replayed.
    The next consumer works with the topics as they are."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    handler = Shaky({0: 1, 1: 1, 12: 1, 13: 2})
    consumer = RetryingConsumer(
        topic, handler, group, retry=retry_topics(1.5), guarantee=guarantee, slot="one", commit_interval=0.05
    )
    consumer.prepare()

    def replay(place: str) -> None:
        wait_until(lambda: list(letters) == [place], what="a letter")
        handler.fails.clear()
        assert letters.replay() == 1
        wait_until(lambda: not letters, what="the letter to go")

    send(topic, 0, 1)
    with DeadLetters(topic, group) as letters:
        with Member(consumer) as member:
            member.journal.wait(lambda: handler.calls.keys() == {0, 1}, what="two that fail")
            cluster.add_partitions(topic.name, 4)
            waits_for_partition(member.journal, topic, 3)
            send(topic, 10, 11, 12, 13)
            member.journal.wait(lambda: sorted(handler.done) == [0, 1, 10, 11, 12], what="what waited, and what is new")
            replay(f"{topic.name}/3/0")
        assert handler.calls == Counter({0: 2, 1: 2, 10: 1, 11: 1, 12: 2, 13: 3})
        handler.fails[23] = 1
        with Member(replace(consumer, topics=replace(topic, partitions=4), retry=dead_letter())):
            send(topic, 23)
            replay(f"{topic.name}/3/1")
    assert Counter(handler.done) == Counter([0, 1, 10, 11, 12, 13, 23])


@pytest.mark.long
def test_a_lane_that_is_blocked_stays_so_while_partitions_are_added(cluster: Cluster) -> None:
    """Its place in the order is kept; what comes in the new partition is handled meanwhile."""
    topic, group, well = fresh_topic(cluster), fresh_group(), threading.Event()
    done: list[int] = []

    def handle(record: Record[int]) -> None:
        if record.value == 0 and not well.is_set():
            raise ConnectionError("no answer")
        done.append(record.value)

    put(topic, 0, 10, 20, partition=0)
    policy = blocking(*[0.05] * 2000)
    with Member(RetryingConsumer(topic, handle, group, retry=policy)) as member:
        member.journal.wait_for(Step.FAILED)
        cluster.add_partitions(topic.name, 2)
        waits_for_partition(member.journal, topic, 1)
        send(topic, 1, 11)
        member.journal.wait(lambda: done == [1, 11], what="what is in the new partition")
        well.set()
        member.wait_committed({0: 3, 1: 2})
    assert done == [1, 11, 0, 10, 20]


@pytest.mark.long
def test_what_waits_in_retry_topics_is_told_though_they_have_fewer_partitions_than_their_source(lab: Lab) -> None:
    """They were made when the source had fewer. The console's figure was not a number."""
    source = lab.topic("orders", 1, Order)

    def refuse(record: Record[Order]) -> None:
        raise ConnectionError("no answer")

    shop = lab.deploy("shop", RetryingConsumer(source, refuse, retry=retry_topics(600)))
    lab.wait_ready(shop)
    grown = lab.add_partitions(source, 3)
    shop = lab.deploy("shop", RetryingConsumer(grown, refuse, retry=retry_topics(600)))
    lab.wait_ready(shop)
    lab.board(lag=shop, panels=lab.retry_console(shop).panels)
    lab.load(grown, orders(8), rate=1000).wait()
    wait_until(lambda: lab.figure("to be retried", "in 600 s") == 8, what="what waits")
