"""Two data centres: what MirrorMaker copies from one to the other is there once, whatever befalls the link, the worker,
or either cluster. Everything that crosses takes 20 ms each way."""

from __future__ import annotations

import csv
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer as Client
from consuming import Member, fresh_group
from processes import wait_until
from transacting import Sending, exactly_once

from labkit import Lab, mirror
from labkit.kafka.cluster import Cluster
from labkit.kafka.lag import end_offsets
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.lab.faults.kafka_connect import Connect
from labkit.patterns.retries import RetryingConsumer, blocking, exponential
from labkit.services import contacts
from labkit.services.contacts import ContactsJob, JobFinished

KEYS = 8
FILE = Path(__file__).parents[2] / "data" / "contacts.csv"


@dataclass
class Centres:
    """Home, where the one worker is; and google-dc, at the other end of the link."""

    home: Lab
    google: Lab
    connect: Connect

    def out(self, value: Any = int) -> tuple[Topic[Any], Topic[Any]]:
        """A new topic at home, and its copy at google."""
        topic = self.home.topic(fresh(), 4, value)
        copy = at(topic, self.google.cluster)
        self.connect.start(mirror([topic], to=self.google.proxy.cluster, name=topic.short))
        return topic, copy

    def back(self, value: Any = int) -> tuple[Topic[Any], Topic[Any]]:
        """A new topic at google, and its copy at home."""
        copy = self.home.topic(fresh(), 4, value)
        topic = at(copy, self.google.cluster)
        source = replace(topic, cluster=self.google.proxy.cluster)
        self.connect.start(mirror([source], to=self.home.cluster, name=topic.short))
        return topic, copy


@pytest.fixture(scope="module")
def both(state_dir: object) -> Iterator[Centres]:
    with (
        Lab("home-dc", pace=10, cluster="private") as home,
        Lab("google-dc", pace=10, cluster="private") as google,
    ):
        google.proxy.distance(0.02)
        yield Centres(home, google, home.connect())


@pytest.fixture
def centres(both: Centres) -> Iterator[Centres]:
    yield both
    both.google.proxy.recover()
    for connector in both.connect.status().index:
        both.connect.stop(connector)


def fresh() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


def at(topic: Topic[Any], cluster: Cluster) -> Topic[Any]:
    """The topic of the same name in another cluster, made there."""
    copy = replace(topic, cluster=cluster)
    copy.create()
    return copy


def send(topic: Topic[Any], numbers: Iterable[int]) -> None:
    """Confirmed when it returns, also if the broker is away for some seconds."""
    topic.deliver(((number, str(number % KEYS), None) for number in numbers), timeout=120)


def arrived(topic: Topic[Any], count: int) -> dict[str | None, list[int]]:
    """What readers see of each key, in order, once so many records are there."""
    found: dict[str | None, list[int]] = defaultdict(list)
    with Reader(topic) as reader:

        def take(records: Iterable[Record[Any]]) -> bool:
            for record in records:
                found[record.key].append(record.value)
            return sum(map(len, found.values())) >= count

        wait_until(lambda: take(reader.poll(0.2)), 90, f"{count} records of {topic.short}")
        take(reader.read_to_end())
    return found


def in_order(count: int) -> dict[str | None, list[int]]:
    return {str(key): list(range(key, count, KEYS)) for key in range(KEYS)}


@pytest.mark.long
def test_what_a_cut_keeps_back_arrives_once_and_in_order(centres: Centres) -> None:
    """Jobs out, answers back; the link is cut while both are under way, and jobs are sent meanwhile, too."""
    link = centres.google.proxy
    jobs, jobs_there = centres.out()
    answers_there, answers = centres.back()
    with Member(exactly_once(jobs_there, Sending(answers_there), fresh_group())):
        send(jobs, range(2000))
        wait_until(lambda: any(end_offsets(answers.cluster, [answers.name]).values()), 30, "the first answers")
        link.cut()
        send(jobs, range(2000, 2400))
        link.recover()
        send(jobs, range(2400, 2400 + KEYS))  # after all that might come again
        assert arrived(answers, 2400 + KEYS) == in_order(2400 + KEYS)
    assert arrived(jobs_there, 2400 + KEYS) == in_order(2400 + KEYS)


@pytest.mark.long
def test_what_crosses_is_as_it_was_and_what_was_aborted_does_not_cross(centres: Centres) -> None:
    topic, copy = centres.out()
    client = Client(topic.cluster.config({"transactional.id": topic.name}))
    client.init_transactions(20)
    first: dict[str, Any] = {"headers": {"h": b"\xff"}, "timestamp": 1_700_000_000_000}
    for end, value, key, partition, more in (
        (client.commit_transaction, b"1", b"a", 2, first),
        (client.abort_transaction, b"2", b"b", 2, {}),
        (client.commit_transaction, None, b"a", 3, {}),
        (client.commit_transaction, b"3", None, 0, {}),
    ):
        client.begin_transaction()
        client.produce(topic.name, value, key, partition, **more)
        client.flush()
        end(20)

    def seen(one: Topic[Any]) -> list[tuple[Any, ...]]:
        with Reader(one) as reader:
            found = [message for messages in reader.messages_to_end(60) for message in messages]
        return sorted((it.partition(), it.key(), it.value(), it.headers(), it.timestamp()) for it in found)

    wait_until(lambda: len(seen(copy)) >= 3, 30, "three records")
    assert seen(copy) == seen(topic)
    assert [(partition, value) for partition, _, value, *_ in seen(copy)] == [(0, b"3"), (2, b"1"), (3, None)]


