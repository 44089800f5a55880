"""A second kind of service consumes the importers' jobs."""

from __future__ import annotations

from contextlib import closing
from io import BytesIO
from pathlib import Path

import pytest
from consuming import Member, fresh_group, fresh_topic

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.services import contacts
from labkit.services.contacts import ContactsJob, Importer, Newsletter

FORMS = {
    "of Google": (
        "First Name,Labels,E-mail 1 - Value\nAda,* myContacts ::: Newsletter,A@example.org\n"
        "Bea,* myContacts,b@example.org\nAda again,newsletter,a@example.org\n"
        "Cy,Newsletter,none\nDan,newsletters,d@example.org\n"
    ),
    "of Outlook": "First Name;E-mail Address;Categories\nAda;a@example.org;Fair;x\nBea;b@example.org\n"
    'Ada;a@example.org;"Fair; NEWSLETTER"\n',
}


@pytest.mark.parametrize("form", FORMS)
def test_each_e_mail_that_asks_for_the_newsletter_is_stored_once(cluster: Cluster, dsn: str, form: str) -> None:
    jobs = fresh_topic(cluster, 1, ContactsJob)
    assert contacts.subscribers(dsn) == []
    for request in ("YYY", "ZZZ"):
        contacts.send_jobs(BytesIO(FORMS[form].encode()), jobs, request, size=2)
    with closing(Newsletter(dsn)) as newsletter, Member(Consumer(jobs, newsletter, fresh_group())) as member:
        member.wait_committed({0: 6 if form == "of Google" else 4})
    assert contacts.subscribers(dsn) == ["a@example.org"]


def test_importers_and_newsletter_take_the_same_jobs(cluster: Cluster, dsn: str, tmp_path: Path) -> None:
    jobs = fresh_topic(cluster, 2, ContactsJob)
    contacts.write_google_csv(tmp_path / "google.csv", contacts.contacts(60))
    contacts.send_jobs(tmp_path / "google.csv", jobs, "YYY", size=10)
    with (
        closing(Importer(dsn, lambda job: None)) as importer,
        closing(Newsletter(dsn)) as newsletter,
        Member(Consumer(jobs, importer, fresh_group())) as importing,
        Member(Consumer(jobs, newsletter, fresh_group())) as mailing,
    ):
        for member in (importing, mailing):
            member.journal.wait(lambda member=member: len(member.journal.of(Step.HANDLED)) == 6, what="all jobs")
    found = [one.email for one in contacts.stored(dsn, "YYY")]
    asked = [one.email.lower() for number, one in enumerate(contacts.contacts(60)) if number % 3 == 0]
    assert 50 < len(found) <= 60
    assert contacts.subscribers(dsn) == sorted(set(asked) & set(found))
