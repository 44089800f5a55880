"""The newsletter: a second service that consumes the jobs, in a group of its own. The importers do not know of it.

A job has the rows as they were exported, so each service reads what it needs: here the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg.sql import SQL

from labkit.kafka.records import Record
from labkit.services.connections import Connections, rows
from labkit.services.contacts.importer import sort_out
from labkit.services.contacts.jobs import ContactsJob

LABELS = ("labels", "group membership", "categories")  # Google's column, its older name, and Outlook's
WANTED = "newsletter"

TABLE = SQL("create table if not exists subscribers (email text primary key)")


class Newsletter:
    """The handler of a consumer of jobs: stores contacts with the label *newsletter*, each e-mail once."""

    def __init__(self, dsn: str) -> None:
        self.database = Connections(dsn, TABLE)

    def __call__(self, record: Record[ContactsJob]) -> None:
        """Store a job's subscribers. Raises psycopg.Error, and stores nothing, while the database is away."""
        job = record.value
        columns = [job.columns.index(name) for name in LABELS if name in job.columns]
        wanted = {row.line for row in job.rows if _wants(row.cells, columns)}
        # In the order of e-mails, as in importers.
        emails = sorted(email for email, (line, _) in sort_out(job)[0].items() if line in wanted)
        with self.database.one() as database, database.transaction(), database.cursor() as cursor:
            cursor.executemany("insert into subscribers values (%s) on conflict do nothing", [(one,) for one in emails])

    def close(self) -> None:
        self.database.close()


def _wants(cells: Sequence[str], columns: Sequence[int]) -> bool:
    """Whether a row has the label. Google writes `* myContacts ::: Newsletter`, Outlook `Fair;Newsletter`."""
    given = (cells[column] for column in columns if column < len(cells))
    labels = (label for cell in given for part in cell.split(":::") for label in part.split(";"))
    return any(label.strip(" *").lower() == WANTED for label in labels)


def subscribers(dsn: str) -> list[str]:
    """The e-mails, in order; none if there is no table yet."""
    return [email for (email,) in rows(dsn, "select email from subscribers order by 1")]
