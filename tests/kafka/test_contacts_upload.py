"""Contacts over HTTP: the upload that becomes jobs, whatever the sender does, and the state for who starts over."""

from __future__ import annotations

import json
import threading
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from consuming import Member, fresh_group
from processes import wait_until
from transacting import values
from uploading import FILE, HEADER, MINE, SECRET, YOURS, Imports, Sender, in_process, upload

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.lag import end_offsets
from labkit.services import contacts
from labkit.services.clients import ask, direct
from labkit.services.contacts import ContactsJob, ContactsJobs, Importer, Job
from labkit.services.notifications import Channel, Channels

ADA = HEADER + b"Ada,a@example.org\n"


@pytest.fixture
def imports(cluster: Cluster) -> Iterator[Imports]:
    with Imports(cluster) as imports:
        yield imports


def sent(imports: Imports, count: int) -> list[ContactsJob]:
    """The jobs, once there are so many."""
    wait_until(lambda: len(values(imports.jobs)) >= count, 20, "the jobs")
    found = values(imports.jobs)
    assert len(found) == count
    return found


# -- an upload ---------------------------------------------------------------------------------------------------------


def test_an_upload_is_answered_with_nothing_and_becomes_jobs(imports: Imports) -> None:
    service = imports.front()
    url = f"{service.url}/channels/{MINE.id}/imports"
    with direct(urllib.request.Request(url, FILE.read_bytes()), timeout=30) as answer:
        assert (answer.status, answer.read()) == (202, b"")
        request = answer.headers["Import-Request"]
    assert contacts.channel_of(request) == MINE.id
    assert imports.heard() == [(MINE.id, contacts.ImportNotice("accepted", request, 10))]
    found = sent(imports, 10)
    assert [(job.request, job.number) for job in found] == [(request, number) for number in range(1, 11)]
    assert sum(len(job.rows) for job in found) == 1000


def test_one_row_is_an_import_and_each_upload_is_one_of_its_own(imports: Imports) -> None:
    service = imports.front()
    for channel in (MINE, MINE, YOURS):
        assert upload(service, HEADER + b"Ada,a@example.org", channel) == (202, "")
    assert len({job.request for job in sent(imports, 3)}) == 3
    assert [channel for channel, _ in imports.heard()] == [MINE.id, MINE.id, YOURS.id]