# -- what takes longer -------------------------------------------------------------------------------------------------


def kill_the_worker(centres: Centres) -> None:
    for _ in range(2):
        centres.connect.kill()
        centres.connect.recover()


def kill_google(centres: Centres) -> None:
    centres.google.broker.kill()
    centres.google.broker.recover()


def kill_home(centres: Centres) -> None:
    centres.home.broker.kill()
    centres.home.broker.recover()


def cut_for(seconds: float) -> Callable[[Centres], None]:
    def cut(centres: Centres) -> None:
        centres.google.proxy.cut()
        threading.Event().wait(seconds)  # the length of the cut is what is tested
        centres.google.proxy.recover()

    return cut


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "befalls",
    [
        pytest.param(kill_the_worker, id="worker"),
        pytest.param(kill_google, id="google"),
        pytest.param(kill_home, id="home"),
        pytest.param(cut_for(30), id="30 s"),
        pytest.param(cut_for(90), id="90 s"),  # longer than a transaction may take by default
    ],
)
def test_nothing_is_lost_or_doubled_in_either_direction(centres: Centres, befalls: Callable[[Centres], None]) -> None:
    count, ways = 20_000, [centres.out(), centres.back()]
    crossing = threading.Event()

    def load(topic: Topic[Any]) -> None:
        for first in range(0, count, 500):
            send(topic, range(first, first + 500))
            if first >= count // 4:
                crossing.wait(60)  # the second part is sent while it happens

    loads = [threading.Thread(target=load, args=(topic,), daemon=True) for topic, _ in ways]
    for one in loads:
        one.start()
    try:
        for _, copy in ways:
            wait_until(lambda copy=copy: any(end_offsets(copy.cluster, [copy.name]).values()), 60, "the first copies")
    finally:
        crossing.set()
    befalls(centres)
    for one in loads:
        one.join(300)
        assert not one.is_alive()
    for topic, copy in ways:
        send(topic, range(count, count + KEYS))  # after all that might come again
        assert arrived(copy, count + KEYS) == in_order(count + KEYS)


@pytest.mark.long
def test_a_database_over_there_that_is_killed_costs_no_contact_and_no_report(centres: Centres) -> None:
    """Jobs go out to the importers, which store contacts over there; their reports come back."""
    contents = centres.google.postgres()
    jobs, jobs_there = centres.out(ContactsJob)
    reports_there, reports = centres.back(JobFinished)
    importer = contacts.Importer(contents.dsn, contacts.Reports(reports_there))
    again = blocking(exponential(0.1, cap=1))  # for as long as it takes
    importing = RetryingConsumer(jobs_there, importer, guarantee="exactly once", retry=again)
    importers = centres.google.deploy("importers", importing, 2)
    centres.google.wait_ready(importers)
    assert contacts.send_jobs(FILE, jobs, "YYY", size=5) == 200
    wait_until(lambda: contacts.stored(contents.dsn, "YYY"), 60, "the first contacts")
    contents.kill()
    assert len(reported(reports)) < 200, "all was done before"
    contents.recover()
    wait_until(lambda: len(reported(reports)) >= 200, 90, "all reports")
    assert reported(reports) == Counter(range(1, 201))
    emails = {one.email for one in contacts.stored(contents.dsn, "YYY")}
    with open(FILE, encoding="utf-8", newline="") as file:
        there = [row["email"].lower() for row in csv.DictReader(file)]
    assert emails == {one for one in there if one.count("@") == 1 and one.split("@")[0] and "@example." in one}
    importers.scale(0)


def reported(reports: Topic[Any]) -> Counter[int]:
    """How often each job was reported."""
    with Reader(reports) as reader:
        return Counter(one.value.job for one in reader.read_to_end())


@pytest.mark.long
def test_two_clusters_and_a_worker_need_at_most_1500_megabytes(centres: Centres) -> None:
    """When they have worked for a while."""
    ways = [centres.out(), centres.back()]
    for topic, copy in ways:
        send(topic, range(50_000))
        assert arrived(copy, 50_000) == in_order(50_000)
    brokers = [centres.home.connection.broker, centres.google.connection.broker]
    used = [megabytes(broker.pid) for broker in brokers if broker is not None] + [centres.connect.memory / 1e6]
    print("home, google-dc, worker:", *(f"{one:.0f} MB" for one in used))
    assert len(used) == 3
    assert sum(used) <= 1500


def megabytes(pid: int) -> float:
    """Of a process and of those that it started."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 1e6
