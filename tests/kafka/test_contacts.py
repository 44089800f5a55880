"""Imports of contacts: what importers store and report, whatever happens to them; and two wrong ways to count."""

from __future__ import annotations

import csv
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import psycopg
import pytest
from consuming import Member, Process, fresh_group, fresh_topic, put
from processes import wait_until
from transacting import SETTINGS, values

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import Retry
from labkit.kafka.consumer.steps import Step
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record, encode
from labkit.kafka.topics import Topic
from labkit.lab.pods.travel import pack, unpack
from labkit.patterns.blocked_lanes import BlockedLanes
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import RetryingConsumer, blocking
from labkit.runtime.broker import free_ports
from labkit.services import contacts
from labkit.services.contacts import ContactsJob, Importer, Job, JobFinished, Progress, Reports

FILE = Path(__file__).parents[2] / "data" / "contacts.csv"


@pytest.fixture
def jobs(cluster: Cluster) -> Topic[ContactsJob]:
    return fresh_topic(cluster, 1, ContactsJob)


@pytest.fixture
def commands(cluster: Cluster) -> Topic[JobFinished]:
    return fresh_topic(cluster, 1, JobFinished)


@pytest.fixture
def importer(dsn: str, commands: Topic[JobFinished]) -> Iterator[Importer]:
    with closing(Importer(dsn, Reports(commands))) as importer:
        yield importer


def people(*names: str) -> BytesIO:
    """A CSV with a contact of each name; `!` in front makes the e-mail none."""
    rows = (f"{name},{'none' if name[0] == '!' else f'{name}@example.org'}\n" for name in names)
    return BytesIO(("name,email\n" + "".join(rows)).encode())


def reported(commands: Topic[JobFinished]) -> Counter[tuple[int, bool]]:
    """How often each job was reported, done (False) or failed."""
    return Counter((command.job, command.failed) for command in values(commands))


def progress_of(commands: Topic[JobFinished]) -> Progress:
    """What a store would have of the one import."""
    value: Progress | None = None
    for command in values(commands):
        value = contacts.progress(value, command)
    return value or Progress(1)


def rows(dsn: str) -> list[tuple[Any, ...]]:
    """All that is stored, and which transaction has written each row."""
    with psycopg.connect(dsn) as database:
        found = database.execute("select xmin::text, * from contacts order by email").fetchall()
        return found + database.execute("select xmin::text, * from bad_rows order by line").fetchall()


# -- an import ---------------------------------------------------------------------------------------------------------


