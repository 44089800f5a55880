"""MetaSite, how its changes get into table and topic, and the reader of a view: over HTTP, as clients meet them."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
import psycopg
import pytest
from consuming import Member, alter, fresh_group, fresh_topic, put
from processes import wait_until

from labkit.kafka.clients import forget
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.patterns.projection import Projection
from labkit.patterns.views import PostgresView, SqliteView, View, ViewUnavailable
from labkit.runtime.broker import free_ports
from labkit.runtime.postgres import Postgres
from labkit.services import calls
from labkit.services.clients import ask
from labkit.services.http import HttpService
from labkit.services.sites.content import Site, site, site_id, sites
from labkit.services.sites.metasite import CONFIRM, TABLE, MetaSite, backfill, fill, stored, table_writer
from labkit.services.sites.view_reader import ViewReader


@contextmanager
def serving(service: HttpService) -> Iterator[str]:
    """It, in a thread; its address."""
    stop = threading.Event()
    thread = threading.Thread(target=service.run, args=(stop, lambda step, subject: None))
    thread.start()

    def answers() -> bool:
        with suppress(OSError):
            return ask(f"{service.url}/none", patience=0)[0] == 404
        return False

    try:
        wait_until(answers, 10, "the service to answer")
        yield service.url
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def apps_of(record: Record[Site]) -> list[tuple[str, str]]:
    return [(app.name, app.version) for app in record.value.apps]


def apps_view(path: Path) -> SqliteView:
    return SqliteView(path, "apps", {"app": "text", "version": "text"}, ["app"], key="site")


def writer(topic: Topic[Site], view: View) -> Member:
    return Member(Projection(topic, apps_of, view).consumer(fresh_group()))


# -- the reader --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def topic(cluster: Cluster) -> Topic[Site]:
    """250 sites, of which one was deleted."""
    topic = fresh_topic(cluster, 2, Site)
    for one in sites(250, pages=0):
        topic.send(one, one.id)
    topic.send(None, site_id(249), {"version": "2"})
    topic.flush()
    return topic


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def reader(
    request: pytest.FixtureRequest, topic: Topic[Site], postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    view: View = apps_view(tmp_path_factory.mktemp("reader") / "view.db")
    if request.param == "postgres":
        view = PostgresView(postgres.dsn, f"apps_{uuid.uuid4().hex[:8]}", view.columns, view.indexes, view.key)
    with serving(ViewReader(free_ports()[0], view, topic)) as url:
        status, said = ask(f"{url}/site/{site_id(1)}")  # before there is a view
        assert status == 503
        assert "cannot be read" in said
        assert '"stale":{"records":null,"seconds":null}' in said
        with writer(topic, view):
            wait_until(lambda: stale(url) == 0, 20, "the view to be complete")
        yield url


def stale(url: str, name: str = site_id(1)) -> Any:
    status, answer = ask(f"{url}/site/{name}")
    return answer["stale"]["records"] if status == 200 else None


def test_a_site_has_its_apps_and_says_how_old_they_may_be(reader: str) -> None:
    status, answer = ask(f"{reader}/site/{site_id(3)}")
    assert status == 200
    assert answer["rows"] == [{"app": app.name, "version": app.version} for app in site(3).apps]
    assert answer["stale"]["records"] == 0
    assert answer["stale"]["seconds"] >= 0


def test_an_app_has_its_sites_page_by_page(reader: str) -> None:
    wanted = sorted(one.id for one in sites(249, pages=0) if any(app.name == "stores" for app in one.apps))
    found: list[str] = []
    page: str | None = ""
    while page is not None:
        _, answer = ask(f"{reader}/app/stores?limit=7" + (f"&page={page}" if page else ""))
        assert len(answer["sites"]) <= 7
        found += answer["sites"]
        page = answer["next"]
    assert found == wanted
    assert ask(f"{reader}/app/nobody-has-it")[1]["sites"] == []


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("site/site-999999", 404, "there is no site site-999999"),
        (f"site/{site_id(249)}", 404, "there is no site"),  # deleted
        ("site/%27%20or%201=1", 400, "is no name"),
        ("site/", 400, "is no name"),
        (f"site/{site_id(3)}/apps", 400, "is no name"),
        ("owner/someone", 404, "Not Found"),
        (f"site/{'x' * 65}", 400, "is no name"),
        ("site/%ff%00", 400, "is no name"),
        ("app/stores?limit=0", 400, "1 to 1000"),
        ("app/stores?limit=1000000", 400, "1 to 1000"),
        ("app/stores?limit=-1", 400, "1 to 1000"),
        ("app/stores?limit=many", 400, "1 to 1000"),
        ("app/stores?page=-;forged", 400, "as `next` has it"),
        ("app/stores?page=%00%ff", 400, "as `next` has it"),
    ],
)
def test_what_makes_no_sense_is_refused(reader: str, path: str, status: int, said: str) -> None:
    found, text = ask(f"{reader}/{path}")
    answer = msgspec.json.decode(text)
    assert (found, said in answer["error"]) == (status, True), text
    assert answer["stale"]["records"] == 0
    assert answer["stale"]["seconds"] >= 0


def test_it_is_only_read(reader: str) -> None:
    url = f"{reader}/site/{site_id(3)}"
    status, said = ask(url, "PUT", {})
    assert status == 405
    assert msgspec.json.decode(said)["stale"]["records"] == 0
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_two_requests_in_one_packet_are_both_answered_and_garbage_is_refused(reader: str) -> None:
    address = urlsplit(reader)
    where = f"HTTP/1.1\r\nHost: {address.netloc}\r\n"
    asked = f"GET /site/{site_id(3)} {where}\r\nDELETE /site/{site_id(3)} {where}Connection: close\r\n\r\n"
    for sent, statuses in ((asked, [200, 405]), ("what is this?\r\n\r\n", [400])):
        with socket.create_connection((str(address.hostname), address.port or 0), timeout=5) as connection:
            connection.sendall(sent.encode())
            said = b"".join(iter(lambda: connection.recv(65536), b""))
        assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", said)] == statuses
        assert (b"allow: GET, HEAD" in said) == (405 in statuses)


def test_a_value_that_its_column_cannot_have_is_refused(cluster: Cluster, dsn: str) -> None:
    topic, view = fresh_topic(cluster, 1, Site), PostgresView(dsn, "apps", {"stars": "bigint"}, ["stars"], key="site")
    view.begin(topic.name, cluster.topic_id(topic.name), [])
    with serving(ViewReader(free_ports()[0], view, topic)) as url:
        status, said = ask(f"{url}/stars/abc")
        assert (status, "view apps has no such value" in said) == (400, True), said
        assert ask(f"{url}/stars/5")[1]["sites"] == []


def test_it_answers_while_the_view_falls_behind_and_says_so(cluster: Cluster, tmp_path: Path) -> None:
    """The writer is gone: the same rows, older and older. Then a tombstone is in the view, and the site is not."""
    topic, view = fresh_topic(cluster, 1, Site), apps_view(tmp_path / "view.db")
    topic.send(site(1), site_id(1))
    topic.flush()
    with serving(ViewReader(free_ports()[0], view, topic)) as url:
        with writer(topic, view):
            wait_until(lambda: stale(url) == 0, 20, "the view")
        topic.send(None, site_id(1), {"version": "2"})
        topic.flush()
        wait_until(lambda: stale(url) == 1, 10, "the record that is missing")
        age = ask(f"{url}/site/{site_id(1)}")[1]["stale"]["seconds"]
        wait_until(lambda: ask(f"{url}/site/{site_id(1)}")[1]["stale"]["seconds"] > age, 5, "growing older")
        with writer(topic, view):
            wait_until(lambda: ask(f"{url}/site/{site_id(1)}")[0] == 404, 20, "the deletion")


def content(view: SqliteView) -> dict[str, Any]:
    """What is in it; nothing while nobody has made it."""
    try:
        return view.content()
    except ViewUnavailable:
        return {}


# -- MetaSite ----------------------------------------------------------------------------------------------------------


def table(dsn: str) -> dict[str, int]:
    """Version by id; of deleted ones negative."""
    return {name: version if one else -version for name, version, one in stored(dsn)}


def told(topic: Topic[Site]) -> dict[str, int]:
    """Highest version by id, as the topic has it."""
    with Reader(topic) as reader:
        return {one.value.id: one.value.version for one in reader.read_to_end() if one.value is not None}


def test_metasite_answers_with_pieces_of_a_large_object(cluster: Cluster, dsn: str) -> None:
    fill(dsn, sites(20))
    with serving(MetaSite(free_ports()[0], dsn, fresh_topic(cluster, 1, Site))) as url:
        whole = ask(f"{url}/sites/{site_id(3)}")[1]
        assert len(encode(whole)) > 8000
        apps = ask(f"{url}/sites/{site_id(3)}/apps")[1]["apps"]
        assert [app["name"] for app in apps] == [app.name for app in site(3).apps]
        assert ask(f"{url}/sites/{site_id(3)}/owner")[1]["owner"] == site(3).owner
        wanted = sorted(one.id for one in sites(20) if any(app.name == "stores" for app in one.apps))
        assert ask(f"{url}/apps/stores/sites")[1] == wanted
        assert ask(f"{url}/sites/site-9/apps")[0] == 404
        assert ask(f"{url}/sites/{site_id(3)}", "PUT", b"{")[0] == 400
        assert ask(f"{url}/sites/{site_id(4)}", "PUT", encode(site(3, 2)))[0] == 400
        assert ask(f"{url}/sites/{site_id(3)}", "DELETE")[0] == 400


def test_a_change_is_sent_and_the_row_follows(cluster: Cluster, dsn: str) -> None:
    """Commands → topic → table; late and repeated ones change nothing, poison stops nothing."""
    fill(dsn, sites(5, pages=0))
    topic = fresh_topic(cluster, 2, Site)
    with serving(MetaSite(free_ports()[0], dsn, topic)) as url, Member(table_of(topic, dsn)):
        for version in (2, 3):
            assert ask(f"{url}/sites/{site_id(1)}", "PUT", encode(site(1, version)))[0] == 202
        assert ask(f"{url}/sites/{site_id(9)}", "PUT", encode(site(9)))[0] == 202
        assert ask(f"{url}/sites/{site_id(2)}?version=2", "DELETE")[0] == 202
        put(topic, b"{", key="poison")
        assert ask(f"{url}/sites/{site_id(2)}", "PUT", encode(site(2)))[0] == 202
        assert ask(f"{url}/sites/{site_id(1)}", "PUT", encode(site(1, 2)))[0] == 202
        assert ask(f"{url}/sites/{site_id(4)}", "PUT", encode(site(4, 2)))[0] == 202
        assert ask(f"{url}/sites/{site_id(0)}", "PUT", encode(site(0, 2)))[0] == 202
        after = {0: 2, 1: 3, 2: -2, 3: 1, 4: 2, 9: 1}
        wait_until(lambda: table(dsn) == {site_id(number): at for number, at in after.items()}, 10, "the rows")
        assert ask(f"{url}/sites/{site_id(2)}")[0] == 404


def test_without_a_topic_a_change_only_goes_into_the_table(dsn: str) -> None:
    """As MetaSite always did it: what answers is what is stored."""
    fill(dsn, sites(3, pages=0))
    with serving(MetaSite(free_ports()[0], dsn)) as url:
        assert ask(f"{url}/sites/{site_id(1)}", "PUT", encode(site(1, 3)))[0] == 200
        assert ask(f"{url}/sites/{site_id(1)}", "PUT", encode(site(1, 2)))[0] == 200  # late: it changes nothing
        assert ask(f"{url}/sites/{site_id(2)}?version=2", "DELETE")[0] == 200
        assert ask(f"{url}/sites/{site_id(2)}?version=1", "DELETE")[0] == 200
        assert table(dsn) == {site_id(0): 1, site_id(1): 3, site_id(2): -2}
        assert ask(f"{url}/sites/{site_id(2)}")[0] == 404


def test_every_change_that_kafka_refuses_is_told_to_who_asked_for_it(cluster: Cluster, dsn: str) -> None:
    """At once with others, refused or not: 202 says that it is in the topic, 503 that it is not."""
    topic = fresh_topic(cluster, 1, Site)
    alter(topic, {"max.message.bytes": "4000"})
    with serving(MetaSite(free_ports()[0], dsn, topic)) as url, ThreadPoolExecutor() as pool:

        def put(one: Site) -> tuple[int, str]:
            return ask(f"{url}/sites/{one.id}", "PUT", encode(one))

        for turn in range(8):
            first, second, small = site(3 * turn), site(3 * turn + 1), site(3 * turn + 2, pages=0)
            answers = list(pool.map(put, [first, small, second]))
            assert [answers[0][0], answers[2][0]] == [503, 503], answers
            assert "Kafka does not confirm" in answers[0][1]
            assert (answers[1][0] == 202) == (small.id in told(topic))  # it may have been in a batch with a large one
        assert put(site(100, pages=0))[0] == 202
    assert site_id(100) in told(topic)


@pytest.mark.long
def test_a_change_that_kafka_does_not_confirm_is_told_in_time(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sooner than clients give up."""
    assert CONFIRM < calls.LONG_PATIENCE
    monkeypatch.setattr(calls, "LONG_PATIENCE", 60.0)
    nobody = Topic(Cluster(f"127.0.0.1:{free_ports()[0]}"), "sites", 1, Site)
    with serving(MetaSite(free_ports()[0], dsn, nobody)) as url:
        status, said = ask(f"{url}/sites/{site_id(1)}?version=2", "DELETE")
        assert status == 503
        assert "not confirmed within 8 s: is the broker up? They may still arrive" in said
    forget(nobody.cluster)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", f"{site_id(1)}?version=9223372036854775808", None),
        ("DELETE", f"{site_id(1)}?version=\u0662", None),
        ("DELETE", f"{site_id(1)}?version={'9' * 5000}", None),
        ("DELETE", "%00?version=2", None),
        ("PUT", site_id(1), msgspec.structs.replace(site(1), version=2**63)),
        ("PUT", site_id(1), msgspec.structs.replace(site(1), version=-1)),
        ("PUT", site_id(1), msgspec.structs.replace(site(1), name="no\0text")),
        ("GET", "%00", None),
        ("GET", "%00/apps", None),
        ("PUT", "x" * 65, msgspec.structs.replace(site(1), id="x" * 65)),
    ],
)
def test_what_its_database_would_refuse_is_refused_at_the_door(
    metasite: str, method: str, path: str, body: Site | None
) -> None:
    status, said = ask(f"{metasite}/sites/{quote(path, safe='%?=')}", method, None if body is None else encode(body))
    assert status == 400, said


