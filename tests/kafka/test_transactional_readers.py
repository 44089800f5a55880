"""Readers of topics that are written in transactions: views, stores, verdicts, over markers and open transactions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer as Client
from consuming import Member, fresh_group, fresh_topic, put
from lab_helpers import Order, Shipped, orders
from processes import wait_until
from stores import store_topic, transaction

import labkit.lab.verdict.evidence as evidence
from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import ClusterUnreachable
from labkit.kafka.lag import end_offsets, lag
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore
from labkit.patterns.projection import Projection, Staleness
from labkit.patterns.views import SqliteView
from labkit.runtime.which_kafka import Connection


@pytest.fixture
def view(tmp_path: Path) -> Iterator[SqliteView]:
    with SqliteView(tmp_path / "view.db", "numbers", {"value": "bigint"}) as made:
        yield made


def build(topic: Topic[int], view: SqliteView, group: str) -> Member:
    """A member that writes the view."""
    rows = Projection(topic, lambda record: [(record.value,)], view, version=lambda record: None)
    return Member(rows.consumer(group))


def content(view: SqliteView) -> dict[str, int]:
    return {key: value for key, ((value,),) in view.content().items()}


def marked(topic: Topic[int]) -> None:
    """Ten transactions of one record each, every other one aborted: half of the offsets are markers."""
    client = Client(topic.cluster.config({"transactional.id": fresh_group()}))
    client.init_transactions(20)
    for number in range(10):
        client.begin_transaction()
        client.produce(topic.name, f"{number}", f"{number}")
        client.flush(10)
        client.abort_transaction(20) if number % 2 else client.commit_transaction(20)


def test_a_view_over_markers_and_aborted_records_is_complete(cluster: Cluster, view: SqliteView) -> None:
    """correctness 23, 28: also where the topic ends with a marker."""
    topic, group = fresh_topic(cluster), fresh_group()
    marked(topic)
    staleness = Staleness(topic, view)

    def behind() -> int | None:
        staleness.look()
        return staleness.records

    with build(topic, view, group) as member:
        member.wait_committed({0: 20})
        assert content(view) == {"0": 0, "2": 2, "4": 4, "6": 6, "8": 8}
        assert set(lag(cluster, group, [topic.name]).values()) == {0}
        wait_until(lambda: behind() == 0, what="a view that is not behind")
        transaction(topic, ("last", 9))
        member.wait_committed({0: 22})
        wait_until(lambda: behind() == 0, what="a view that is not behind")
        assert content(view)["last"] == 9


@pytest.mark.parametrize("end", [pytest.param("commit", marks=pytest.mark.long), "abort"])
def test_a_view_beside_an_open_transaction_has_what_is_before_it(cluster: Cluster, view: SqliteView, end: str) -> None:
    """correctness 23: what comes after it waits too, and is there once it has ended."""
    topic, group = fresh_topic(cluster), fresh_group()
    transaction(topic, ("a", 1))
    opened = transaction(topic, ("b", 2), end="open")
    put(topic, 3, key="c")
    with build(topic, view, group) as member:
        member.wait_committed({0: 2})
        member.journal.wait(lambda: content(view), what="the record before it")
        assert content(view) == {"a": 1}
        assert sum(lag(cluster, group, [topic.name]).values()) == 2
        opened.commit_transaction(20) if end == "commit" else opened.abort_transaction(20)
        member.wait_committed({0: 5})
        assert content(view) == {"a": 1, "c": 3} | ({"b": 2} if end == "commit" else {})


def test_a_store_over_markers_and_an_open_transaction(cluster: Cluster) -> None:
    """correctness 23, 25: it keeps what it has, tells no record of what is open, and goes on when that has ended."""
    topic = store_topic(cluster, 1, value=int)
    marked(topic)
    with KeyValueStore(topic) as store:
        expected = {"0": 0, "2": 2, "4": 4, "6": 6, "8": 8}
        assert store.snapshot() == expected
        opened = transaction(topic, ("0", 100), end="open")
        put(topic, 200, key="2")
        assert store.snapshot() == expected
        opened.commit_transaction(20)
        wait_until(lambda: store.snapshot() == expected | {"0": 100, "2": 200}, what="both changes")


def test_a_reader_that_waits_for_an_open_transaction_says_so(cluster: Cluster) -> None:
    """correctness 23: not that the broker were away."""
    topic = fresh_topic(cluster, 2)
    put(topic, 1, partition=0)
    opened = transaction(topic, ("b", 2), end="open", partition=1)
    with Reader(topic) as reader, pytest.raises(ClusterUnreachable, match=r"open transaction .* partition 1"):
        reader.read_to_end(0.5)
    opened.abort_transaction(20)
    with Reader(topic) as reader:
        assert [record.value for record in reader.read_to_end()] == [1]
    assert sum(end_offsets(cluster, [topic.name]).values()) == 3


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("readers")
    yield lab
    lab._end(0)


SHIPPED = [(f"{number}", {"id": number}) for number in range(10)]


def test_a_verdict_over_markers_counts_what_is_committed(lab: Lab) -> None:
    """correctness 23: what was aborted took no effect, neither twice nor instead."""
    load = lab.load(lab.topic("orders", 1, Order), orders(10))
    load.wait()
    done = lab.topic("shipped", 1, Shipped)
    for end in ("abort", "commit", "abort"):
        transaction(done, *SHIPPED, end=end)
    verdict = lab.verdict(load, done, exactly_once=True)
    assert (verdict.result, verdict.sent, verdict.done) == ("valid", 10, 10)


def test_a_verdict_beside_an_open_transaction_is_unknown_until_it_ends(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 23: it names the transaction, and claims nothing."""
    load = lab.load(lab.topic("orders", 1, Order), orders(10))
    load.wait()
    done = lab.topic("shipped", 1, Shipped)
    opened = transaction(done, *SHIPPED, end="open")
    monkeypatch.setattr(evidence, "READ", 0.5)
    verdict = lab.verdict(load, done, exactly_once=True)
    assert verdict.result == "unknown"
    assert "open transaction" in str(verdict.reason)
    opened.commit_transaction(20)
    assert lab.verdict(load, done, exactly_once=True).result == "valid"
