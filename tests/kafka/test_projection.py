"""Views: what they hold after crashes, zombies, replays, bad records and databases that fail."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import TopicPartition
from consuming import Member, Process, committed, fresh_group, fresh_topic, put
from processes import wait_until
from view_member import numbers, projection

import labkit.patterns.projection as module
from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.kafka.lag import end_offsets, lag
from labkit.kafka.producer import Producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import StoreNotReady
from labkit.patterns.projection import Projection, Staleness
from labkit.patterns.views import (
    Batch,
    Change,
    PostgresView,
    SqliteView,
    View,
    ViewOutdated,
    ViewTakenBack,
    ViewUnavailable,
)


class Site(msgspec.Struct):
    version: int
    apps: list[str] = []


def apps_of(record: Record[Site]) -> list[tuple[str]]:
    return [(app,) for app in record.value.apps]


def site(key: str, version: int, *apps: str) -> tuple[str, Site]:
    return key, Site(version, list(apps))


def send(topic: Topic[Any], *sites: tuple[str, Site | None] | tuple[str, None, int]) -> None:
    """A third figure is the version of a tombstone."""
    for key, value, *version in sites:
        topic.send(value, key, {"version": str(version[0])} if version else None)
    topic.flush()


@pytest.fixture(params=["sqlite", "postgres"])
def view(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[View]:
    """A view of nobody yet."""
    columns, indexes = {"app": "text"}, ["app"]
    if request.param == "sqlite":
        made: View = SqliteView(tmp_path / "view.db", "apps", columns, indexes, key="site")
    else:
        dsn = request.getfixturevalue("postgres").dsn
        made = PostgresView(dsn, f"apps_{uuid.uuid4().hex[:8]}", columns, indexes, key="site")
    with made:
        yield made


# For tests of which the first tier needs one database: the file, or the one that locks rows rather than all of it.
IN_A_FILE = pytest.mark.parametrize("view", ["sqlite", pytest.param("postgres", marks=pytest.mark.long)], indirect=True)
IN_POSTGRES = pytest.mark.parametrize(
    "view", [pytest.param("sqlite", marks=pytest.mark.long), "postgres"], indirect=True
)


@pytest.fixture
def in_file(tmp_path: Path) -> Iterator[SqliteView]:
    with SqliteView(tmp_path / "view.db", "apps", {"app": "text"}, ["app"], key="site") as made:
        yield made


def build(view: View, topic: Topic[Any], group: str | None = None) -> Member:
    """A member that writes it."""
    return Member(Projection(topic, apps_of, view).consumer(group or fresh_group()))


def catch_up(member: Member, view: View, topic: Topic[Any]) -> None:
    """Wait until the view has all of the topic."""

    def behind() -> bool:
        try:
            return bool(stale(topic, view))
        except ViewUnavailable:
            return True

    member.journal.wait(lambda: not behind(), 30, "the view to have everything")


def stale(topic: Topic[Any], view: View) -> int | None:
    staleness = Staleness(topic, view)
    staleness.look()
    return staleness.records


# -- what a view holds -------------------------------------------------------------------------------------------------


def test_a_view_follows_creations_updates_and_deletions(cluster: Cluster, view: View) -> None:
    topic = fresh_topic(cluster, 2, Site)
    send(topic, site("a", 1, "stores", "bookings"), site("b", 1, "stores"), site("c", 1), site("d", 1, "events"))
    send(topic, site("a", 2, "bookings", "forum"), ("d", None, 2))
    with build(view, topic) as member:
        catch_up(member, view, topic)
        assert view.content() == {"a": [("bookings",), ("forum",)], "b": [("stores",)], "c": []}
        send(topic, site("c", 2, "forum"), ("b", None))
        catch_up(member, view, topic)
    assert view.rows("a") == [("bookings",), ("forum",)]
    assert view.rows("b") is view.rows("d") is view.rows("never") is None
    assert view.keys("app", "forum") == ["a", "c"]
    assert view.keys("app", "forum", after="a") == ["c"]
    assert view.keys("app", "forum", limit=1) == ["a"]
    assert view.count() == 3
    assert view.rejected() == []


def test_a_view_that_adds_up_counts_every_record_once(cluster: Cluster, view: View) -> None:
    """The same object again is another record: its rows come to those that are there, in one batch and in the next."""
    topic = fresh_topic(cluster, 1, Site)
    view.adds_up = True  # type: ignore[misc]
    for _ in range(2):
        send(topic, site("a", 1, "stores"), site("a", 1, "stores"), site("b", 2, "forum"), ("b", None, 3), site("c", 1))
    with build(view, topic) as member:
        catch_up(member, view, topic)
    once = {"a": [("stores",)] * 4, "b": [("forum",)] * 2, "c": []}
    assert view.content() == once
    with build(view, topic) as member:
        send(topic, site("c", 0, "events"))
        catch_up(member, view, topic)
    assert view.content() == once | {"c": [("events",)]}


def test_older_versions_neither_overwrite_nor_revive(cluster: Cluster, view: View) -> None:
    """correctness 29: neither in one batch nor in later ones, by another writer."""
    topic = fresh_topic(cluster, 1, Site)
    send(topic, site("a", 5, "new"), site("a", 4, "old"), site("b", 3, "gone"), ("b", None, 4), site("b", 3, "gone"))
    for _ in range(2):
        with build(view, topic) as member:
            catch_up(member, view, topic)
        assert view.content() == {"a": [("new",)]}
        send(topic, site("a", 3, "old"), ("a", None, 4), site("b", 3, "gone"), site("b", 4, "gone"))
    send(topic, ("a", None), site("a", 5, "again"))  # a tombstone without a version keeps the one that is there
    with build(view, topic) as member:
        catch_up(member, view, topic)
        assert view.content() == {}
        send(topic, site("a", 6, "back"), site("b", 5, "back"))
        catch_up(member, view, topic)
    assert view.content() == {"a": [("back",)], "b": [("back",)]}


def test_a_whole_topic_replayed_gives_the_same_view(cluster: Cluster, view: View) -> None:
    """correctness 29: whatever the order in which the records come again."""
    topic = fresh_topic(cluster, 1, Site)
    chance = random.Random(7)
    records: list[Any] = []
    for key, version in itertools.product("abcdefgh", range(1, 12)):
        gone = chance.random() < 0.3
        records.append((key, None, version) if gone else site(key, version, *chance.sample(["x", "y", "z"], 2)))
    send(topic, *records)
    with build(view, topic) as member:
        catch_up(member, view, topic)
        before = view.content()
        chance.shuffle(records)
        send(topic, *records)
        catch_up(member, view, topic)
    assert view.content() == before
    last = {key: value for key, value, *_ in sorted(records, key=lambda one: one[1].version if one[1] else one[2])}
    assert set(before) == {key for key, value in last.items() if value is not None}


class Untellable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_what_cannot_be_projected_is_set_aside_with_its_place(cluster: Cluster, view: View) -> None:
    """A function that raises, poison, no key, no version, rows of the wrong form or that the database refuses."""
    topic = fresh_topic(cluster, 1, Site)

    def rows(record: Record[Site]) -> Any:
        match record.value.apps:
            case ["raise"]:
                raise ZeroDivisionError("by zero")
            case ["shape"]:
                return [("one", "two")]
            case ["value"]:
                return [({"no": "text"},)]
            case ["surrogate"]:
                return [("half a character: \ud83d",)]
            case ["quote"]:
                raise ValueError("half a character: \ud83d")
            case ["mute"]:
                raise Untellable
        return apps_of(record)

    send(topic, site("a", 1, "stores"), site("b", 1, "raise"))
    put(topic, b"{", key="c")
    put(topic, {"version": 1, "apps": []})
    send(topic, site("d", -1, "stores"), site("e", 1, "shape"), site("f", 1, "value"), site("g", 1, "stores"))
    topic.send(None, "a", {"version": "many"})
    send(topic, site("h", 1, "forum"), site("i", 1, "surrogate"), site("j", 1, "quote"), site("k", 1, "forum"))
    send(topic, site("l", 1, "mute"))
    with Member(Projection(topic, rows, view).consumer(fresh_group())) as member:
        catch_up(member, view, topic)
    assert view.content() == {"a": [("stores",)], "g": [("stores",)], "h": [("forum",)], "k": [("forum",)]}
    rejected = view.rejected()
    assert [(name, partition, offset) for name, partition, offset, _ in rejected] == [
        (topic.name, 0, offset) for offset in (1, 2, 3, 4, 5, 6, 8, 10, 11, 13)
    ]
    for (*_, reason), said in zip(
        rejected,
        ("by zero", "not decode", "no key", "-1", "no row of app", "", "many", "Unicode", "character: ?", "Untellable"),
        strict=True,
    ):
        assert said in reason, reason


def test_a_value_of_another_type_than_the_column_is_set_aside(cluster: Cluster, dsn: str) -> None:
    """PostgreSQL calls it a mistake in the statement. And nobody finds anything by such a value."""
    topic = fresh_topic(cluster, 1, Any)
    with PostgresView(dsn, "numbers", {"value": "bigint"}, ["value"]) as view:
        for key, value in {"a": 1, "b": True, "c": [1], "d": 2, "e": "x"}.items():
            put(topic, value, key=key)
        made = Projection(topic, lambda record: [(record.value,)], view, version=lambda record: None)
        with Member(made.consumer(fresh_group())) as member:
            catch_up(member, view, topic)
        assert view.content() == {"a": [(1,)], "d": [(2,)]}
        assert [offset for _, _, offset, _ in view.rejected()] == [1, 2, 4]
        assert view.keys("value", "2") == ["d"]
        for value in ("abc", str(2**70)):
            with pytest.raises(LabkitError, match="has no such value") as refused:
                view.keys("value", value)
            assert not isinstance(refused.value, ViewUnavailable)
        assert view.keys("value", 1) == ["a"]


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("order", {"value": "bigint"}),
        ("numbers", {"end": "bigint"}),
        ("numbers", {"value": "no_such_type"}),
        ("view", {"value": "bigint"}),
    ],
)
def test_a_view_that_postgres_cannot_make_ends_its_writer(
    cluster: Cluster, dsn: str, table: str, columns: dict[str, str]
) -> None:
    topic = fresh_topic(cluster, 1, Any)
    view = PostgresView(dsn, table, columns)
    with view, Member(Projection(topic, list, view).consumer(fresh_group())) as member:
        error = member.ends()
    assert type(error) is LabkitError
    assert f"view {table} cannot be made" in str(error)


def test_what_a_projection_asks_and_that_is_not_there_yet_is_asked_again(cluster: Cluster, in_file: SqliteView) -> None:
    """A store that is still loading, say: nothing is wrong with the records."""
    topic, asked = fresh_topic(cluster, 1, Site), [0]

    def rows(record: Record[Site]) -> Any:
        asked[0] += 1
        if asked[0] == 2:
            raise StoreNotReady("not loaded")
        return apps_of(record)

    send(topic, site("a", 1, "stores"), site("b", 1, "forum"), site("c", 1, "stores"))
    with Member(Projection(topic, rows, in_file).consumer(fresh_group())) as member:
        catch_up(member, in_file, topic)
    assert set(in_file.content()) == {"a", "b", "c"}
    assert in_file.rejected() == []


@IN_POSTGRES
def test_a_key_that_is_in_two_partitions_has_its_newest_rows_once(view: View) -> None:
    """As after partitions were added: two writers, each with its partition, and the newer version is not there yet."""

    def batch(partition: int, version: int) -> Batch:
        return Batch(partition, 0, 1, 0.0, [(0, Change("a", version, [(f"v{version}",)]))], [])

    other = copy(view)
    for one in (view, other):
        one.begin("topic", "id", [0, 1])
    newer = threading.Thread(target=other.apply, args=(batch(1, 6),))
    with view._transaction() as database:
        view._put(database, batch(0, 5), view._claim(database, batch(0, 5)))
        newer.start()
        newer.join(1)  # it has to wait; if it did not, it would be done by now
    newer.join(20)
    assert not newer.is_alive()
    assert view.content() == {"a": [("v6",)]}
    other.close()


@IN_A_FILE
def test_partitions_added_under_a_view_are_projected_by_the_writer_that_runs(cluster: Cluster, view: View) -> None:
    """Keys move. An older version that comes later, from the partition of before, changes nothing; how stale the view
    is counts the new partitions too."""
    topic = fresh_topic(cluster, 1, Site)
    keys = "abcdefgh"
    send(topic, *(site(key, 1, "stores") for key in keys))
    with build(view, topic) as member:
        catch_up(member, view, topic)
        staleness = Staleness(topic, view)
        staleness.look()
        cluster.add_partitions(topic.name, 3)
        sender = Producer(cluster)  # one that knows the topic as it is now
        for key in keys:
            sender.send(topic.name, encode(Site(3, ["forum"])), key, partition=1 + ord(key) % 2)
        sender.send(topic.name, None, "a", {"version": "4"}, partition=1)
        sender.flush()
        staleness.look()
        assert staleness.records is not None
        catch_up(member, view, topic)
        for key in keys:
            sender.send(topic.name, encode(Site(2, ["events"])), key, partition=0)
        sender.flush()
        catch_up(member, view, topic)
        assert {number for _, number in member.journal.assigned()} == {0, 1, 2}
    assert view.content() == {key: [("forum",)] for key in keys[1:]}
    assert {number: mark.next_offset for number, mark in view.checkpoints(topic.name).items()} == {0: 16, 1: 5, 2: 4}
    sender.send(topic.name, encode(Site(5, ["stores"])), "b", partition=2)
    sender.flush()
    staleness.look()
    assert staleness.records == 1  # nobody writes the view now


def test_a_view_is_made_of_one_topic(cluster: Cluster, in_file: SqliteView) -> None:
    in_file.begin("one", "id", [0])
    with pytest.raises(LabkitError, match="is made of topic one, not of two: make a view for each topic"):
        in_file.begin("two", "id", [0])


def test_a_view_travels_without_its_connections(in_file: SqliteView, cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Site)
    send(topic, site("a", 1, "stores"))
    with build(in_file, topic) as member:
        catch_up(member, in_file, topic)
    with pickle.loads(pickle.dumps(in_file)) as copy:
        assert copy.rows("a") == [("stores",)]


@pytest.mark.parametrize("name", ["apps; drop table x", "Apps", "", "1st"])
def test_names_that_are_no_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LabkitError, match="cannot be a name"):
        SqliteView(tmp_path / "view.db", name, {"app": "text"})
    with pytest.raises(LabkitError, match="cannot be a name"):
        SqliteView(tmp_path / "view.db", "apps", {name: "text"})


def test_a_batch_that_no_statement_can_hold_is_refused(in_file: SqliteView, cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Site)
    for batch in (0, 100_000):
        with pytest.raises(LabkitError, match="1 to 10,000"):
            Projection(topic, apps_of, in_file).consumer(batch=batch)


# -- offsets in the transaction of the rows ----------------------------------------------------------------------------


class Writer(Process):
    """A process that writes the view `numbers` and stops where it is told to: {"before-2": "kill"}."""

    script = "view_member.py"

    def __init__(self, topic: Topic[Any], group: str, where: Any, stops: dict[str, str], batch: int = 10) -> None:
        super().__init__(topic, group, where=str(where), stops=stops, batch=batch)

    def wait_said(self, step: str) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: any(line["step"] == step for line in self.lines), 20):
                pytest.fail(f"never {step}: {self.lines} {self.stderr}")

    def go_on(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()


def numbered(topic: Topic[Any], *values: int) -> None:
    """Each under a key of its own."""
    for value in values:
        put(topic, value, key=str(value), partition=value % topic.partitions)


def expected(count: int) -> dict[str, list[tuple[int]]]:
    """Each written once."""
    return {str(value): [(value,)] for value in range(count)}


def finish(topic: Topic[Any], view: View, group: str | None = None) -> None:
    """Let a writer that nothing disturbs do the rest."""
    with Member(projection(topic, view).consumer(group or fresh_group())) as member:
        catch_up(member, view, topic)


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgres", marks=pytest.mark.long)])
def test_killed_at_any_point_of_a_transaction_nothing_is_lost_or_doubled(
    cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest, database: str
) -> None:
    """correctness 28: kill -9 before, between, and after; the next writer goes on from the view's offset."""
    where = str(tmp_path / "view.db") if database == "sqlite" else request.getfixturevalue("dsn")
    topic = fresh_topic(cluster)
    numbered(topic, *range(100))
    view, done = numbers(where), 0
    for point in ("before", "claimed", "written", "after"):
        with Writer(topic, fresh_group(), where, {f"{point}-3": "kill"}) as writer:
            assert writer.ends() == -9
        assert done < view.count() < 100
        done = view.count()
    with view:
        finish(topic, view)
        assert view.content() == expected(100)