def test_the_answer_does_not_wait_for_kafka_and_the_jobs_follow_when_it_can(
    imports: Imports, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their topic is not there yet."""
    imports.jobs = replace(imports.jobs, name=f"{imports.jobs.name}-later")
    assert upload(imports.front(), ADA) == (202, "")
    wait_until(lambda: "it is sent again" in capsys.readouterr().err, 20, "the first attempt to fail")
    imports.jobs.create()
    wait_until(lambda: values(imports.jobs), 30, "the job")
    assert {job.request for job in values(imports.jobs)} == {notice.request for _, notice in imports.heard()}


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
def test_what_is_no_csv_of_contacts_is_refused_in_the_answer(imports: Imports, data: bytes, told_why: str) -> None:
    service = imports.front()
    status, text = upload(service, data)
    assert status == 400
    assert told_why in text
    assert upload(service, ADA) == (202, "")
    sent(imports, 1)
    assert len(imports.heard()) == 1


def test_a_code_page_is_believed_where_it_is_named_and_never_guessed(imports: Imports) -> None:
    """The letters are others in another one, or none."""
    service = imports.front(largest=1 << 28)
    data = b"name,email\n" + "Łukasz,l@example.org\nŇura,z@example.org\n".encode("cp1250")
    data += b"x,x@example.org\n" * 10_000  # several pieces
    for charset, status in {
        "": 400,
        "utf-8": 400,
        "Windows-1250": 202,
        "windows-1253": 400,
        "iso-8859-99": 400,
    }.items():
        assert upload(service, data, charset=charset)[0] == status
    jobs = sent(imports, 101)
    assert [row.cells[0] for row in jobs[0].rows[:2]] == ["Łukasz", "Ňura"]
    assert sum(len(job.rows) for job in jobs) == 10_002


def test_an_upload_that_stalls_or_drips_ends_and_leaves_nothing(imports: Imports) -> None:
    service = imports.front(patience=0.2)
    for drips in (False, True, False):  # each but the first one finds the place free that the one before it had
        with closing(Sender(service, "Content-Length: 90000")) as sender:
            sender.send(ADA)
            while drips and not sender.answered():
                sender.send(b"x")
            assert sender.status() == 408
    imports.close()
    assert not imports.heard()
    assert not values(imports.jobs)


def test_an_upload_that_breaks_off_leaves_nothing(imports: Imports) -> None:
    service = imports.front()
    for header in ("Content-Length: 90000", "Transfer-Encoding: chunked"):
        with closing(Sender(service, header)) as sender:
            sender.send(b"1d\r\n" * ("chunked" in header) + ADA)
    assert upload(service, HEADER + b"Bea,b@example.org\n") == (202, "")  # though only one may be under way
    assert [job.rows[0].cells[0] for job in sent(imports, 1)] == ["Bea"]
    assert len(imports.heard()) == 1


def test_an_upload_that_is_longer_than_it_says_counts_as_far_as_it_says(imports: Imports) -> None:
    with closing(Sender(imports.front(), f"Content-Length: {len(ADA)}", "Expect: 100-continue")) as sender:
        assert sender.status() == 100  # in one piece with its beginning it would be refused as a whole
        sender.send(ADA + b"Bea,b@example.org\n\r\n\r\n")
        assert sender.statuses()[0] == 202
    assert [[row.cells for row in job.rows] for job in sent(imports, 1)] == [[["Ada", "a@example.org"]]]


def test_an_upload_that_is_too_large_is_refused_by_what_it_says_or_by_what_comes(imports: Imports) -> None:
    service = imports.front()
    with closing(Sender(service, "Content-Length: 100001", "Connection: close")) as sender:
        assert sender.status() == 413
    with closing(Sender(service, "Transfer-Encoding: chunked", "Connection: close")) as sender:
        for _ in range(14):
            sender.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert sender.status() == 413
    assert not imports.heard()


def test_more_than_may_be_under_way_are_told_to_come_again(imports: Imports) -> None:
    service = imports.front()
    with closing(Sender(service, f"Content-Length: {len(ADA)}", "Connection: close")) as sender:
        url = f"{service.url}/channels/{YOURS.id}/imports"
        wait_until(lambda: ask(url, "POST", b"")[0] == 503, 20, "the first to hold the place")
        sender.send(ADA)
        assert sender.statuses() == [202]
    assert upload(service, ADA) == (202, "")


@pytest.mark.parametrize(
    ("channel", "status"),
    [
        (MINE._replace(id="unknown"), 403),
        (Channels("of somebody who has another one").make(3600), 403),  # forged
        (Channels(SECRET).make(-1), 410),  # expired
    ],
)  # fmt: skip
def test_what_is_no_channel_of_ours_is_refused_before_there_is_an_upload(
    imports: Imports, channel: Channel, status: int
) -> None:
    service = imports.front()
    assert upload(service, ADA, channel)[0] == status
    assert ask(f"{service.url}/channels/{channel.id}/imports")[0] == status
    assert not imports.heard()


def test_a_large_upload_is_sent_in_bounded_memory(imports: Imports) -> None:
    service = imports.front(largest=1 << 28)
    row, count = b"Ada,a%d@example.org," + b"x" * 9_000 + b"\n", 3_000
    header = b"name,email,notes\n"
    length = len(header) + sum(len(row % number) for number in range(count))
    tracemalloc.start()
    with closing(Sender(service, f"Content-Length: {length}", "Connection: close")) as sender:
        sender.send(header)
        for number in range(count):
            sender.send(row % number)
        assert sender.statuses() == [202]
    imports.close()  # the service ends when all jobs are sent
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000_000 < length
    assert sum(len(job.rows) for job in values(imports.jobs)) == count


def test_a_formula_is_stored_as_the_text_that_it_is(cluster: Cluster, dsn: str) -> None:
    names = ['=HYPERLINK("http://example.org")', "@SUM(1+1)", "+1-1", "-2+3", "=cmd|' /C calc'!A0"]
    rows = (f'"{name.replace(chr(34), chr(34) * 2)}",p{number}@example.org\n' for number, name in enumerate(names))
    with Imports(cluster, dsn) as imports:
        assert upload(imports.front(), HEADER + "".join(rows).encode()) == (202, "")
        with (
            closing(Importer(dsn, lambda job: None)) as importer,
            Member(Consumer(imports.jobs, importer, fresh_group())) as member,
        ):
            member.wait_committed({0: 1})
        ((_, accepted),) = imports.heard()
    assert [one.name for one in contacts.stored(dsn, accepted.request)] == names


@pytest.mark.long
def test_a_million_rows_are_sent_in_100_mb_and_the_first_jobs_are_there_long_before_the_last(
    imports: Imports, tmp_path: Path
) -> None:
    path = tmp_path / "million.csv"
    contacts.write_csv(path, contacts.contacts(1_000_000))
    most = 0

    def grown(process: psutil.Process) -> None:
        nonlocal most
        most = max(most, process.memory_info().rss)

    with in_process(imports.service(largest=1 << 28)) as (service, process), open(path, "rb") as file:
        request = urllib.request.Request(f"{service.url}/channels/{MINE.id}/imports", file.read(), method="POST")
        uploading = threading.Thread(target=lambda: direct(request, timeout=300).close())
        uploading.start()
        seen: list[int] = []
        while not seen or seen[-1] < 10_000:
            grown(process)
            seen.append(sum(end_offsets(imports.jobs.cluster, [imports.jobs.name]).values()))
        uploading.join(60)
    assert [notice.total for _, notice in imports.heard()] == [10_000]
    assert len({one for one in seen if 0 < one < 10_000}) > 10
    assert most < 100_000_000


# -- the state and the page --------------------------------------------------------------------------------------------


def state(service: ContactsJobs, channel: Channel, key: str | None = None) -> tuple[int, Any]:
    """Status and imports of the answer to who asks with this key; with the channel's own if none is given."""
    url = f"{service.url}/channels/{channel.id}/imports"
    request = urllib.request.Request(url, headers={"Channel-Key": channel.key if key is None else key})
    try:
        with direct(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, None


def test_who_starts_over_reads_how_far_the_imports_of_its_channel_are(
    cluster: Cluster, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labkit.services.contacts.state.FIRST", 1)
    monkeypatch.setattr("labkit.services.contacts.state.NEWEST", 2)
    with Imports(cluster, dsn) as imports, closing(Importer(dsn, imports.reports)) as importer:
        service = imports.front(size=1)
        assert state(service, MINE) == (200, [])
        for channel, name in ((MINE, b"oldest"), (MINE, b"old"), (YOURS, b"foreign"), (MINE, b"new")):
            rows = b"%b,%b@example.org\n" % (name, name) + (b"x,\ny,none\n" if name == b"new" else b"")
            assert upload(service, HEADER + rows, channel) == (202, "")
        requests = {job.rows[0].cells[0]: job.request for job in sent(imports, 6)}
        with Member(Consumer(imports.jobs, importer, fresh_group())), Member(imports.store.consumer("one")):
            imports.reports(Job(requests["new"], 2, 3), failed=True)  # before it is done
            wait_until(lambda: len(imports.ended()) == 4, 20, "the end of all imports")
        assert state(service, MINE, YOURS.key)[0] == state(service, MINE, "")[0] == 403
        status, (old, new) = state(service, MINE)
        _, foreign = state(service, YOURS)
    assert status == 200
    assert [one["request"] for one in foreign] == [requests["foreign"]]
    figures = {"total": 1, "done": 1, "failed": 0, "completed": True, "bad_rows": [], "bad_row_count": 0}
    assert old == {"request": requests["old"], **figures}
    assert (new["request"], new["total"], new["done"], new["completed"]) == (requests["new"], 3, 3, True)
    assert (new["bad_rows"], new["bad_row_count"]) == ([{"line": 3, "reason": "no e-mail"}], 2)


def test_the_page_is_served_with_headers_that_let_it_do_what_it_does_and_no_more(imports: Imports) -> None:
    service = imports.front()
    for path, kind in {"": "html", "page.js": "javascript", "page.css": "css"}.items():
        with direct(f"{service.url}/{path}", timeout=30) as answer:
            assert (answer.headers.get_content_subtype(), bool(answer.read())) == (kind, True)
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            allowed = answer.headers["Content-Security-Policy"]
        assert f"ws://*:{service.notifications_port}" in allowed
        assert "default-src 'none'" in allowed
        assert "unsafe" not in allowed
        assert "frame-ancestors" not in allowed  # a notebook shows it in a frame
    assert ask(f"{service.url}/settings.json") == (200, {"notifications_port": service.notifications_port})
    assert ask(f"{service.url}/__init__.py")[0] == 404
