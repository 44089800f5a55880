"""Kafka Connect with a real worker: rows of a PostgreSQL table, then their changes, exactly once over every crash."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, pairwise
from types import SimpleNamespace
from typing import Any

import psutil
import psycopg
import pytest
from confluent_kafka import Producer
from consuming import fresh_topic, put
from processes import wait_until

from labkit import Lab, capture, mirror
from labkit.kafka.cluster import Cluster
from labkit.kafka.effects import Sent
from labkit.kafka.errors import LabkitError, TopicMissing, Unavailable
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.lab import runs
from labkit.lab.faults.kafka_connect import Connect
from labkit.lab.faults.target import Target
from labkit.runtime import kafka_connect, postgres, replication_slots
from labkit.runtime.broker import free_ports
from labkit.runtime.connectors import Connector, slot_name
from labkit.runtime.kafka_connect import KafkaConnect
from labkit.runtime.postgres import Postgres
from labkit.runtime.private_broker import PrivateBroker
from labkit.runtime.server import ServerState
from labkit.runtime.which_kafka import Connection

ROWS = 200


@pytest.fixture(scope="module")
def lab(connection: Connection) -> Iterator[Lab]:
    with Lab("connect") as lab:
        yield lab


@pytest.fixture(scope="module")
def worker(lab: Lab) -> Connect:
    return lab.connect()


@pytest.fixture
def connect(worker: Connect) -> Iterator[Connect]:
    """The module's worker, up and without connectors of other tests."""
    if worker.state is not ServerState.RUNNING:
        worker.recover()
    yield worker
    if worker.state is not ServerState.RUNNING:
        worker.recover()
    for name in worker.status().index:
        worker.stop(name)


