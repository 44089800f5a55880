"""Contacts Jobs: splits a CSV of contacts into jobs, so that many importers work on one import.

The file is read twice. A job says how many there are, so they are counted first, and a file that is no CSV of contacts
is refused before any job is sent. Nothing but the job in hand is kept in memory. What cannot be read twice, an upload
say, is put into a temporary file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import msgspec

from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.services.contacts.content import Contact

Source: TypeAlias = Path | str | BinaryIO
"""The path of a file, or an open one that can be read twice."""

NEEDED = ("name", "email")  # columns without which there are no contacts
MOST = 100_000  # jobs of an import: whoever counts them keeps a bit for each
LARGEST = 150_000  # bytes of a line, and characters of a job: as JSON, whatever they are, they fit in a record
AHEAD = 50  # jobs that are sent before the first of them must be confirmed


class CsvRefused(LabkitError):
    """A file is no CSV of contacts. The message names the line."""


class Job(NamedTuple):
    """Which job of which import: `YYY/3/6` is the third of the six of request YYY.

    This is the key of the job's record. It is another one for each job, so that the jobs of one request are spread over
    all partitions, and importers share them. It says all that a report of the job needs, even where the record's value
    cannot be read.
    """

    request: str
    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.request}/{self.number}/{self.total}"

    @classmethod
    def parse(cls, text: str) -> Job:
        """The other end of `str`. Raises ValueError."""
        request, number, total = text.rsplit("/", 2)
        job = cls(request, int(number), int(total))
        job.check()
        return job

    def check(self) -> None:
        """Raises ValueError when there is no such job."""
        if not self.request or not 1 <= self.number <= self.total <= MOST:
            raise ValueError(f"job {self} is none: it needs a request, and 1 ≤ number ≤ total ≤ {MOST:,}")


class Row(msgspec.Struct, frozen=True):
    """A row of the CSV as it is there, and the line on which it begins."""

    line: int
    cells: list[str]


class ContactsJob(msgspec.Struct, frozen=True):
    """Some rows of an import, for one importer. `columns` says what their cells are."""

    request: str
    number: int
    total: int
    columns: list[str]
    rows: list[Row]

    def __post_init__(self) -> None:
        self.job.check()

    @property
    def job(self) -> Job:
        """Which one it is."""
        return Job(self.request, self.number, self.total)

    @property
    def id(self) -> str:
        """The business id, and the key of its record."""
        return str(self.job)


def split(source: Source, request: str, size: int = 100) -> Iterator[ContactsJob]:
    """The jobs of a CSV, `size` rows each, or fewer where rows are long. The first line names the columns.

    Raises CsvRefused, before there is any job; later only if the file is changed meanwhile.
    """
    if size < 1:
        raise LabkitError(f"a job has at least one row, not {size!r}")
    total = sum(1 for _ in _parts(source, size))
    if not total:
        raise CsvRefused("the file has a header and no contacts")
    if total > MOST:
        raise LabkitError(
            f"{total:,} jobs are too many, {MOST:,} are allowed: give size={size * (total // MOST + 1):,}"
        )
    Job(request, total, total).check()
    return _jobs(source, request, size, total)


def send_jobs(source: Source, jobs: Topic[ContactsJob], request: str, size: int = 100) -> int:
    """Split a CSV and send its jobs; returns how many, once all are confirmed.

    Raises CsvRefused, when nothing is sent; DeliveryFailed when some are not confirmed. Then send it again under the
    same request: a job that comes twice is stored once, and counted once.
    """
    sent, made = 0, split(source, request, size)
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
    rows = _rows(source)
    header = next(rows, None)
    if header is None:
        raise CsvRefused(f"the file is empty: its first line names the columns, {','.join(Contact._fields)} say")
    columns = [cell.strip().lower() for cell in header.cells]
    for name in Contact._fields:
        if columns.count(name) > 1:
            raise CsvRefused(f"line {header.line} names the column {name} twice: which one is meant?")
    if missing := [name for name in NEEDED if name not in columns]:
        found = ", ".join(columns)[:200]
        raise CsvRefused(f"line {header.line} names no column {' and no column '.join(missing)}, but: {found}")
    part: list[Row] = []
    weight = empty = _weight(header)
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
    """About how many characters it adds to a job."""
    return 40 + sum(len(cell) + 4 for cell in row.cells)


def _rows(source: Source) -> Iterator[Row]:
    """The rows, the header among them, without empty lines."""
    with open(source, "rb") if isinstance(source, Path | str) else nullcontext(source) as file:
        file.seek(0)
        reader, line = csv.reader(_lines(file), strict=True), 1
        try:
            for cells in reader:
                if cells:
                    yield Row(line, cells)
                line = reader.line_num + 1  # of the next row: quoted cells may span lines
        except csv.Error as error:
            raise CsvRefused(f"line {line}: this is no CSV: {error}") from error


def _lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a file, none of which is longer than it may be."""
    number = 0
    while line := file.readline(LARGEST + 1):
        number += 1
        if len(line) > LARGEST:
            raise CsvRefused(f"line {number} is longer than {LARGEST:,} bytes: this is no CSV of contacts")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise CsvRefused(f"line {number} is not UTF-8: export the contacts as a CSV in UTF-8") from error
