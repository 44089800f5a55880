"""What a browser is told of its import, stage by stage, through a topic."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from typing import Any

import aiohttp
import msgspec
import pytest
from consuming import Member, fresh_group, put
from noticing import Page, serving
from processes import wait_until
from transacting import SETTINGS, values
from uploading import FILE, HEADER, MINE, YOURS, Imports, upload

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.records import Record
from labkit.lab.pods.travel import pack, unpack
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import RetryingConsumer, blocking
from labkit.services import contacts
from labkit.services.contacts import Contact, ContactsJob, ContactsJobs, Counted, Importer, ImportNotice, Job
from labkit.services.notifications import Channel

GUARANTEES = pytest.mark.parametrize(
    "settings", [{}, pytest.param(SETTINGS, marks=pytest.mark.long)], ids=["at least once", "exactly once"]
)


@pytest.fixture
def imports(cluster: Cluster, dsn: str) -> Iterator[Imports]:
    with Imports(cluster, dsn) as imports:
        yield imports


@GUARANTEES
def test_every_stage_reaches_the_channel_of_the_import(imports: Imports, settings: dict[str, Any]) -> None:
    service = imports.front(size=2)
    mine, yours = HEADER + b'Ada,"no\nne"\nBea,b@example.org\nCy,\n', HEADER + b"Dan,d@example.org\n"
    with (
        closing(Importer(imports.dsn, imports.reports, imports.told)) as importer,
        Member(Consumer(imports.jobs, importer, fresh_group(), **settings)),
        Member(imports.store.consumer("one")),
    ):
        assert upload(service, mine, MINE) == (202, "")
        assert upload(service, yours, YOURS) == (202, "")
        contacts.send_jobs(FILE, imports.jobs, "of no channel")
        wait_until(lambda: len(imports.ended()) == 2, 30, "the end of both imports")
    heard = imports.heard()
    assert {channel for channel, _ in heard} == {MINE.id, YOURS.id}
    notices = [notice for channel, notice in heard if channel == MINE.id]
    request = notices[0].request
    by_id = {notice.id: notice for notice in notices}
    assert notices[0] == ImportNotice("accepted", request, 2)
    assert notices[-1] == ImportNotice("completed", request, 2, done=2)
    assert by_id[f"failed row/{request}/1/2"].reason.startswith("'no\\nne' is no e-mail")
    assert by_id[f"failed row/{request}/2/5"].reason == "no e-mail"
    assert {f"consumed/{request}/{job}/0" for job in (1, 2)} < by_id.keys()
    progress = [notice.done for notice in notices if notice.stage == "processed"]
    assert progress in ([1, 2], [2])  # two jobs that are counted together are one change
    assert len(by_id) == len(notices) == 6 + len(progress)


@GUARANTEES
def test_that_a_job_was_consumed_is_told_while_its_handler_runs(imports: Imports, settings: dict[str, Any]) -> None:
    answer = threading.Event()

    def formatting(asked: list[Contact]) -> list[Contact]:
        assert answer.wait(60)
        return asked

    request = contacts.request_of(MINE.id, "one")
    text = b"First Name,E-mail 1 - Value\nAda,a@example.org\nBea,none\n"
    contacts.send_jobs(BytesIO(text), imports.jobs, request)
    with (
        closing(Importer(imports.dsn, imports.reports, imports.told, formatting)) as importer,
        Member(Consumer(imports.jobs, importer, fresh_group(), **settings)) as member,
    ):
        try:
            wait_until(imports.heard, 20, "the notice")
            assert imports.heard() == [(MINE.id, ImportNotice("consumed", request, 1, 1))]
            assert not values(imports.commands)
        finally:
            answer.set()
        wait_until(lambda: len(values(imports.commands)) == 1, 20, "the report")
        member.stop()
    assert [notice.stage for _, notice in imports.heard()] == ["consumed", "failed row"]


def test_an_import_is_completed_once_though_a_job_of_it_is_done_later(imports: Imports) -> None:
    """One of three cannot be handled at first, and one is reported again."""
    mended = threading.Event()
    request = contacts.request_of(MINE.id, "one")

    with closing(Importer(imports.dsn, imports.reports, imports.told)) as importer:

        def handle(record: Record[ContactsJob]) -> None:
            if record.value.number == 2 and not mended.is_set():
                raise RuntimeError("poison")
            importer(record)

        consumer = RetryingConsumer(imports.jobs, handle, fresh_group(), retry=blocking(0.01)).prepare()
        failures = contacts.failed_jobs(imports.jobs, consumer.group, imports.reports, fresh_group())
        with Member(consumer), Member(failures), Member(imports.store.consumer("one")):
            rows = b"Ada,a@example.org\nBea,b@example.org\nCy,c@example.org\n"
            contacts.send_jobs(BytesIO(HEADER + rows), imports.jobs, request, 1)
            wait_until(imports.ended, 30, "the end of the import")
            with DeadLetters(imports.jobs, consumer.group) as letters:
                mended.set()
                letters.replay(*letters)
            wait_until(lambda: imports.heard()[-1][1].done == 3, 30, "the replayed job")
            for number in (1, 2, 3):
                imports.reports(Job(request, number, 3))
            put(imports.commands, b"{", key=f"{request}-3")
            with imports.store.dead_letters() as behind:
                wait_until(lambda: behind.items(), 20, "what was reported again to be counted")
    assert imports.ended() == [request]
    progress = [(notice.done, notice.failed) for _, notice in imports.heard() if notice.stage == "processed"]
    assert progress[-2:] == [(2, 1), (3, 0)]
    assert len(set(progress)) == len(progress)


def test_an_import_completes_without_its_browser_and_the_result_waits_for_it(imports: Imports) -> None:
    """The page goes when one of three jobs has ended. What it has missed it is told when it is back."""
    gone = threading.Event()

    def report(job: Job) -> None:
        assert job.number == 1 or gone.wait(60)
        imports.reports(job)

    async def browse(service: ContactsJobs, notifications: str) -> list[ImportNotice]:
        async with aiohttp.ClientSession() as session:
            page = Page(session, notifications)
            told = await page.open()
            assert await page.listen() == "nothing missed"
            rows = HEADER + b"Ada,a@example.org\nBea,none\nCy,c@example.org\n"
            channel = Channel(told["channel"], told["key"], 0)
            assert (await asyncio.to_thread(upload, service, rows, channel))[0] == 202
            found = [await heard(page)]
            while found[-1].stage != "processed":
                found.append(await heard(page))
            await page.socket.close()
            gone.set()
            await asyncio.to_thread(wait_until, imports.ended, 30, "the end of the import")
            assert await page.listen() == "missed"
            while found[-1].stage != "completed":
                found.append(await heard(page))
            return found

    async def heard(page: Page) -> ImportNotice:
        return msgspec.convert((await page.hear())["notice"], ImportNotice)

    with (
        closing(Importer(imports.dsn, report, imports.told)) as importer,
        Member(Consumer(imports.jobs, importer, fresh_group())),
        Member(imports.store.consumer("one")),
        serving(imports.notices) as notifications,
    ):
        found = asyncio.run(browse(imports.front(size=1), notifications.url))
    assert (found[0].stage, found[-1].done) == ("accepted", 3)
    assert [notice.line for notice in found if notice.stage == "failed row"] == [3]
    assert len({notice.id for notice in found}) == len(found)


def test_what_tells_travels(imports: Imports) -> None:
    service = replace(imports.front(), port=0)
    assert unpack(pack(service)) == service
    counted = Counted(imports.told)
    assert unpack(pack(counted)) == counted
