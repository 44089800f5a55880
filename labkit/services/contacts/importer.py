"""Contacts Importer: stores the contacts of a job, each once, and reports that the job is finished.

Another service reports the jobs that the importers give up: it reads what their retry policy has set aside. So every
import ends, and neither the importers nor the store know how.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from psycopg.sql import SQL

from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import LabkitError
from labkit.kafka.producer import POD
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.patterns.blocked_lanes import Skipped, skips_topic
from labkit.patterns.dead_letters import DeadLetter, dead_letters_topic
from labkit.services.connections import Connections, rows
from labkit.services.contacts.content import Contact
from labkit.services.contacts.emails import email_address
from labkit.services.contacts.exports import layout
from labkit.services.contacts.jobs import ContactsJob, Job
from labkit.services.contacts.notices import ImportNotice, Notify, Stage, channel_of, tell_nobody

TABLES = SQL("""
create table if not exists contacts (
    request text not null, email text not null, name text not null, phone text not null, notes text not null,
    line int not null, job int not null, pod text, primary key (request, email));
create table if not exists bad_rows (
    request text not null, line int not null, reason text not null, primary key (request, line))
""")
# If an e-mail comes twice in a file, the last line counts, whichever job is handled first.
STORE = """insert into contacts values (%s, %s, %s, %s, %s, %s, %s, %s) on conflict (request, email) do update
set (name, phone, notes, line, job, pod) =
    (excluded.name, excluded.phone, excluded.notes, excluded.line, excluded.job, excluded.pod)
where contacts.line < excluded.line"""
NOTE = "insert into bad_rows values (%s, %s, %s) on conflict do nothing"


class BadRow(NamedTuple):
    """A row that is no contact, by the line of the file on which it begins."""

    line: int
    reason: str


class Importer:
    """The handler of a consumer of jobs: stores a job's contacts, and its bad rows, in one transaction.

    Then it calls `report`. A job that comes again changes nothing, and is reported again. With an `exactly once`
    consumer, what `report` sends is there once. `notify` is called before the work, each time that a job is handled,
    and for its bad rows once they are stored. Contacts that Google exports go through `formatting` first.
    """

    def __init__(
        self,
        dsn: str,
        report: Callable[[Job], object],
        notify: Notify = tell_nobody,
        formatting: Callable[[list[Contact]], list[Contact]] = list,
    ) -> None:
        self.report, self.notify, self.formatting = report, notify, formatting
        self.database = Connections(dsn, TABLES)

    def __call__(self, record: Record[ContactsJob]) -> None:
        """Import a job. Raises psycopg.Error or FormattingFailed, and stores nothing, while one of them is away."""
        request, number, pod = record.value.request, record.value.number, os.environ.get(POD)
        self._notify("consumed", record.value.job)
        found, bad = sort_out(record.value)
        if found and layout(tuple(record.value.columns)).maker == "Google":
            made = self.formatting([contact for _, contact in found.values()])
            found = {one.email: (found[one.email][0], one) for one in made}
        # In the order of e-mails: so two importers with contacts in common never wait for each other in a ring.
        good = [
            (request, email, one.name, one.phone, one.notes, line, number, pod)
            for email, (line, one) in sorted(found.items())
        ]
        with self.database.one() as database, database.transaction(), database.cursor() as cursor:
            cursor.executemany(STORE, good)
            cursor.executemany(NOTE, [(request, *one) for one in bad])
        for row in bad:
            self._notify("failed row", record.value.job, *row)
        self.report(record.value.job)

    def _notify(self, stage: Stage, job: Job, line: int = 0, reason: str = "") -> None:
        if channel := channel_of(job.request):
            self.notify(channel, ImportNotice(stage, job.request, job.total, job.number, line, reason))

    def close(self) -> None:
        self.database.close()


def sort_out(job: ContactsJob) -> tuple[dict[str, tuple[int, Contact]], list[BadRow]]:
    """The contacts of a job, by e-mail, each with its line; and its bad rows."""
    found: dict[str, tuple[int, Contact]] = {}
    bad: list[BadRow] = []
    of, width = layout(tuple(job.columns)), len(job.columns)
    for row in job.rows:
        if any(row.cells[width:]):  # some address books end each row with a separator, but not the header
            bad.append(BadRow(row.line, f"{len(row.cells)} cells in a file of {width} columns"))
            continue
        contact = of.contact(row.cells + [""] * (width - len(row.cells)))
        try:
            if not contact.email:
                raise LabkitError("no e-mail")
            email = email_address(contact.email)
            if any("\0" in text for text in contact):
                raise LabkitError("a cell with a NUL, which no database takes for text")
            found[email] = row.line, contact._replace(email=email)
        except LabkitError as error:
            bad.append(BadRow(row.line, str(error)))
    return found, bad


def failed_jobs(
    jobs: Topic[ContactsJob], importers: str, report: Callable[[Job, bool], object], group: str = ""
) -> Consumer:
    """The consumer that reports the jobs which the importers' group gave up: its dead letters and its skips. It goes by
    the keys of records, as a value may not decode."""
    given_up: list[Topic[Any]] = [dead_letters_topic(jobs, importers), skips_topic(jobs, importers)]
    return Consumer(given_up, partial(_report_failed, report), group)


def _report_failed(report: Callable[[Job, bool], object], record: Record[DeadLetter | Skipped | None]) -> None:
    if record.value is None:  # a dead letter has left: it was purged, or replayed and reported by an importer
        return
    try:
        job = Job.parse(record.value.key or "")
    except ValueError:
        print(f"passed over: {record.place}: {record.value.key!r} is the key of no job", file=sys.stderr)  # noqa: T201
        return
    report(job, True)


# -- What is stored ----------------------------------------------------------------------------------------------------


def stored(dsn: str, request: str) -> list[Contact]:
    """The contacts of a request, in the order of e-mails; none if there is no table yet."""
    sql = "select name, email, phone, notes from contacts where request = %s order by email"
    return [Contact(*row) for row in rows(dsn, sql, request)]


def bad_rows(dsn: str, request: str) -> list[BadRow]:
    """The bad rows of a request, in the order of lines."""
    sql = "select line, reason from bad_rows where request = %s order by 1"
    return [BadRow(*row) for row in rows(dsn, sql, request)]


def first_bad_rows(dsn: str, requests: list[str], most: int) -> dict[str, tuple[int, list[BadRow]]]:
    """The number of bad rows, and the first of them, for each of these requests that has any."""
    sql = """select request, line, reason, total from (
        select request, line, reason, count(*) over (partition by request) as total,
            row_number() over (partition by request order by line) as number
        from bad_rows where request = any(%s)) as numbered
    where number <= %s order by request, line"""
    found: dict[str, tuple[int, list[BadRow]]] = {}
    for request, line, reason, total in rows(dsn, sql, requests, most):
        found.setdefault(request, (total, []))[1].append(BadRow(line, reason))
    return found
