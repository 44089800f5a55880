"""The formatting service, which belongs to somebody else and fails as it likes, and importers that ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from consuming import Member, fresh_group, fresh_topic
from uploading import FILE, Served

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
    Contact,
    ContactsJob,
    Formatting,
    FormattingFailed,
    FormattingService,
    Importer,
)
from labkit.services.http import HOST

GOOGLE = b"First Name,Last Name,E-mail 1 - Value,Phone 1 - Value\nADA,AMBERWICK,a@example.org,+1 (202) 555-0101\n"
FOR_EVER = blocking(exponential(0.01, cap=0.1))
ADA = Contact("Ada Amberwick", "a@example.org", "+1 202 555 0101")


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