@pytest.fixture
def metasite(cluster: Cluster, dsn: str) -> Iterator[str]:
    fill(dsn, [])
    with serving(MetaSite(free_ports()[0], dsn, fresh_topic(cluster, 1, Site))) as url:
        yield url


def test_the_table_passes_over_what_it_cannot_hold(
    cluster: Cluster, dsn: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever else writes to the topic: what the database refuses stops nothing, and is told with its place."""
    topic = fresh_topic(cluster, 1, Site)
    topic.send(site(1), site_id(1))
    topic.send(None, site_id(1), {"version": "many"})
    topic.send(None, site_id(1), {"version": str(2**63)})
    topic.send(msgspec.structs.replace(site(2), version=2**63), site_id(2))
    topic.send(msgspec.structs.replace(site(3), name="no\0text"), site_id(3))
    topic.send(site(3), secrets.token_hex(5000))  # longer than an index takes
    topic.send(site(4), site_id(4))
    topic.flush()
    with Member(table_of(topic, dsn)) as member:
        member.wait_committed({0: 7})
    assert table(dsn) == {site_id(1): 1, site_id(4): 1}
    told = capfd.readouterr().err
    assert [number for number in range(7) if f"passed over: {topic.name}/0/{number}:" in told] == [1, 2, 3, 4, 5]


def test_two_that_make_the_table_at_once_pass_over_nothing(cluster: Cluster, dsn: str) -> None:
    """PostgreSQL refuses one of them, with the error of a row that is there already; `if not exists` or not."""
    topic = fresh_topic(cluster, 1, Site)
    topic.send(site(1), site_id(1))
    topic.flush()
    with psycopg.connect(dsn) as other:
        other.execute(TABLE)  # before the writer: otherwise PostgreSQL may refuse this one
        with Member(table_of(topic, dsn)) as member:
            waiting = "select 1 from pg_locks where not granted"
            wait_until(lambda: other.execute(waiting).fetchone(), 10, "the writer to make the table too")
            other.commit()
            member.wait_committed({0: 1})
    assert table(dsn) == {site_id(1): 1}


@pytest.mark.long
def test_the_table_waits_for_its_database(cluster: Cluster, dsn: str, postgres: Postgres) -> None:
    topic = fresh_topic(cluster, 1, Site)
    with Member(table_of(topic, dsn)) as member:
        member.journal.wait_for(Step.ASSIGNED)
        postgres.kill()
        try:
            topic.send(site(1), site_id(1))
            topic.flush()
            member.journal.wait_for(Step.FAILED)
        finally:
            postgres.restart()
        member.wait_committed({0: 1})
    assert table(dsn) == {site_id(1): 1}


def table_of(topic: Topic[Site], dsn: str) -> Consumer:
    return replace(table_writer(topic, dsn), group=fresh_group())


def test_a_backfill_beside_live_changes_leaves_no_gap(cluster: Cluster, dsn: str, tmp_path: Path) -> None:
    """Rows that changed, or were deleted, after they were read come late and old: the newest stands everywhere."""
    fill(dsn, sites(300, pages=1))
    topic = fresh_topic(cluster, 2, Site)
    with apps_view(tmp_path / "view.db") as view, Member(table_of(topic, dsn)), writer(topic, view):
        live = threading.Thread(target=lambda: [topic.send(site(n, 2, pages=1), site_id(n)) for n in range(0, 300, 3)])
        live.start()
        assert backfill(dsn, topic) >= 300
        live.join()
        topic.send(None, site_id(1), {"version": "2"})
        assert backfill(dsn, topic) >= 300
        topic.flush()
        wanted = {n: 2 if n % 3 == 0 else 1 for n in range(300) if n != 1}
        rows = {site_id(n): sorted((app.name, app.version) for app in site(n, at).apps) for n, at in wanted.items()}
        wait_until(lambda: content(view) == rows, 20, "the view")
        versions = {site_id(n): at for n, at in wanted.items()} | {site_id(1): -2}
        wait_until(lambda: table(dsn) == versions, 20, "the table")


@pytest.mark.long
def test_a_dual_write_that_ends_in_between_loses_the_event(cluster: Cluster, dsn: str) -> None:
    """At a named step, so always; the client's retry does not mend it."""
    topic, port = fresh_topic(cluster, 1, Site), free_ports()[0]
    fill(dsn, [])
    script = (
        "import os, signal, sys, threading\n"
        "from labkit.kafka.cluster import Cluster\n"
        "from labkit.kafka.topics import Topic\n"
        "from labkit.services.sites.metasite import MetaSite\n"
        "from labkit.services.sites.content import Site\n"
        "def between(site):\n"
        "    if site.id == 'site-000005': os.kill(os.getpid(), signal.SIGKILL)\n"
        "topic = Topic(Cluster(sys.argv[1]), sys.argv[2], 1, Site)\n"
        "service = MetaSite(int(sys.argv[3]), sys.argv[4], topic, dual_write=True, between=between)\n"
        "service.run(threading.Event(), lambda *_: None)\n"
    )
    command = [sys.executable, "-c", script, cluster.bootstrap, topic.name, str(port), dsn]

    def change(number: int) -> int | None:
        with suppress(OSError):
            return ask(
                f"http://127.0.0.1:{port}/sites/{site_id(number)}", "PUT", encode(site(number, pages=0)), patience=0
            )[0]
        return None

    with subprocess.Popen(command) as first:
        wait_until(lambda: change(0) is not None, 15, "the service")
        assert [change(number) for number in range(1, 7)] == [202] * 4 + [None] * 2
        assert first.wait(10) == -signal.SIGKILL
    with subprocess.Popen(command) as second:
        wait_until(lambda: change(5) == 200, 15, "the service, and the client's retry")
        assert change(6) == 202
        os.kill(second.pid, signal.SIGKILL)
    assert set(table(dsn)) - set(told(topic)) == {site_id(5)}


@pytest.mark.long
def test_metasite_says_503_while_its_database_is_away(cluster: Cluster, dsn: str, postgres: Postgres) -> None:
    fill(dsn, sites(2, pages=0))
    with serving(MetaSite(free_ports()[0], dsn, fresh_topic(cluster, 1, Site))) as url:
        answers: Callable[[], int] = lambda: ask(f"{url}/sites/{site_id(1)}")[0]  # noqa: E731
        assert answers() == 200
        postgres.kill()
        try:
            wait_until(lambda: answers() == 503, 10, "503")
        finally:
            postgres.restart()
        wait_until(lambda: answers() == 200, 10, "its return")
