"""Contacts over HTTP: the upload that becomes jobs, whatever the sender does; and the formatting service."""

from __future__ import annotations

import re
import select
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from consuming import Member, fresh_group, fresh_topic
from processes import wait_until
from transacting import values

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.topics import Topic
from labkit.lab.travel import pack, unpack
from labkit.patterns.retries import RetryingConsumer, blocking, exponential
from labkit.runtime.broker import free_ports
from labkit.services import contacts
from labkit.services.clients import ask
from labkit.services.contacts import (
    ContactsJob,
    ContactsJobs,
    Formatting,
    FormattingFailed,
    FormattingService,
    Importer,
)
from labkit.services.contacts.content import Contact
from labkit.services.contacts.notices import ImportNotice
from labkit.services.http import HOST, HttpService

FILE = Path(__file__).parents[2] / "data" / "contacts.csv"
HEADER = b"name,email\n"
Told = list[tuple[str, ImportNotice]]


class Served(ExitStack):
    """Services in threads, until the block ends."""

    def serve(self, service: HttpService) -> None:
        stop, up = threading.Event(), threading.Event()
        thread = threading.Thread(target=service.run, args=(stop, lambda *_: up.set()))
        thread.start()
        self.callback(thread.join, 30)
        self.callback(stop.set)
        assert up.wait(20)


@pytest.fixture
def served() -> Iterator[Served]:
    with Served() as served:
        yield served


@pytest.fixture
def jobs(cluster: Cluster) -> Topic[ContactsJob]:
    return fresh_topic(cluster, 1, ContactsJob)


@pytest.fixture
def told() -> Told:
    """What was notified: channels and notices."""
    return []


@pytest.fixture
def service(served: Served, jobs: Topic[ContactsJob], told: Told) -> ContactsJobs:
    """For small files, one at a time."""
    service = ContactsJobs(free_ports()[0], jobs, lambda *one: told.append(one), largest=100_000, at_once=1)
    served.serve(service)
    return service


def upload(service: ContactsJobs, data: bytes, channel: str = "c1") -> tuple[int, str]:
    """Status and text of the answer; again while another upload is being sent."""
    while True:
        answer = ask(f"{service.url}/channels/{channel}/imports", "POST", data)
        if answer[0] != 503:
            return answer


class Sender:
    """An upload by hand: it says what it likes of its length, and sends what it likes."""

    def __init__(self, service: ContactsJobs, *headers: str) -> None:
        self.socket = socket.create_connection((HOST, service.port), timeout=30)
        self.send("\r\n".join(("POST /channels/c1/imports HTTP/1.1", "Host: labkit", *headers, "", "")).encode())

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answered(self) -> bool:
        return bool(select.select([self.socket], [], [], 0.02)[0])

    def status(self) -> int:
        """Of the first answer, whatever comes of the connection."""
        found = re.match(rb"HTTP/1\.1 (\d+) ", self.socket.recv(100))
        assert found
        return int(found[1])

    def statuses(self) -> list[int]:
        """Of all answers, until the service closes the connection."""
        data = b""
        while piece := self.socket.recv(65536):
            data += piece
        return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+)", data)]

    def close(self) -> None:
        self.socket.close()


# -- an upload ---------------------------------------------------------------------------------------------------------


def test_an_upload_is_answered_with_nothing_and_becomes_jobs(
    service: ContactsJobs, jobs: Topic[ContactsJob], told: Told
) -> None:
    assert upload(service, FILE.read_bytes()) == (202, "")
    ((channel, notice),) = told
    assert (channel, notice.stage, notice.total) == ("c1", "accepted", 10)
    assert contacts.channel_of(notice.request) == "c1"
    wait_until(lambda: len(values(jobs)) == 10, 20, "the jobs")
    assert [(job.request, job.number) for job in values(jobs)] == [(notice.request, number) for number in range(1, 11)]
    assert sum(len(job.rows) for job in values(jobs)) == 1000