def test_importers_share_an_import_and_store_each_contact_once(
    cluster: Cluster, dsn: str, commands: Topic[JobFinished], importer: Importer
) -> None:
    jobs = fresh_topic(cluster, 4, ContactsJob)
    assert contacts.stored(dsn, "YYY") == []
    assert contacts.bad_rows(dsn, "YYY") == []
    assert contacts.send_jobs(FILE, jobs, "YYY", size=50) == 20
    group = fresh_group()
    with Member(Consumer(jobs, importer, group)) as one, Member(Consumer(jobs, importer, group)) as other:
        journals = one.journal, other.journal
        one.journal.wait(lambda: sum(len(each.of(Step.HANDLED)) for each in journals) >= 20, 60, "20 jobs handled")
        wait_until(lambda: progress_of(commands).completed, 20, "the end of the import")
    assert progress_of(commands).done == 20

    expected, bad, line = {}, [], 1
    with open(FILE, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            line, begun = reader.line_num, line + 1
            email = row["email"].lower()
            if email.count("@") == 1 and email.split("@")[0] and email.split("@")[1].startswith("example."):
                expected[email] = contacts.Contact(row["name"], email, row["phone"], row["notes"])
            else:
                bad.append(begun)
    assert contacts.stored(dsn, "YYY") == [expected[email] for email in sorted(expected)]
    assert [one.line for one in contacts.bad_rows(dsn, "YYY")] == bad
    assert len(expected) + len(bad) < 1000  # some came again
    with psycopg.connect(dsn) as database:
        assert database.execute("select count(distinct job) from contacts").fetchall() == [(20,)]


def test_jobs_of_one_request_are_spread_and_their_reports_together(cluster: Cluster) -> None:
    jobs, commands = fresh_topic(cluster, 4, ContactsJob), fresh_topic(cluster, 4, JobFinished)
    names = [f"p{number}" for number in range(40)]
    contacts.send_jobs(people(*names), jobs, "YYY", size=1)
    with Member(Consumer(jobs, lambda record: Reports(commands)(record.value.job), fresh_group())) as member:
        member.journal.wait_for(Step.HANDLED, 40)
        member.journal.wait(lambda: len(values(commands)) == 40, what="all reports")
        partitions = Counter(record.partition for record in member.journal.of(Step.HANDLED))
    assert len(partitions) == 4
    assert max(partitions.values()) < 25
    found = placed(commands)
    assert len(found) == 1
    assert {key for _, key in found} == {"YYY-40"}


def placed(topic: Topic[Any]) -> set[tuple[int, str | None]]:
    """Partitions and keys of a topic's records."""
    with Reader(topic) as reader:
        return {(record.partition, record.key) for record in reader.read_to_end()}


def test_a_job_that_comes_twice_changes_nothing_and_is_reported_again(
    dsn: str, jobs: Topic[ContactsJob], commands: Topic[JobFinished], importer: Importer
) -> None:
    names = ("ada", "bea", "!cy", "ada")
    contacts.send_jobs(people(*names), jobs, "YYY", size=4)
    with Member(Consumer(jobs, importer, fresh_group())) as member:
        member.wait_committed({0: 1})
        before = rows(dsn)
        contacts.send_jobs(people(*names), jobs, "YYY", size=4)
        member.wait_committed({0: 2})
    assert len(before) == 3
    assert rows(dsn) == before
    assert reported(commands) == {(1, False): 2}
    assert progress_of(commands).done == 1


def test_the_last_line_counts_whichever_job_is_handled_first(
    dsn: str, jobs: Topic[ContactsJob], importer: Importer
) -> None:
    text = b"name,email\nAda,a@example.org\nBea,b@example.org\nAda Again,A@example.org\nCy,c@example.org\n"
    for job in reversed(list(contacts.split(BytesIO(text), "YYY", 2))):
        jobs.send(job, job.id)
    with Member(Consumer(jobs, importer, fresh_group())) as member:
        member.wait_committed({0: 2})
    assert [one.name for one in contacts.stored(dsn, "YYY")] == ["Ada Again", "Bea", "Cy"]


def test_two_requests_do_not_share_contacts(dsn: str, jobs: Topic[ContactsJob], importer: Importer) -> None:
    for request in ("YYY", "ZZZ"):
        contacts.send_jobs(people("ada", "!bea"), jobs, request)
    with Member(Consumer(jobs, importer, fresh_group())) as member:
        member.wait_committed({0: 2})
    assert [len(contacts.stored(dsn, request)) for request in ("YYY", "ZZZ")] == [1, 1]
    (bad,) = contacts.bad_rows(dsn, "ZZZ")
    assert bad.line == 3
    assert bad.reason.startswith("'none' is no e-mail")


def test_two_importers_with_the_same_contacts_never_wait_for_each_other_in_a_ring(
    dsn: str, jobs: Topic[ContactsJob], commands: Topic[JobFinished], importer: Importer
) -> None:
    """Somebody holds `m`. One job has z, m, a; the other one a, m, z: both begin with `a`."""
    contacts.send_jobs(people("warm-up"), jobs, "YYY")
    with Member(Consumer(jobs, importer, fresh_group(), order="key")) as member, psycopg.connect(dsn) as somebody:
        member.wait_committed({0: 1})
        somebody.execute("insert into contacts values ('ZZZ', 'm@example.org', '', '', '', 1, 1)")
        contacts.send_jobs(people("z", "m", "a", "a", "m", "z"), jobs, "ZZZ", size=3)
        wait_until(lambda: waiting(dsn) == 2, 20, "both importers to wait")
        somebody.rollback()
        member.wait_committed({0: 3})
        assert not member.journal.of(Step.FAILED)
    assert [one.name for one in contacts.stored(dsn, "ZZZ")] == ["a", "m", "z"]


def waiting(dsn: str) -> int:
    """How many connections to this database wait for somebody's lock."""
    sql = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with psycopg.connect(dsn) as database:
        return int(database.execute(sql).fetchall()[0][0])


# -- faults ------------------------------------------------------------------------------------------------------------


class Killed(Process):
    """An importer that is killed between rows and report."""

    script = "contact_member.py"


def test_killed_when_the_rows_are_stored_and_nothing_is_reported(
    dsn: str, jobs: Topic[ContactsJob], commands: Topic[JobFinished], importer: Importer
) -> None:
    contacts.send_jobs(people("ada", "!bea", "cy", "dan"), jobs, "YYY", size=2)
    with Killed(jobs, fresh_group(), dsn=dsn) as killed:
        killed.ends()
    before = rows(dsn)
    assert [one.name for one in contacts.stored(dsn, "YYY")] == ["ada"]
    assert values(commands) == []
    # Another group begins where this one would go on, which has committed nothing; and need not wait for its session.
    with Member(Consumer(jobs, importer, fresh_group())) as member:
        member.wait_committed({0: 2})
    assert [row for row in rows(dsn) if row in before] == before
    assert [one.name for one in contacts.stored(dsn, "YYY")] == ["ada", "cy", "dan"]
    assert reported(commands) == {(1, False): 1, (2, False): 1}


def test_exactly_once_a_report_is_there_once_though_its_handler_fails_after_it(
    dsn: str, jobs: Topic[ContactsJob], commands: Topic[JobFinished]
) -> None:
    contacts.send_jobs(people("ada", "bea", "cy"), jobs, "YYY", size=1)
    failed: set[Job] = set()

    def report(job: Job) -> None:
        Reports(commands)(job)
        if job not in failed:
            failed.add(job)
            raise ConnectionError("the first attempt")

    with (
        closing(Importer(dsn, report)) as importer,
        Member(Consumer(jobs, importer, fresh_group(), **SETTINGS, on_failure=lambda one: Retry(0.01))) as member,
    ):
        wait_until(lambda: len(values(commands)) == 3, 20, "the reports")
    assert len(member.journal.of(Step.FAILED)) == 3
    assert reported(commands) == {(job, False): 1 for job in (1, 2, 3)}
    assert len(contacts.stored(dsn, "YYY")) == 3


def test_a_job_that_is_given_up_ends_as_failed_and_is_done_after_its_replay(
    dsn: str, jobs: Topic[ContactsJob], commands: Topic[JobFinished], importer: Importer
) -> None:
    """One of six cannot be handled, and the value of another one does not decode."""
    mended = threading.Event()

    def handle(record: Record[ContactsJob]) -> None:
        if record.value.number == 3 and not mended.is_set():
            raise RuntimeError("poison")
        importer(record)

    for job in contacts.split(people("a", "b", "c", "d", "e", "f"), "YYY", 1):
        put(jobs, b"{" if job.number == 5 else encode(job), key=job.id)
    put(jobs, b"{", key="somebody else's")
    consumer = RetryingConsumer(jobs, handle, fresh_group(), retry=blocking(0.01)).prepare()
    failures = contacts.failed_jobs(jobs, consumer.group, Reports(commands), fresh_group())
    with Member(consumer), Member(failures):
        wait_until(lambda: progress_of(commands).completed, 20, "the end of the import")
        assert (progress_of(commands).done, progress_of(commands).failed) == (4, 2)
        assert len(contacts.stored(dsn, "YYY")) == 4
        mended.set()
        with DeadLetters(jobs, consumer.group) as letters:
            letters.replay(*(place for place, letter in letters.items() if letter.key == "YYY/3/6"))
            wait_until(lambda: progress_of(commands).done == 5, 20, "the replayed job")
        assert progress_of(commands).failed == 1
        assert progress_of(commands).completed
    assert len(contacts.stored(dsn, "YYY")) == 5


def test_a_job_that_somebody_skips_ends_as_failed(
    jobs: Topic[ContactsJob], commands: Topic[JobFinished], importer: Importer
) -> None:
    def handle(record: Record[ContactsJob]) -> None:
        if record.value.number == 1:
            raise RuntimeError("poison")
        importer(record)

    contacts.send_jobs(people("ada", "bea"), jobs, "YYY", size=1)
    consumer = RetryingConsumer(jobs, handle, fresh_group(), retry=blocking(60.0)).prepare()
    failures = contacts.failed_jobs(jobs, consumer.group, Reports(commands), fresh_group())
    with Member(consumer), Member(failures), BlockedLanes(jobs, consumer.group) as lanes:
        wait_until(lambda: len(lanes) == 1, 20, "the blocked lane")
        lanes.skip(*lanes)
        wait_until(lambda: progress_of(commands).completed, 20, "the end of the import")
    assert reported(commands) == {(1, True): 1, (2, False): 1}


def test_a_lost_connection_is_made_again(
    dsn: str, jobs: Topic[ContactsJob], commands: Topic[JobFinished], importer: Importer
) -> None:
    with Member(RetryingConsumer(jobs, importer, fresh_group(), retry=blocking(0.01))) as member:
        contacts.send_jobs(people("ada"), jobs, "YYY")
        member.wait_committed({0: 1})
        with psycopg.connect(dsn) as database:
            rest = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            database.execute(f"select pg_terminate_backend(pid, 20000) {rest}".encode())
        contacts.send_jobs(people("bea"), jobs, "ZZZ")
        member.wait_committed({0: 2})
        assert member.journal.of(Step.FAILED)
    assert len(values(commands)) == 2
    assert len(contacts.stored(dsn, "ZZZ")) == 1


def test_what_handles_jobs_travels_without_its_connections(
    dsn: str, jobs: Topic[ContactsJob], commands: Topic[JobFinished], importer: Importer
) -> None:
    contacts.send_jobs(people("ada"), jobs, "YYY")
    with Member(Consumer(jobs, importer, fresh_group())) as member:
        member.wait_committed({0: 1})
    there = unpack(pack(importer))
    assert isinstance(there, Importer)
    assert there.report == Reports(commands)
    failures = contacts.failed_jobs(jobs, "importers", Reports(commands), "failures")
    assert unpack(pack(failures)).sources == failures.sources
    with closing(unpack(pack(contacts.SharedRow(dsn)))) as row:
        assert row.counted("YYY") == 0


# -- the baselines -----------------------------------------------------------------------------------------------------


@contextmanager
def counting(service: contacts.CounterService) -> Iterator[None]:
    """The service, in a thread."""
    stop, up = threading.Event(), threading.Event()
    thread = threading.Thread(target=service.run, args=(stop, lambda *_: up.set()))
    thread.start()
    try:
        assert up.wait(20)
        yield
    finally:
        stop.set()
        thread.join(20)


def test_a_counter_in_memory_begins_at_0_when_its_pod_is_restarted() -> None:
    service = contacts.CounterService(free_ports()[0])
    report = contacts.InMemory(service.url)
    with counting(service):
        for number in (1, 2, 3):
            report(Job("a/b ü", number, 6))
        assert [report.counted(request) for request in ("a/b ü", "YYY")] == [3, 0]
    with counting(service):
        for number in (4, 5, 6):
            report(Job("a/b ü", number, 6))
        assert report.counted("a/b ü") == 3


@pytest.mark.parametrize(("together", "counted"), [(False, 2), (True, 1)])
def test_a_shared_row_forgets_one_of_two_that_come_at_once(dsn: str, together: bool, counted: int) -> None:
    both = threading.Barrier(2)
    between: Callable[[], object] = both.wait if together else int
    with closing(contacts.SharedRow(dsn, between)) as row:
        assert row.counted("YYY") == 0
        threads = [threading.Thread(target=row, args=(Job("YYY", number, 2),)) for number in (1, 2)]
        for thread in threads:
            thread.start()
            if not together:
                thread.join(20)
        for thread in threads:
            thread.join(20)
        assert row.counted("YYY") == counted
