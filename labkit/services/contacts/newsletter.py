"""The newsletter: a second kind of service that consumes the importers' jobs, in a group of its own. They do not know.

A job has the rows as they were exported, so each service reads what it wants: here the labels that people gave.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg.sql import SQL

from labkit.kafka.records import Record
from labkit.services.connections import Connections, rows
from labkit.services.contacts.importer import sort_out
from labkit.services.contacts.jobs import ContactsJob

LABELS = ("labels", "group membership", "categories")  # of Google, as it was before, and of Outlook
WANTED = "newsletter"

TABLE = SQL("create table if not exists subscribers (email text primary key)")


class Newsletter:
    """The handler of a consumer of jobs: stores the contacts with the label *newsletter*, each e-mail once."""

    def __init__(self, dsn: str) -> None:
        self.database = Connections(dsn, TABLE)

    def __call__(self, record: Record[ContactsJob]) -> None:
        """Raises psycopg.Error while the database is away: nothing of the job is stored."""
        job = record.value
        places = [job.columns.index(name) for name in LABELS if name in job.columns]
        wanted = {row.line for row in job.rows if _wants(row.cells, places)}
        # In order of their e-mails, as importers do it.
        emails = sorted(email for email, (line, _) in sort_out(job)[0].items() if line in wanted)
        with self.database.one() as database, database.transaction(), database.cursor() as cursor:
            cursor.executemany("insert into subscribers values (%s) on conflict do nothing", [(one,) for one in emails])

    def close(self) -> None:
        self.database.close()


def _wants(cells: Sequence[str], places: Sequence[int]) -> bool:
    """Whether one of a row's labels says so. Google writes `* myContacts ::: Newsletter`, Outlook `Fair;Newsletter`."""
    labels = (label for at in places if at < len(cells) for part in cells[at].split(":::") for label in part.split(";"))
    return any(label.strip(" *").lower() == WANTED for label in labels)


def subscribers(dsn: str) -> list[str]:
    """The e-mails, in order; none before there is a table."""
    return [email for (email,) in rows(dsn, "select email from subscribers order by 1")]