@pytest.fixture
def table(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A database with a table `things` of 200 rows, each in its version 1."""
    with psycopg.connect(dsn, autocommit=True) as database:
        database.execute("create table things (id int primary key, version int not null)")
        database.execute("insert into things select n, 1 from generate_series(1, %s) n", (ROWS,))
        yield database


class Changes:
    """Changes rows one by one, from a thread, until it is told to end; `made` are the versions that rows have had. It
    does what clients do when their database is away: it asks again."""

    def __init__(self, dsn: str) -> None:
        self.made = [(str(number), 1) for number in range(1, ROWS + 1)]
        self._dsn, self._stop = dsn, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> list[tuple[str, int]]:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.made

    def _run(self) -> None:
        client: psycopg.Connection[Any] | None = None
        rows = iter([(number, version) for version in range(2, 100) for number in range(1, ROWS + 1)])
        number, version = next(rows)
        while not self._stop.wait(0.004):
            try:
                if client is None or client.broken:
                    client = psycopg.connect(self._dsn, autocommit=True)
                # Not twice, if it was killed between the commit and its answer.
                changed = "update things set version = %s where id = %s and version < %s"
                client.execute(changed, (version, number, version))
                self.made.append((str(number), version))
                number, version = next(rows)
            except psycopg.OperationalError:
                continue
        if client is not None:
            client.close()


class Seen:
    """Key and version of every event in a topic so far, tombstones and deletions left out."""

    def __init__(self, topic: Topic[Any]) -> None:
        self._reader = Reader(topic)
        self.found: list[tuple[str | None, int]] = []

    def look(self) -> list[tuple[str | None, int]]:
        events = [record for record in self._reader.poll(0.02) if record.value and record.value["after"]]
        self.found += [(event.key, event.value["after"]["version"]) for event in events]
        return self.found

    def more(self, count: int) -> None:
        wanted = len(self.found) + count
        wait_until(lambda: len(self.look()) >= wanted, 60, f"{count} more events in the topic")

    def close(self) -> None:
        self._reader.close()


@contextmanager
def captured(connect: Connect | KafkaConnect, dsn: str, topic: Topic[Any]) -> Iterator[Seen]:
    """Rows change and are captured while something is done; then each is there once, in each of its versions, in
    order."""
    connect.start(capture(dsn, "things", topic))
    changes = Changes(dsn)
    with closing(Seen(topic)) as seen:
        try:
            seen.more(ROWS + 50)
            yield seen
            reached = len(changes.made)
            wait_until(lambda: len(changes.made) > reached + 50, 30, "changes after that")
        finally:
            made = changes.end()
        # Of both partitions: after an outage one may be read before the other.
        wait_until(lambda: made[-1] in seen.look() and len(seen.found) >= len(made), 60, "all changes")
        assert Counter(seen.found) == Counter(made)
        of_each: dict[str | None, list[int]] = {}
        for key, version in seen.found:
            of_each.setdefault(key, []).append(version)
        assert all(before < after for each in of_each.values() for before, after in pairwise(each))


def leave_open(cluster: Cluster, group: str, connector: str) -> None:
    """What a kill at the worst moment leaves: a transaction of the connector's task that is neither committed nor
    aborted, with offsets in it."""
    settings = {"transactional.id": f"{group}-{connector}-0", "transaction.timeout.ms": 600_000}
    client = Producer(cluster.config(settings))
    client.init_transactions(30)
    client.begin_transaction()
    client.produce(f"{group}-offsets", b"not committed", b"not committed")
    assert client.flush(30) == 0


# -- What is captured


@pytest.mark.usefixtures("table")
def test_rows_then_changes_are_captured_exactly_once_though_the_worker_is_killed(
    lab: Lab, connect: Connect, dsn: str
) -> None:
    topic = lab.topic("killed", 2)
    with captured(connect, dsn, topic):
        connect.kill()
        assert connect.status_line() == "Kafka Connect down"
        verdict = lab.verdict([Sent("1", "1", 0)], topic, by=lambda event: event["after"]["id"])
        assert verdict.reason == "Kafka Connect is down: recover it first"
        assert list(connect.status().state) == ["unknown"]
        with pytest.raises(LabkitError, match="cannot start a connector: Kafka Connect is down: recover it first"):
            connect.start(capture(dsn, "things", topic))
        leave_open(lab.cluster, f"{lab.run.prefix}connect", "capture-killed")
        connect.recover()
    name = "capture-killed"
    connect.start(capture(dsn, "things", topic))  # or a cell could not run twice
    assert connect.status().loc[name].tolist() == ["running", "1 of 1", ""]
    assert 50e6 < connect.memory < 400e6
    assert repr(connect).startswith(f"Kafka Connect: {name} running · ")
    connect.stop(name)
    with psycopg.connect(dsn) as database:
        assert database.execute(replication_slots.SLOTS_AND_PUBLICATIONS).fetchall() == []


def test_a_column_that_is_added_and_a_row_that_is_deleted(
    lab: Lab, connect: Connect, dsn: str, table: psycopg.Connection[Any]
) -> None:
    topic = lab.topic("altered", 1)
    connect.start(capture(dsn, "public.things", topic))
    table.execute("alter table things add column plan text default 'free'")
    table.execute("update things set version = 2, plan = 'paid' where id = 7")
    table.execute("update things set version = 2 where id = 8")
    table.execute("delete from things where id = 7")
    with Reader(topic) as reader:
        events = reader.read_to_end()
        while len(events) < ROWS + 4:
            events += reader.poll(1)
    assert {event.value["op"] for event in events[:ROWS]} == {"r"}
    assert events[0].value["after"] == {"id": 1, "version": 1}
    changed, other, deleted, tombstone = events[ROWS:]
    assert (changed.key, changed.value["op"]) == ("7", "u")
    assert changed.value["after"] == {"id": 7, "version": 2, "plan": "paid"}
    assert other.value["after"] == {"id": 8, "version": 2, "plan": "free"}
    assert (deleted.key, deleted.value["op"], deleted.value["after"]) == ("7", "d", None)
    assert (tombstone.key, tombstone.value) == ("7", None)


def test_a_table_in_partitions_is_captured(lab: Lab, connect: Connect, dsn: str) -> None:
    topic = lab.topic("parted", 1)
    with psycopg.connect(dsn, autocommit=True) as database, closing(Seen(topic)) as seen:
        database.execute("create table parts (id int primary key, version int not null) partition by range (id)")
        database.execute("create table parts_low partition of parts for values from (0) to (100)")
        database.execute("create table parts_high partition of parts for values from (100) to (200)")
        database.execute("insert into parts values (1, 1), (100, 1)")
        connect.start(capture(dsn, "parts", topic))
        seen.more(2)
        database.execute("update parts set version = 2")
        seen.more(2)
        assert sorted(seen.found) == [("1", 1), ("1", 2), ("100", 1), ("100", 2)]


@pytest.mark.long
@pytest.mark.usefixtures("table")
def test_a_postgres_that_is_killed_costs_no_change(lab: Lab, connect: Connect, dsn: str, postgres: Postgres) -> None:
    topic = lab.topic("database-killed", 2)
    with captured(connect, dsn, topic):
        postgres.kill()
        postgres.restart()


@pytest.mark.long
@pytest.mark.usefixtures("table")
def test_a_kafka_that_is_killed_costs_no_change(dsn: str) -> None:
    with Lab("connect-kafka", cluster="private") as lab, captured(lab.connect(), dsn, lab.topic("kafka-killed", 2)):
        lab.broker.kill()
        lab.broker.recover()


@pytest.mark.long
@pytest.mark.usefixtures("table")
def test_a_worker_that_is_restarted_doubles_nothing(lab: Lab, connect: Connect, dsn: str) -> None:
    with captured(connect, dsn, lab.topic("restarted", 2)):
        connect.restart()


@pytest.mark.long
@pytest.mark.usefixtures("table")
def test_killed_again_and_again_a_worker_doubles_nothing(lab: Lab, connect: Connect, dsn: str) -> None:
    topic = lab.topic("killed-often", 2)
    with captured(connect, dsn, topic) as seen:
        for _ in range(5):
            connect.kill()
            connect.recover()
            seen.more(50)


# -- What is mirrored


@pytest.mark.long
@pytest.mark.usefixtures("table")
def test_a_mirror_copies_each_record_once_though_its_worker_is_killed(
    lab: Lab, connect: Connect, cluster: Cluster, dsn: str
) -> None:
    """To the worker's own cluster, and from it."""
    with PrivateBroker() as far:
        with pytest.raises(
            LabkitError, match=rf"write to Kafka at {far.cluster.bootstrap}.*capture into a topic there"
        ):
            connect.start(capture(dsn, "things", replace(lab.topic("rows", 1), cluster=far.cluster)))
        come, go = lab.topic("come", 2, int), lab.topic("go", 2, int)
        there = replace(come, cluster=far.cluster)
        there.create()
        connect.start(mirror([there], to=cluster, name="come"))
        connect.start(mirror([go], to=far.cluster))
        with pytest.raises(LabkitError, match=r"come copies topics of back the other way.*stop come before"):
            connect.start(mirror([come], to=far.cluster, name="back"))
        put(there, *range(500))
        put(go, *range(500))
        connect.kill()
        put(there, *range(500, 1000))
        put(go, *range(500, 1000))
        connect.recover()
        for topic in (come, replace(go, cluster=far.cluster)):
            wait_until(lambda topic=topic: len(_values(topic)) >= 1000, 60, "all records")  # type: ignore[misc]
            assert sorted(_values(topic)) == list(range(1000))
        assert {name for name in far.cluster.topics() if not name.startswith("__")} == {
            there.name,
            go.name,
            f"{lab.run.prefix}connect-offsets",
        }


def _values(topic: Topic[Any]) -> list[Any]:
    with Reader(topic) as reader:
        return [record.value for record in reader.read_to_end()]


# -- What is refused, or fails


def test_a_connector_that_fails_for_good_says_why_and_another_takes_its_place(
    lab: Lab, connect: Connect, dsn: str, table: psycopg.Connection[Any]
) -> None:
    topic = lab.topic("fails", 1)
    good = capture(dsn, "things", topic)
    worse = {
        "transforms": "key,route,bad",
        "transforms.bad.type": "org.apache.kafka.connect.transforms.ExtractField$Value",
    }
    bad = replace(good, config={**good.config, **worse, "transforms.bad.field": "nope"})
    with suppress(LabkitError):  # it may be said to run before its first record
        connect.start(bad)
    wait_until(lambda: connect.status().loc[good.name, "state"] == "failed", 30, "its end")
    connect.look()
    assert (
        "capture-fails failed (IllegalArgumentException: Unknown field: nope: name the column" in connect.status_line()
    )
    assert connect.status_line() in lab._status([])
    reason = lab.verdict([Sent("1", "1", 0)], topic).reason  # it may still bring what was sent
    assert str(reason).startswith("connector capture-fails failed: IllegalArgument")
    connect.stop(good.name)
    assert lab.settle()
    connect.start(good)
    with closing(Seen(topic)) as seen:
        seen.more(ROWS)


@pytest.mark.usefixtures("table")
def test_a_capture_whose_stop_was_interrupted_can_be_started_and_stopped(lab: Lab, connect: Connect, dsn: str) -> None:
    connector = capture(dsn, "things", topic := lab.topic("interrupted", 1))
    connect.start(connector)
    connect._worker._ask("PUT", f"/connectors/{connector.name}/stop")
    wait_until(lambda: connect.status().loc[connector.name, "state"] == "stopped", 30, "its stop")
    connect.start(connector)
    with closing(Seen(topic)) as seen:
        seen.more(ROWS)
    connect.stop(connector.name)
    with psycopg.connect(dsn) as database:
        assert database.execute(replication_slots.SLOTS_AND_PUBLICATIONS).fetchall() == []


@pytest.mark.long
@pytest.mark.usefixtures("table")
def test_a_worker_that_dies_while_a_connector_starts_is_told(
    lab: Lab, connect: Connect, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, connector = connect._worker, capture(dsn, "things", lab.topic("dies", 1))
    asked = worker._insist

    def put_and_killed(method: str, *more: Any) -> Any:
        answer = asked(method, *more)
        if method == "PUT":
            connect.kill()
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_insist", put_and_killed)
        with pytest.raises(Unavailable, match="Kafka Connect has ended, recover it first"):
            connect.start(connector)
    connect.recover()
    connect.start(connector)


def test_what_connect_refuses_is_told_in_one_line(connect: Connect) -> None:
    with pytest.raises(LabkitError, match=r"^Kafka Connect refuses this: .*org\.example\.Nothing") as error:
        connect.start(Connector("strange", {"connector.class": "org.example.Nothing"}))
    assert "\n" not in str(error.value)
    with pytest.raises(LabkitError, match="Kafka Connect has no connector 'nobody'"):
        connect.stop("nobody")


@pytest.mark.parametrize(
    ("sql", "asked", "said"),
    [
        ("select 1", "nothing", "there is no table public.nothing to capture: make it first, or correct its name"),
        ("create table bare (id int)", "bare", "table bare has no primary key.* alter table bare add primary key"),
        ("create table other (name text primary key)", "other", "primary key of table other is name, and not 'id'"),
        ("create table two (id int, n int, primary key (id, n))", "two", "primary key of table two is id, n, and not"),
    ],
)
def test_a_table_that_cannot_be_captured_is_refused(
    lab: Lab, connect: Connect, dsn: str, sql: str, asked: str, said: str
) -> None:
    with psycopg.connect(dsn, autocommit=True) as database:
        database.execute(sql)
        with pytest.raises(LabkitError, match=said):
            connect.start(capture(dsn, asked, lab.topic("refused", 1)))
        assert database.execute(replication_slots.SLOTS_AND_PUBLICATIONS).fetchall() == []
    assert connect.status().empty


def test_a_mirror_onto_the_kafka_of_its_topics_is_refused(lab: Lab, connect: Connect) -> None:
    same = Cluster(lab.cluster.bootstrap.replace("127.0.0.1", "localhost"))
    with pytest.raises(LabkitError, match="would copy topics to the Kafka that they are in"):
        connect.start(mirror([lab.topic("again", 1)], to=same))
    assert connect.status().empty


def test_the_password_of_a_capture_is_not_shown(lab: Lab) -> None:
    assert "secret" not in repr(capture("host=127.0.0.1 password=secret", "things", Topic(lab.cluster, "x", 1, dict)))


@pytest.mark.usefixtures("table")
def test_a_topic_that_is_missing_is_told(lab: Lab, connect: Connect, dsn: str) -> None:
    nowhere = Topic(lab.cluster, lab.run.name("nowhere"), 1, dict)
    with pytest.raises(TopicMissing, match=r"nowhere does not exist.*make it before.*lab\.topic"):
        connect.start(capture(dsn, "things", nowhere))
    with pytest.raises(TopicMissing, match=r"nowhere does not exist.*make it before.*lab\.topic"):
        connect.start(mirror([lab.topic("somewhere", 1), nowhere], to=Cluster("127.0.0.1:1")))


def test_a_wrong_password_is_told_with_the_fix(lab: Lab, connect: Connect, dsn: str, postgres: Postgres) -> None:
    rules = postgres.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    with psycopg.connect(dsn, autocommit=True) as database:
        database.execute("create role guest login replication password 'right'")
        try:
            rules.write_text(f"host all guest 127.0.0.1/32 scram-sha-256\n{before}")
            database.execute("select pg_reload_conf()")
            guest = dsn.replace("user=postgres", "user=guest password=wrong")
            wait_until(lambda: not _lets_in(guest), what="the rule to hold")
            with pytest.raises(
                LabkitError, match=r"password authentication failed.*: correct user and password in the dsn"
            ):
                connect.start(capture(guest, "things", lab.topic("guest", 1)))
        finally:
            rules.write_text(before)
            database.execute("select pg_reload_conf()")
            database.execute("drop role guest")


def _lets_in(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.long
def test_a_postgres_without_a_logical_log_is_told(lab: Lab, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "SETTINGS", postgres.SETTINGS.replace("wal_level = logical", "wal_level = replica"))
    with Postgres() as server, pytest.raises(LabkitError, match=r"wal_level replica.*set wal_level = logical"):
        connect.start(capture(server.dsn, "things", lab.topic("physical", 1)))


def test_names_that_make_no_sense_are_refused(cluster: Cluster) -> None:
    topic = Topic(cluster, "sites", 1, dict)
    for table, key in (("bad name", "id"), ("things; drop", "id"), ("things", "a b"), ("", "id")):
        with pytest.raises(LabkitError, match="cannot be captured"):
            capture("host=127.0.0.1 dbname=x", table, topic, key)
    with pytest.raises(LabkitError, match="the dsn is no connection string"):
        capture("what is this", "things", topic)
    with pytest.raises(LabkitError, match="cannot be a connector's name"):
        Connector("No Name", {})
    with pytest.raises(LabkitError, match="topics of one cluster to another one"):
        mirror([topic], to=cluster)
    with pytest.raises(LabkitError, match=r"a list of topics: mirror\(\[sites\], to=…\)"):
        mirror(topic, to=Cluster("127.0.0.1:1"))  # type: ignore[arg-type]
    assert mirror([topic], to=Cluster("127.0.0.1:1")).name == "mirror-sites"


def test_a_kafka_with_a_login_is_refused() -> None:
    secured = Cluster("127.0.0.1:1", (("security.protocol", "SASL_SSL"),))
    with pytest.raises(LabkitError, match="only on a Kafka without a login"):
        KafkaConnect(secured, "x.")
    with pytest.raises(LabkitError, match="only between clusters without a login"):
        mirror([Topic(secured, "jobs", 1, dict)], to=Cluster("127.0.0.1:2"))


@pytest.mark.long
def test_a_port_that_somebody_took_is_chosen_anew(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, ThreadingHTTPServer(("127.0.0.1", 0), Other) as speaks:
        threading.Thread(target=speaks.serve_forever, daemon=True).start()
        taken = [mute.getsockname()[1], speaks.server_port]
        ports = iter(taken)
        monkeypatch.setattr(kafka_connect, "free_ports", lambda count: [next(ports, 0) or free_ports(count)[0]])
        with KafkaConnect(cluster, f"{fresh_topic(cluster).name}.") as made:
            assert made.port not in taken
            assert made.status() == []
        speaks.shutdown()


class Other(BaseHTTPRequestHandler):
    """Some other server that speaks HTTP: what it answers is no JSON, or JSON of something else."""

    _answers = cycle([b"<html>", b"[]", b"{}"])

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}" if self.path == "/health" else next(self._answers))

    def log_message(self, *_: object) -> None:
        pass


# -- What takes the place of what


def test_a_capture_of_another_table_takes_the_place_of_one_and_begins_with_its_rows(
    lab: Lab, connect: Connect, dsn: str, table: psycopg.Connection[Any]
) -> None:
    topic = lab.topic("replaced", 1)
    connect.start(capture(dsn, "things", topic))
    with closing(Seen(topic)) as seen:
        seen.more(ROWS)
        table.execute("create table others (id int primary key, version int not null)")
        table.execute("insert into others values (1000, 7)")
        connect.start(capture(dsn, "others", topic))
        seen.more(1)
        assert seen.found[ROWS:] == [("1000", 7)]
    assert len(table.execute(replication_slots.SLOTS_AND_PUBLICATIONS).fetchall()) == 2  # a slot and a publication


# -- What is left


@pytest.mark.long
@pytest.mark.usefixtures("table")
def test_a_slot_that_cannot_be_dropped_now_is_told_and_dropped_later(
    lab: Lab, connect: Connect, dsn: str, postgres: Postgres
) -> None:
    topic = lab.topic("undropped", 1)
    connect.start(capture(dsn, "things", topic))
    name, slot = "capture-undropped", slot_name(topic.name)
    with closing(Seen(topic)) as seen:
        seen.more(ROWS)
    postgres.kill()
    try:
        with pytest.raises(LabkitError, match=rf"select pg_drop_replication_slot\('{slot}'\); drop publication"):
            connect.stop(name)
        assert connect.status().empty
    finally:
        postgres.restart()
    with psycopg.connect(dsn, autocommit=True) as database:
        assert {found for found, _ in database.execute(replication_slots.SLOTS_AND_PUBLICATIONS).fetchall()} == {slot}
        connect.stop(name)
        assert database.execute(replication_slots.SLOTS_AND_PUBLICATIONS).fetchall() == []
    with pytest.raises(LabkitError, match="has no connector"):
        connect.stop(name)


def test_what_a_dead_run_left_in_postgres_is_collected(lab: Lab, dsn: str) -> None:
    connector = capture(dsn, "things", Topic(lab.cluster, lab.run.name("rows"), 1, dict))
    dead = slot_name(f"labkit.{runs.learner()}.any-notebook.2601010000000bad.rows")
    kept = sorted([connector.config["slot.name"], slot_name("labkit.somebody-else.x.2601010000000bad.rows"), "theirs"])
    with psycopg.connect(dsn, autocommit=True) as database:
        for name in (dead, *kept):
            database.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", (name,))
            database.execute(f"create publication {name}")
        try:
            living = [prefix for prefix, _ in runs.living()]
            assert replication_slots.collect(connector, runs.learner(), living) == [dead]
            left = database.execute(replication_slots.SLOTS_AND_PUBLICATIONS).fetchall()
            assert sorted(name for name, _ in left) == sorted(kept * 2)
        finally:
            for name, _ in database.execute(
                "select slot_name, 1 from pg_replication_slots where not active"
            ).fetchall():
                database.execute("select pg_drop_replication_slot(%s)", (name,))


@pytest.mark.usefixtures("table")
def test_a_capture_that_starts_collects_what_dead_runs_left(lab: Lab, connect: Connect, dsn: str) -> None:
    topic, dead = lab.topic("collects", 1), slot_name(f"labkit.{runs.learner()}.any-notebook.2601010000000bad.rows")
    with psycopg.connect(dsn, autocommit=True) as database:
        database.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", (dead,))
        connect.start(capture(dsn, "things", topic))
        left = database.execute(replication_slots.SLOTS_AND_PUBLICATIONS).fetchall()
        assert {name for name, _ in left} == {slot_name(topic.name)}


def test_memory_that_gets_short_is_told_before_a_worker_starts(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: KafkaConnect) -> None:
        raise LabkitError("far enough")

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=400_000_000))
    monkeypatch.setattr(KafkaConnect, "_make", stop)
    with pytest.raises(LabkitError, match="far enough"):
        KafkaConnect(cluster, "x.")
    assert "400 MB are available, and 250 MB are needed for Kafka Connect" in capsys.readouterr().out


def test_the_name_of_a_slot_fits_and_tells_topics_apart() -> None:
    long = [f"labkit.{'l' * 20}.{'n' * 30}.2601010000000bad.{'t' * 38}-{number}" for number in (1, 2)]
    assert len({slot_name(name) for name in long}) == 2
    assert max(len(slot_name(name)) for name in long) <= 63
    assert slot_name("labkit.ada-l.sheet.2601010000000bad.rows") == "labkit_ada_l_2601010000000bad_rows"


def test_a_lab_has_one_worker(lab: Lab, connect: Connect) -> None:
    assert lab.connect() is connect
    assert isinstance(lab.targets["Kafka Connect"], Target)