def test_one_row_is_an_import_and_each_upload_is_one_of_its_own(
    service: ContactsJobs, jobs: Topic[ContactsJob], told: Told
) -> None:
    for channel in ("c1", "c1", "c2"):
        assert upload(service, HEADER + b"Ada,a@example.org", channel) == (202, "")
    wait_until(lambda: len(values(jobs)) == 3, 20, "the jobs")
    assert [channel for channel, _ in told] == ["c1", "c1", "c2"]
    assert len({job.request for job in values(jobs)}) == 3


def test_the_answer_does_not_wait_for_kafka_and_the_jobs_follow_when_it_can(
    cluster: Cluster, served: Served, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their topic is not there yet."""
    made = fresh_topic(cluster, 1, ContactsJob)
    missing = Topic(cluster, f"{made.name}-later", 1, ContactsJob)
    service = ContactsJobs(free_ports()[0], missing, lambda *one: told.append(one))
    served.serve(service)
    assert upload(service, HEADER + b"Ada,a@example.org\n") == (202, "")
    wait_until(lambda: "it is sent again" in capsys.readouterr().err, 20, "the first attempt to fail")
    missing.create()
    wait_until(lambda: values(missing), 30, "the job")
    assert {job.id for job in values(missing)} == {f"{told[0][1].request}/1/1"}


@pytest.mark.parametrize(
    ("data", "told_why"),
    [
        (b"", "the file is empty"),
        (HEADER, "a header and no contacts"),
        (b"first,last\nAda,Amberwick\n", "no column name and no column email"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1 is not UTF-8"),
        (HEADER + b'Ada,a@example.org\n"Bea,b@example.org\n', "line 3: this is no CSV"),
    ],
)  # fmt: skip
def test_what_is_no_csv_of_contacts_is_refused_in_the_answer(
    service: ContactsJobs, jobs: Topic[ContactsJob], told: Told, data: bytes, told_why: str
) -> None:
    status, text = upload(service, data)
    assert status == 400
    assert told_why in text
    assert upload(service, HEADER + b"Ada,a@example.org\n") == (202, "")
    wait_until(lambda: values(jobs), 20, "the good one's job")
    assert len(values(jobs)) == len(told) == 1


def test_an_upload_that_stalls_or_drips_ends_and_leaves_nothing(
    served: Served, jobs: Topic[ContactsJob], told: Told
) -> None:
    service = ContactsJobs(free_ports()[0], jobs, lambda *one: told.append(one), patience=0.2, at_once=1)
    served.serve(service)
    for drips in (False, True, False):  # each but the first one finds the place free that the one before it had
        with closing(Sender(service, "Content-Length: 90000")) as sender:
            sender.send(HEADER + b"Ada,a@example.org\n")
            while drips and not sender.answered():
                sender.send(b"x")
            assert sender.status() == 408
    served.close()
    assert not told
    assert not values(jobs)


def test_an_upload_that_breaks_off_leaves_nothing(service: ContactsJobs, jobs: Topic[ContactsJob], told: Told) -> None:
    for header in ("Content-Length: 90000", "Transfer-Encoding: chunked"):
        with closing(Sender(service, header)) as sender:
            sender.send(b"1d\r\n" * ("chunked" in header) + HEADER + b"Ada,a@example.org\n")
    assert upload(service, HEADER + b"Bea,b@example.org\n") == (202, "")  # though only one may be under way
    wait_until(lambda: values(jobs), 20, "the good one's job")
    assert len(values(jobs)) == len(told) == 1


def test_an_upload_that_is_longer_than_it_says_counts_as_far_as_it_says(
    service: ContactsJobs, jobs: Topic[ContactsJob]
) -> None:
    said = HEADER + b"Ada,a@example.org\n"
    with closing(Sender(service, f"Content-Length: {len(said)}", "Expect: 100-continue")) as sender:
        assert sender.status() == 100  # in one piece with its beginning it would be refused as a whole
        sender.send(said + b"Bea,b@example.org\n\r\n\r\n")
        assert sender.statuses()[0] == 202
    wait_until(lambda: values(jobs), 20, "the job")
    assert [[row.cells for row in job.rows] for job in values(jobs)] == [[["Ada", "a@example.org"]]]


def test_an_upload_that_is_too_large_is_refused_by_what_it_says_or_by_what_comes(
    service: ContactsJobs, told: Told
) -> None:
    with closing(Sender(service, "Content-Length: 100001", "Connection: close")) as sender:
        assert sender.status() == 413
    with closing(Sender(service, "Transfer-Encoding: chunked", "Connection: close")) as sender:
        for _ in range(14):
            sender.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert sender.status() == 413
    assert not told


def test_more_than_may_be_under_way_are_told_to_come_again(served: Served, jobs: Topic[ContactsJob]) -> None:
    service = ContactsJobs(free_ports()[0], jobs, at_once=1)
    served.serve(service)
    data = HEADER + b"Ada,a@example.org\n"
    with closing(Sender(service, f"Content-Length: {len(data)}", "Connection: close")) as sender:
        wait_until(lambda: ask(f"{service.url}/channels/c2/imports", "POST", b"")[0] == 503, 20, "the first to hold it")
        sender.send(data)
        assert sender.statuses() == [202]
    assert upload(service, data) == (202, "")


def test_an_unknown_channel_is_refused_before_there_is_an_upload(served: Served, jobs: Topic[ContactsJob]) -> None:
    service = ContactsJobs(free_ports()[0], jobs, permits={"c1"}.__contains__)
    served.serve(service)
    assert upload(service, HEADER + b"Ada,a@example.org\n", "c2")[0] == 403
    assert upload(service, HEADER + b"Ada,a@example.org\n", "c1")[0] == 202


def test_a_large_upload_is_sent_in_bounded_memory(served: Served, jobs: Topic[ContactsJob]) -> None:
    service = ContactsJobs(free_ports()[0], jobs)
    served.serve(service)
    row, count = b"Ada,a%d@example.org," + b"x" * 9_000 + b"\n", 5_000
    header = b"name,email,notes\n"
    length = len(header) + sum(len(row % number) for number in range(count))
    tracemalloc.start()
    with closing(Sender(service, f"Content-Length: {length}", "Connection: close")) as sender:
        sender.send(header)
        for number in range(count):
            sender.send(row % number)
        assert sender.statuses() == [202]
    served.close()  # the service ends when all jobs are sent
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000_000 < length
    assert sum(len(job.rows) for job in values(jobs)) == count


def test_a_formula_is_stored_as_the_text_that_it_is(
    service: ContactsJobs, jobs: Topic[ContactsJob], dsn: str, told: Told
) -> None:
    names = ['=HYPERLINK("http://example.org")', "@SUM(1+1)", "+1-1", "-2+3", "=cmd|' /C calc'!A0"]
    rows = (f'"{name.replace(chr(34), chr(34) * 2)}",p{number}@example.org\n' for number, name in enumerate(names))
    assert upload(service, HEADER + "".join(rows).encode()) == (202, "")
    with (
        closing(Importer(dsn, lambda job: None)) as importer,
        Member(Consumer(jobs, importer, fresh_group())) as member,
    ):
        member.wait_committed({0: 1})
    assert [one.name for one in contacts.stored(dsn, told[0][1].request)] == names


def test_the_browser_of_a_channel_hears_of_each_job_and_each_bad_row(
    service: ContactsJobs, jobs: Topic[ContactsJob], dsn: str, told: Told
) -> None:
    assert upload(service, HEADER + b'Ada,"no\nne"\nBea,b@example.org\nCy,\n') == (202, "")
    with (
        closing(Importer(dsn, lambda job: None, lambda *one: told.append(one))) as importer,
        Member(Consumer(jobs, importer, fresh_group())) as member,
    ):
        contacts.send_jobs(FILE, jobs, "of no channel")
        member.wait_committed({0: 11})
    assert {channel for channel, _ in told} == {"c1"}
    request = told[0][1].request
    assert [notice.id for _, notice in told] == [
        f"accepted/{request}/0/0",
        f"consumed/{request}/1/0",
        f"failed row/{request}/1/2",
        f"failed row/{request}/1/5",
    ]
    assert told[3][1].reason == "no e-mail"


# -- the formatting service --------------------------------------------------------------------------------------------

GOOGLE = b"First Name,Last Name,E-mail 1 - Value,Phone 1 - Value\nADA,AMBERWICK,a@example.org,+1 (202) 555-0101\n"
FOR_EVER = blocking(exponential(0.01, cap=0.1))
ADA = Contact("Ada Amberwick", "a@example.org", "+1 202 555 0101")


@pytest.fixture
def formatter(served: Served) -> FormattingService:
    service = FormattingService(free_ports()[0], takes=0)
    served.serve(service)
    return service


def test_every_fault_of_the_formatting_service_is_told(formatter: FormattingService) -> None:
    formatting = unpack(pack(Formatting(formatter.url)))
    asked = [
        Contact("  Zoë   Q. ", "z@example.org", "0163 / 2960-001", "  as it is"),
        Contact("McAda", "a@example.org"),
    ]
    expected = [Contact("Zoë Q.", "z@example.org", "0163 2960 001", "  as it is"), Contact("McAda", "a@example.org")]
    assert formatting(asked) == expected
    assert formatting(expected) == expected
    for misbehaviour in ({"errors": 1.0}, {"errors": 1.0, "status": 429}, {"wrong": True}):
        formatter.faults.tell("formatting", misbehaviour)
        with pytest.raises(FormattingFailed):
            formatting(asked)
    formatter.faults.tell("formatting", {"delay": 1.0})
    with pytest.raises(FormattingFailed):
        Formatting(formatter.url, patience=0.1)(asked)
    formatter.faults.tell("formatting", {"cut": 1})
    with pytest.raises(FormattingFailed):
        formatting(asked)
    assert formatting(asked) == expected
    assert ask(f"{formatter.url}/format", "POST", b"{")[0] == 400


def test_google_contacts_are_formatted_as_soon_as_the_service_is_back_and_stored_once(
    formatter: FormattingService, jobs: Topic[ContactsJob], dsn: str, tmp_path: Path
) -> None:
    (tmp_path / "google.csv").write_bytes(GOOGLE)
    formatter.faults.tell("formatting", {"errors": 1.0})
    reported: list[contacts.Job] = []
    with (
        closing(Importer(dsn, reported.append, formatting=Formatting(formatter.url))) as importer,
        Member(RetryingConsumer(jobs, importer, fresh_group(), retry=FOR_EVER)) as member,
    ):
        contacts.send_jobs(tmp_path / "google.csv", jobs, "YYY")
        member.journal.wait_for(Step.FAILED, 2)
        assert contacts.stored(dsn, "YYY") == []
        assert not reported
        formatter.faults.tell("formatting", {})
        member.wait_committed({0: 1})
    assert contacts.stored(dsn, "YYY") == [ADA]
    assert len(reported) == 1


def test_other_contacts_need_no_formatting_service(jobs: Topic[ContactsJob], dsn: str) -> None:
    nobody = Formatting(f"http://{HOST}:{free_ports()[0]}")
    with (
        closing(Importer(dsn, lambda job: None, formatting=nobody)) as importer,
        Member(Consumer(jobs, importer, fresh_group())) as member,
    ):
        contacts.send_jobs(FILE, jobs, "YYY")
        member.wait_committed({0: 10})
        assert not member.journal.of(Step.FAILED)
    assert len(contacts.stored(dsn, "YYY")) > 900
