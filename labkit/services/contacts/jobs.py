"""Contacts Jobs: splits a CSV of contacts into jobs, so that many importers work on one import.

The file is read twice. Every job says how many there are, so they must be counted first; and a file that is no CSV of
contacts is refused before any job is sent. Only the job in hand is in memory. A source that cannot be read twice, such
as an upload, goes into a temporary file first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import msgspec

from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.services.contacts.exports import LARGEST, CsvRefused, Row, Source, read

MOST = 100_000  # jobs of an import: the count of an import has a bit for each
AHEAD = 50  # jobs that may be sent and not yet confirmed


class Job(NamedTuple):
    """Which job of which import: `YYY/3/6` is the third of the six jobs of request YYY.

    This is the key of the job's record. Each job has another key, so that the jobs of one request lie in all
    partitions, and importers share them. The key has all that a report of the job needs, even if the record's value
    cannot be read.
    """

    request: str
    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.request}/{self.number}/{self.total}"

    @classmethod
    def parse(cls, text: str) -> Job:
        """The job that `str` has written. Raises ValueError."""
        request, number, total = text.rsplit("/", 2)
        job = cls(request, int(number), int(total))
        job.check()
        return job

    def check(self) -> None:
        """Raises ValueError when there is no such job."""
        if not self.request or not 1 <= self.number <= self.total <= MOST:
            raise ValueError(f"{self} is no job: it needs a request, and 1 ≤ number ≤ total ≤ {MOST:,}")


class ContactsJob(msgspec.Struct, frozen=True):
    """Some rows of an import, for one importer. `columns` are the names of their cells."""

    request: str
    number: int
    total: int
    columns: list[str]
    rows: list[Row]

    def __post_init__(self) -> None:
        self.job.check()

    @property
    def job(self) -> Job:
        return Job(self.request, self.number, self.total)

    @property
    def id(self) -> str:
        """The business id, and the key of its record."""
        return str(self.job)


def split(source: Source, request: str, size: int = 100) -> Iterator[ContactsJob]:
    """The jobs of a CSV, `size` rows each, or fewer if rows are long. The first line names the columns.

    Raises CsvRefused before it makes any job; later only if the file is changed meanwhile.
    """
    if size < 1:
        raise LabkitError(f"a job has at least one row, not {size!r}")
    total = sum(1 for _ in _parts(source, size))
    if not total:
        raise CsvRefused("the file has a header and no contacts")
    if total > MOST:
        raise LabkitError(
            f"{total:,} jobs are too many, as {MOST:,} are allowed: set size={size * (total // MOST + 1):,}"
        )
    Job(request, total, total).check()
    return _jobs(source, request, size, total)


def send_jobs(source: Source, jobs: Topic[ContactsJob], request: str, size: int = 100) -> int:
    """Split a CSV and send its jobs. Returns how many, once all are confirmed.

    Raises CsvRefused, before it sends anything; DeliveryFailed when some jobs are not confirmed. Then send the file
    again under the same request: a job that comes twice is stored once, and counted once.
    """
    return send(split(source, request, size), jobs)


def send(made: Iterator[ContactsJob], jobs: Topic[ContactsJob]) -> int:
    """Send jobs. Returns how many, once all are confirmed. Raises DeliveryFailed."""
    sent = 0
    while part := list(islice(made, AHEAD)):
        jobs.deliver((job, job.id, None) for job in part)
        sent += len(part)
    return sent


def _jobs(source: Source, request: str, size: int, total: int) -> Iterator[ContactsJob]:
    number = 0
    for number, (columns, rows) in enumerate(_parts(source, size), 1):
        if number > total:
            break
        yield ContactsJob(request, number, total, columns, rows)
    if number != total:
        raise CsvRefused(f"the file had {total:,} jobs, and was changed while they were made: import it again")


def _parts(source: Source, size: int) -> Iterator[tuple[list[str], list[Row]]]:
    """Columns and rows of each job."""
    columns, rows = read(source)
    part: list[Row] = []
    weight = empty = _weight(Row(1, columns))
    for row in rows:
        own = _weight(row)
        if empty + own > LARGEST:
            raise CsvRefused(f"line {row.line}: the row is longer than {LARGEST:,} characters")
        if part and (len(part) == size or weight + own > LARGEST):
            yield columns, part
            part, weight = [], empty
        part.append(row)
        weight += own
    if part:
        yield columns, part


def _weight(row: Row) -> int:
    """About how many characters a row adds to a job."""
    return 40 + sum(len(cell) + 4 for cell in row.cells)