def test_a_writer_goes_on_where_the_view_is_not_where_its_group_is(cluster: Cluster, tmp_path: Path) -> None:
    """correctness 28: a view that was deleted is built from the beginning by the same group, whose lag tells so."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    numbered(topic, *range(20))
    with numbers(str(tmp_path / "one.db")) as view:
        finish(topic, view, group)
        assert committed(topic, group) == {0: 10, 1: 10}
    with numbers(str(tmp_path / "two.db")) as view:
        finish(topic, view, group)
        assert view.content() == expected(20)
    assert sum(lag(cluster, group, [topic.name]).values()) == 0


@pytest.mark.long  # a session long; one is held up below
def test_a_frozen_writer_that_wakes_up_when_another_has_taken_over_changes_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    """correctness 28: of its batch, read before, the offset leaves nothing to be written."""
    topic, group, where = fresh_topic(cluster), fresh_group(), tmp_path / "view.db"
    numbered(topic, *range(40))
    with Writer(topic, group, where, {"before-3": "wait", "after-3": "wait"}) as zombie:
        zombie.wait_said("waiting")
        zombie.freeze()
        with numbers(str(where)) as view:
            held = view.count()
            assert 0 < held < 40
            with Member(projection(topic, view).consumer(group)) as member:
                catch_up(member, view, topic)
                assert view.content() == expected(40)
                zombie.thaw()
                zombie.go_on()
                done = {"step": "waiting", "subject": "after"}
                wait_until(lambda: done in zombie.lines, 10, "its old batch to be done")
                assert view.content() == expected(40)
                zombie.go_on()
                numbered(topic, 40, 41)
                catch_up(member, view, topic)
                assert view.content() == expected(42)


@pytest.mark.long
def test_a_writer_frozen_in_a_transaction_keeps_others_from_postgres_for_seconds_only(
    cluster: Cluster, dsn: str
) -> None:
    """The server ends its transaction; awake again, it finds that others have done its work."""
    topic, view = fresh_topic(cluster), numbers(dsn)
    numbered(topic, *range(40))
    stops = {"claimed-2": "wait", "after-3": "wait"}
    with view, Writer(topic, fresh_group(), dsn, stops) as zombie:
        zombie.wait_said("waiting")
        zombie.freeze()
        held = view.count()
        assert 0 < held < 40
        with Member(projection(topic, view).consumer(fresh_group())) as member:
            catch_up(member, view, topic)
        assert view.content() == expected(40)
        zombie.thaw()
        zombie.go_on()
        wait_until(lambda: {"step": "waiting", "subject": "after"} in zombie.lines, 10, "its next batch to be done")
        assert view.content() == expected(40)


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_worker_held_while_its_partition_goes_and_comes_back_changes_nothing(
    cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest, database: str
) -> None:
    """correctness 28: the same process is told the offset of the other writer while an old batch is still in hand."""
    where = str(tmp_path / "view.db") if database == "sqlite" else request.getfixturevalue("postgres").dsn
    topic, mine, others = fresh_topic(cluster), numbers(where), numbers(where)
    mine.table = others.table = f"numbers_{uuid.uuid4().hex[:8]}"
    numbered(topic, *range(50))
    with Reader(topic) as reader:
        records = list(reader.read_to_end())
    held, go_on = threading.Event(), threading.Event()

    def rows(record: Record[int]) -> list[tuple[int]]:
        if record.value == 10:
            held.set()
            go_on.wait(20)
        return [(record.value,)]

    slow = Projection(topic, rows, mine, version=lambda record: None)
    with mine, others:
        slow.positions([(topic.name, 0)])
        slow.write(records[:10])
        worker = threading.Thread(target=slow.write, args=(records[10:20],))
        worker.start()
        assert held.wait(10)
        finish(topic, others)
        assert slow.positions([(topic.name, 0)]) == {(topic.name, 0): 50}
        go_on.set()
        worker.join(10)
        assert not worker.is_alive()
        assert mine.checkpoints(topic.name)[0].next_offset == 50
        assert mine.content() == expected(50)


def test_two_groups_on_one_view_write_each_record_once(cluster: Cluster, tmp_path: Path) -> None:
    """A mistake in the set-up, and the worst of zombies: both are alive. The offset alone decides."""
    topic = fresh_topic(cluster, 2)
    numbered(topic, *range(200))
    with numbers(str(tmp_path / "view.db")) as one, numbers(str(tmp_path / "view.db")) as other:
        members = [Member(projection(topic, view).consumer(fresh_group(), batch=5)) for view in (one, other)]
        with members[0], members[1]:
            catch_up(members[0], one, topic)
        assert one.content() == expected(200)


@IN_A_FILE
def test_a_topic_made_anew_demands_a_rebuild(cluster: Cluster, view: View) -> None:
    """correctness 28: the offsets of the topic that was deleted say nothing of the one of its name."""
    topic = fresh_topic(cluster, 1, Site)
    send(topic, site("a", 1, "stores"), site("b", 1, "stores"))
    with build(view, topic) as member:
        catch_up(member, view, topic)
    cluster.delete_topics([topic.name])
    wait_until(lambda: topic.name not in cluster.topics(), 10, "the end of the topic")
    topic.create()
    send(topic, site("c", 1, "forum"))
    with build(view, topic) as member:
        error = member.ends()
    assert isinstance(error, ViewOutdated)
    assert "generation=2" in str(error)
    with view.next_generation() as beside, build(beside, topic) as member:
        member.wait_committed({0: 1})
        beside.promote()
    assert view.content() == {"c": [("forum",)]}


@IN_A_FILE
def test_a_view_that_is_beyond_the_end_of_its_topic_demands_a_rebuild(cluster: Cluster, view: View) -> None:
    """correctness 28, 32: the topic has lost records that the view has; those that come in their place would be passed
    over."""
    topic = fresh_topic(cluster, 1, Site)
    view.begin(topic.name, cluster.topic_id(topic.name), [0])
    view.apply(Batch(0, 0, 100, 0.0, [], []))
    send(topic, site("a", 1, "stores"))
    with pytest.raises(ViewOutdated, match="up to offset 100"):
        stale(topic, view)
    with build(view, topic) as member:
        error = member.ends()
    assert isinstance(error, LabkitError)
    assert f"{topic.name}/0 from offset 100 on" in str(error)
    with view.next_generation() as beside, build(beside, topic) as member:
        member.wait_committed({0: 1})
        with pytest.raises(LabkitError, match="force=True"):
            beside.promote()
        beside.promote(force=True)
    assert view.content() == {"a": [("stores",)]}
    assert stale(topic, view) == 0


def test_how_stale_a_view_of_a_topic_made_anew_is_cannot_be_told(cluster: Cluster, in_file: SqliteView) -> None:
    """Its offsets are those of the topic that was deleted: beyond the end of the new one, which it has nothing of."""
    topic = fresh_topic(cluster, 1, Site)
    send(topic, site("a", 1, "stores"), site("b", 1, "stores"))
    with build(in_file, topic) as member:
        catch_up(member, in_file, topic)
    staleness = Staleness(topic, in_file)
    staleness.look()
    assert staleness.records == 0
    cluster.delete_topics([topic.name])
    wait_until(lambda: topic.name not in cluster.topics(), 10, "the end of the topic")
    topic.create()
    send(topic, site("c", 1, "forum"))
    with pytest.raises(ViewOutdated, match="made of another topic"):
        staleness.look()
    assert staleness.records is None
    before = staleness.seconds
    assert before is not None
    with in_file.next_generation() as beside, build(beside, topic) as member:
        member.wait_committed({0: 1})
        beside.promote()
    staleness.look()
    assert staleness.records == 0
    assert staleness.seconds is not None
    assert staleness.seconds < before


# -- databases that fail -----------------------------------------------------------------------------------------------


def test_a_locked_file_is_waited_for(cluster: Cluster, in_file: SqliteView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.patterns.views.sqlite.BUSY", 0.2)
    topic = fresh_topic(cluster, 1, Site)
    send(topic, site("a", 1, "stores"))
    with build(in_file, topic) as member, closing(sqlite3.connect(in_file.path, isolation_level=None)) as other:
        catch_up(member, in_file, topic)
        other.execute("begin immediate")
        send(topic, site("b", 1, "stores"))
        failure = member.journal.wait_for(Step.FAILED)[0]
        assert isinstance(failure.error, ViewUnavailable)
        assert in_file.rows("a") == [("stores",)]  # readers do not notice
        other.execute("rollback")
        catch_up(member, in_file, topic)
    assert set(in_file.content()) == {"a", "b"}


def test_a_file_that_is_locked_when_partitions_come_is_waited_for(
    cluster: Cluster, in_file: SqliteView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labkit.patterns.views.sqlite.BUSY", 0.2)
    topic = fresh_topic(cluster, 1, Site)
    send(topic, site("a", 1, "stores"))
    tries: list[Any] = []
    consumer = Projection(topic, apps_of, in_file).consumer(fresh_group())
    asked = consumer.positions
    assert asked is not None

    def counted(partitions: Any) -> Any:
        tries.append(partitions)
        return asked(partitions)

    with closing(sqlite3.connect(in_file.path, isolation_level=None)) as other:
        other.execute("begin immediate")
        with Member(replace(consumer, positions=counted)) as member:
            member.journal.wait(lambda: len(tries) > 1)
            other.execute("rollback")
            catch_up(member, in_file, topic)
    assert set(in_file.content()) == {"a"}


def test_a_deleted_file_ends_the_writer_and_the_next_one_builds_it_anew(cluster: Cluster, in_file: SqliteView) -> None:
    """What is written to a file that was deleted would be seen by nobody."""
    topic, group = fresh_topic(cluster, 1, Site), fresh_group()
    send(topic, site("a", 1, "stores"))
    with build(in_file, topic, group) as member:
        catch_up(member, in_file, topic)
        for path in Path(in_file.path).parent.glob("view.db*"):
            path.unlink()
        with pytest.raises(ViewUnavailable):
            in_file.rows("a")
        send(topic, site("b", 1, "stores"))
        assert isinstance(member.ends(), ViewTakenBack)
    with build(in_file, topic, group) as member:
        catch_up(member, in_file, topic)
    assert set(in_file.content()) == {"a", "b"}


def test_a_view_of_an_older_form_is_built_beside_and_switched_to(cluster: Cluster, in_file: SqliteView) -> None:
    topic = fresh_topic(cluster, 1, Site)
    send(topic, site("a", 1, "stores"))
    with build(in_file, topic) as member:
        catch_up(member, in_file, topic)
    newer = SqliteView(in_file.path, "apps", {"app": "text", "version": "bigint"}, ["app"], key="site")

    def rows(record: Record[Site]) -> list[tuple[str, int]]:
        return [(app, record.value.version) for app in record.value.apps]

    with Member(Projection(topic, rows, newer).consumer(fresh_group())) as member:
        error = member.ends()
    assert isinstance(error, ViewOutdated)
    assert "generation=2" in str(error)
    with newer.next_generation() as newest, Member(Projection(topic, rows, newest).consumer(fresh_group())) as member:
        member.wait_committed({0: 1})
        assert in_file.rows("a") == [("stores",)]
        newest.promote()
        assert newest.rows("a") == [("stores", 1)]


def test_a_table_that_is_none_of_ours_is_left_alone(in_file: SqliteView) -> None:
    with closing(sqlite3.connect(in_file.path)) as other:
        other.execute("create table apps_1 (precious text)")
    with pytest.raises(ViewOutdated, match="another name"):
        in_file.begin("topic", "id", [0])
    with closing(sqlite3.connect(in_file.path)) as other:
        assert other.execute("select name from sqlite_master").fetchall() == [("apps_1",)]


def test_a_file_that_is_no_database_is_told(in_file: SqliteView) -> None:
    Path(in_file.path).write_text("something else, and long enough for a header of a database " * 10)
    with pytest.raises(ViewUnavailable):
        in_file.begin("topic", "id", [0])


def test_no_connection_is_left_of_a_try_that_failed(in_file: SqliteView, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that waits for its file tries for as long as that takes."""
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noted(*arguments: Any, **named: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **named))
        return opened[-1]

    Path(in_file.path).write_text("something else, and long enough for a header of a database " * 10)
    monkeypatch.setattr(sqlite3, "connect", noted)
    for _ in range(3):
        with pytest.raises(ViewUnavailable):
            in_file.begin("topic", "id", [0])
    assert len(opened) == 3
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError):
            connection.execute("select 1")


