"""The formatting service, which belongs to somebody else and fails as it likes, and importers that ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from io import BytesIO

import pytest
from aiohttp import web
from consuming import Member, fresh_group, fresh_topic
from processes import wait_until
from uploading import FILE, Served

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.topics import Topic
from labkit.lab.pods.travel import pack, unpack
from labkit.patterns.retries import RetryingConsumer, blocking, exponential
from labkit.runtime.broker import free_ports
from labkit.services import contacts
from labkit.services.clients import ask
from labkit.services.contacts import (
    Contact,
    ContactsJob,
    Formatting,
    FormattingFailed,
    FormattingService,
    Importer,
    Job,
)
from labkit.services.faults import FAULTS, HttpMisbehaviour
from labkit.services.http import HOST

GOOGLE = (
    b"First Name,Last Name,E-mail 1 - Value,Phone 1 - Value\n"
    b"ADA,AMBERWICK,a@example.org,+1 (202) 555-0101\nbea,,b@example.org,\n"
)
FOR_EVER = blocking(exponential(0.01, cap=0.1))
BEA = Contact("Bea", "b@example.org")
ADA = Contact("Ada Amberwick", "a@example.org", "+1 202 555 0101")


class Refusing(FormattingService):
    """From its start, until it is told otherwise: told later, it would already have answered somebody."""

    async def start(self, app: web.Application) -> None:
        app[FAULTS] = [HttpMisbehaviour(errors=1.0)]


@pytest.fixture
def formatter() -> Iterator[FormattingService]:
    service = FormattingService(free_ports()[0], takes=0)
    with Served() as served:
        served.serve(service)
        yield service


@pytest.fixture
def jobs(cluster: Cluster) -> Topic[ContactsJob]:
    return fresh_topic(cluster, 1, ContactsJob)


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


def test_while_the_service_is_down_others_go_on_and_afterwards_all_is_stored_once(
    jobs: Topic[ContactsJob], dsn: str
) -> None:
    """At first nobody listens, then somebody refuses. Each job has a key of its own, so it is all that waits."""
    service = Refusing(free_ports()[0], takes=0)
    reported: list[Job] = []
    with (
        Served() as served,
        closing(Importer(dsn, reported.append, formatting=Formatting(service.url))) as importer,
        Member(RetryingConsumer(jobs, importer, fresh_group(), retry=FOR_EVER, order="key")) as member,
    ):
        contacts.send_jobs(BytesIO(GOOGLE), jobs, "google", size=1)
        contacts.send_jobs(FILE, jobs, "plain")
        wait_until(lambda: sum(job.request == "plain" for job in reported) == 10, 30, "those who need no formatting")
        served.serve(service)
        failed = len(member.journal.of(Step.FAILED))
        member.journal.wait_for(Step.FAILED, failed + 4)
        assert contacts.stored(dsn, "google") == []
        service.faults.tell("formatting", {})
        member.wait_committed({0: 12})
    assert contacts.stored(dsn, "google") == [ADA, BEA]
    assert sorted(job.number for job in reported if job.request == "google") == [1, 2]


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