def test_a_connection_that_a_server_drops_at_once_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that is shutting down: it accepts, and answers nothing."""
    import psycopg

    class Dropped:
        closed = False

        def execute(self, sql: str) -> None:
            raise psycopg.OperationalError("terminating connection")

        def close(self) -> None:
            self.closed = True

    dropped = Dropped()
    monkeypatch.setattr(psycopg, "connect", lambda *_, **__: dropped)
    with pytest.raises(ViewUnavailable, match="terminating connection"):
        PostgresView("host=127.0.0.1", "apps", {"app": "text"}).rows("a")
    assert dropped.closed


class Small(SqliteView):
    """A disk with room for this many pages: SQLite answers as it does when the real one is full."""

    pages = 40

    def _writable(self) -> Any:
        writer = super()._writable()
        writer.execute(f"pragma max_page_count = {self.pages}")
        return writer


def test_a_full_disk_loses_nothing_and_is_gone_on_from(cluster: Cluster, tmp_path: Path) -> None:
    topic = fresh_topic(cluster, 1, Site)
    many = [site(f"site-{number}", 1, "stores" * 50) for number in range(300)]
    send(topic, *many)
    with (
        Small(tmp_path / "view.db", "apps", {"app": "text"}, ["app"], key="site") as view,
        build(view, topic) as member,
    ):
        failure = member.journal.wait_for(Step.FAILED)[0]
        assert isinstance(failure.error, sqlite3.OperationalError)
        marks = view.checkpoints(topic.name)
        assert (marks[0].next_offset if marks else 0) == len(view.content())  # all or nothing
        view.pages = 100_000
        catch_up(member, view, topic)
        assert len(view.content()) == 300
        assert view.rejected() == []


@pytest.mark.long  # notebook 01 kills one
def test_a_postgres_killed_while_writing_loses_and_doubles_nothing(cluster: Cluster, postgres: Any) -> None:
    topic = fresh_topic(cluster, 2)
    numbered(topic, *range(100))
    view = numbers(postgres.dsn)
    view.table = f"numbers_{uuid.uuid4().hex[:8]}"
    with Member(projection(topic, view).consumer(fresh_group(), batch=10)) as member:
        member.journal.wait(lambda: len(member.journal.of(Step.HANDLED)) >= 50)
        postgres.kill()
        try:
            for value in range(100, 200):
                put(topic, value, key=str(value), partition=value % 2)
            member.journal.wait_for(Step.FAILED)
            with pytest.raises(ViewUnavailable):  # which the loop waits for, if partitions come now
                projection(topic, view).positions([])
        finally:
            postgres.restart()
        catch_up(member, view, topic)
    assert view.content() == expected(200)
    view.close()


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_view_that_is_not_there_yet_is_told_and_not_made(in_file: SqliteView) -> None:
    with pytest.raises(ViewUnavailable):
        in_file.rows("a")
    assert not os.path.exists(in_file.path)
    sqlite3.connect(in_file.path).close()
    with pytest.raises(ViewUnavailable):
        in_file.keys("app", "stores")
    with pytest.raises(LabkitError, match="no index by 'site'"):
        in_file.keys("site", "a")


def test_a_rebuild_beside_is_switched_to_without_a_failed_read(cluster: Cluster, view: View) -> None:
    """Four threads read all the time: what they see is the one view or the other."""
    topic = fresh_topic(cluster, 2, Site)
    send(topic, *(site(f"site-{number}", 1, "stores", "forum") for number in range(50)))
    with build(view, topic) as member:
        catch_up(member, view, topic)
    seen: list[Any] = []
    stop = threading.Event()

    def read(reader: View) -> None:
        with reader:
            while not stop.is_set():
                try:
                    seen.append(tuple(reader.rows("site-7") or ()))
                except Exception as error:
                    seen.append(error)

    threads = [threading.Thread(target=read, args=(pickle.loads(pickle.dumps(view)),)) for _ in range(4)]
    for thread in threads:
        thread.start()

    def shouted(record: Record[Site]) -> list[tuple[str]]:
        return [(app.upper(),) for app in record.value.apps]

    with view.next_generation() as beside, Member(Projection(topic, shouted, beside).consumer(fresh_group())) as member:
        member.journal.wait(lambda: sum(committed(topic, member.consumer.group).values()) == 50)
        beside.promote()
    wait_until(lambda: seen[-1] == (("STORES",), ("FORUM",)), 5, "the rebuilt view to be read")
    stop.set()
    for thread in threads:
        thread.join()
    assert set(seen) == {(("stores",), ("forum",)), (("STORES",), ("FORUM",))}
    assert stale(topic, view) == 0  # of the generation that is shown


@IN_A_FILE
def test_a_generation_that_lacks_what_readers_have_is_not_switched_to(cluster: Cluster, view: View) -> None:
    topic = fresh_topic(cluster, 1, Site)
    send(topic, site("a", 1, "stores"), site("b", 1, "stores"))
    with build(view, topic) as member:
        catch_up(member, view, topic)
    with view.next_generation() as beside:
        with pytest.raises(LabkitError, match=f"{topic.name}/0 by 2"):
            beside.promote()
        assert set(view.content()) == {"a", "b"}
        with build(beside, topic) as member:
            member.wait_committed({0: 2})
        beside.promote()
    assert set(view.content()) == {"a", "b"}


def test_staleness_in_records_and_seconds(cluster: Cluster, in_file: SqliteView) -> None:
    topic = fresh_topic(cluster, 2, Site)
    send(topic, site("a", 1, "stores"), site("b", 1, "stores"), site("c", 1, "stores"))
    staleness = Staleness(topic, in_file)
    with pytest.raises(ViewUnavailable):
        staleness.look()
    assert staleness.records is staleness.seconds is None
    with build(in_file, topic) as member:
        catch_up(member, in_file, topic)
        looked = time.time()
        staleness.look()
        assert staleness.records == 0
        assert staleness.seconds is not None
        assert staleness.seconds <= time.time() - looked
    send(topic, site("a", 2, "stores"), site("b", 2, "stores"))
    staleness.look()
    assert staleness.records == 2
    began = staleness.seconds
    assert began is not None
    wait_until(lambda: (staleness.seconds or 0) > began + 0.3, 2, "age without a look")
    staleness.look()
    assert staleness.seconds > began + 0.3
    late = Staleness(topic, in_file)  # never saw it complete: what is missing is newer than what is there
    late.look()
    assert late.records == 2
    assert late.seconds is not None
    assert late.seconds >= staleness.seconds - 1
    with build(in_file, topic) as member:
        catch_up(member, in_file, topic)
        looked = time.time()
        staleness.look()
    assert staleness.records == 0
    assert staleness.seconds <= time.time() - looked


def test_what_was_deleted_from_the_topic_is_not_lacking(cluster: Cluster, in_file: SqliteView) -> None:
    topic = fresh_topic(cluster, 2, Site)
    send(topic, *(site(name, 1, "stores") for name in "abcdef"))
    ends = {number: end for (_, number), end in end_offsets(cluster, [topic.name]).items()}
    trim = [TopicPartition(topic.name, 0, ends[0] - 1), TopicPartition(topic.name, 1, ends[1])]
    for future in admin(cluster).delete_records(trim).values():
        future.result()
    in_file.begin(topic.name, cluster.topic_id(topic.name), [])
    assert stale(topic, in_file) == 1
    with build(in_file, topic) as member:
        catch_up(member, in_file, topic)
    assert len(in_file.content()) == 1
    assert set(in_file.checkpoints(topic.name)) == {0}
    assert stale(topic, in_file) == 0


def test_how_far_a_view_is_behind_is_unknown_while_kafka_is_away(
    cluster: Cluster, in_file: SqliteView, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = fresh_topic(cluster, 1, Site)
    in_file.begin(topic.name, cluster.topic_id(topic.name), [])
    staleness = Staleness(topic, in_file)
    staleness.look()
    assert staleness.records == 0

    def away(*_: object) -> None:
        raise ClusterUnreachable("no answer")  # as after ten seconds without one

    monkeypatch.setattr(module, "end_offsets", away)
    with pytest.raises(ClusterUnreachable):
        staleness.look()
    assert staleness.records is None
    assert staleness.seconds is not None
    assert staleness.seconds > 0


def test_nothing_is_known_of_a_topic_that_is_not_there(cluster: Cluster, in_file: SqliteView) -> None:
    topic = fresh_topic(cluster, 1, Site)
    in_file.begin(topic.name, cluster.topic_id(topic.name), [])
    staleness = Staleness(topic, in_file)
    staleness.look()
    cluster.delete_topics([topic.name])
    with pytest.raises(ClusterUnreachable, match="is not listed"):
        staleness.look()
    assert staleness.records is None
