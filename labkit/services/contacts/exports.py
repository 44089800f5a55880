"""How address books export their contacts: encoding, separator, and which columns hold what.

All of that is read from a file's first line. A file whose first line leaves it open is refused, with the reason: a
guess would spoil names, or mix up people, and nobody would notice.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import msgspec

from labkit.kafka.errors import LabkitError
from labkit.services.contacts.content import Contact

Source: TypeAlias = Path | str | IO[bytes]
"""The path of a file, or an open file that can be read twice."""

LARGEST = 150_000  # bytes of a line, and characters of a job: any characters fit in a record, as JSON
SEPARATORS = (",", ";", "\t")
JOINED = " ::: "  # between several values in one cell
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


class CsvRefused(LabkitError):
    """The file is no CSV of contacts. The message names the line."""


class Row(msgspec.Struct, frozen=True):
    """A row as the CSV has it, and the line on which it begins."""

    line: int
    cells: list[str]


class Form(NamedTuple):
    """The names under which an address book exports its columns. The e-mail's name tells the forms apart."""

    maker: str
    emails: tuple[str, ...]
    phones: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    """The parts of a name, in order, where it is not whole in the column `name`; each part may have several names."""


FORMS = (
    Form("plain", ("email",), ("phone",), (("first name", "given name"), ("last name", "family name"))),
    Form(
        "Google",
        tuple(f"e-mail {number} - value" for number in range(1, 10)),
        tuple(f"phone {number} - value" for number in range(1, 10)),
        (
            ("name prefix",),
            ("first name", "given name"),
            ("middle name", "additional name"),
            ("last name", "family name"),
            ("name suffix",),
        ),
    ),
    Form(
        "Outlook",
        ("e-mail address", "e-mail 2 address", "e-mail 3 address"),
        ("mobile phone", "primary phone", "home phone", "business phone", "other phone", "home phone 2",
         "business phone 2"),
        (("title",), ("first name",), ("middle name",), ("last name",), ("suffix",)),
    ),
)  # fmt: skip


class Layout(NamedTuple):
    """The columns of a contact's fields in one file. Of several columns for a field, the first with a value counts."""

    maker: str
    names: tuple[int, ...]
    parts: tuple[int, ...]
    emails: tuple[int, ...]
    phones: tuple[int, ...]
    notes: tuple[int, ...]

    def contact(self, cells: Sequence[str]) -> Contact:
        """The contact of a row with a cell for each column."""
        parts = (cells[column].strip() for column in self.parts)
        name = _first(cells, self.names) or " ".join(part for part in parts if part)
        email, phone = (_first(cells, columns, JOINED) for columns in (self.emails, self.phones))
        return Contact(name, email, phone, _first(cells, self.notes).replace("\r\n", "\n"))


def _first(cells: Sequence[str], columns: tuple[int, ...], joined: str = "") -> str:
    for column in columns:
        cell = cells[column]
        for value in cell.split(joined) if joined and joined in cell else (cell,):
            if value := value.strip():
                return value
    return ""


@lru_cache
def layout(columns: tuple[str, ...], line: int = 1) -> Layout:
    """The layout of a file with columns of these names; `line` is the line that names them. Raises CsvRefused."""
    forms = [form for form in FORMS if not {*form.emails}.isdisjoint(columns)]
    if len(forms) > 1:
        found = " and as ".join(next(name for name in form.emails if name in columns) for form in forms)
        raise CsvRefused(f"line {line} names the e-mail as {found}: which one is meant?")
    form = forms[0] if forms else FORMS[0]
    parts = [[name for name in part if name in columns] for part in form.parts]
    for part in parts:
        if len(part) > 1:
            raise CsvRefused(f"line {line} names {part[0]} and {part[1]}, which are the same: which one is meant?")
    for name in ("name", *form.emails, *form.phones, "notes", *(name for part in parts for name in part)):
        if columns.count(name) > 1:
            raise CsvRefused(f"line {line} names the column {name} twice: which one is meant?")
    missing = [] if any(parts) or "name" in columns else ["name"]
    if missing := missing + ([] if forms else ["email"]):
        found = ", ".join(columns)[:200]
        raise CsvRefused(f"line {line} names no column {' and no column '.join(missing)}, but: {found}")

    def columns_of(*names: str) -> tuple[int, ...]:
        return tuple(columns.index(name) for name in names if name in columns)

    of_parts = columns_of(*(name for part in parts for name in part))
    emails, phones = columns_of(*form.emails), columns_of(*form.phones)
    return Layout(form.maker, columns_of("name"), of_parts, emails, phones, columns_of("notes"))


def read(source: Source) -> tuple[list[str], Iterator[Row]]:
    """The names of a file's columns, in lower case, and its rows, without empty lines. Raises CsvRefused."""
    found: list[tuple[str, list[str]]] = []
    refused: list[tuple[int, CsvRefused]] = []
    for separator in SEPARATORS:
        columns: list[str] = []
        try:
            header = next(_rows(source, separator), None)
            if header is None:
                raise CsvRefused(f"the file is empty: its first line names the columns, as {','.join(Contact._fields)}")
            columns = [cell.strip().lower() for cell in header.cells]
            layout(tuple(columns), header.line)
            found.append((separator, columns))
        except CsvRefused as error:
            refused.append((len(columns), error))
    if not found:
        raise max(refused, key=lambda one: one[0])[1]  # the error with the separator that finds most columns
    if len(found) > 1:
        raise CsvRefused(f"{found[0][0]!r} and {found[1][0]!r} may separate the columns of line 1: which one does?")
    ((separator, columns),) = found
    rows = _rows(source, separator)
    next(rows)
    return columns, rows


def _rows(source: Source, separator: str) -> Iterator[Row]:
    """The rows, header included."""
    with open(source, "rb") if isinstance(source, Path | str) else nullcontext(source) as file:
        reader, line = csv.reader(_lines(file), delimiter=separator, strict=True), 1
        try:
            for cells in reader:
                if cells:
                    yield Row(line, cells)
                line = reader.line_num + 1  # where the next row begins: quoted cells may span lines
        except csv.Error as error:
            raise CsvRefused(f"line {line}: this is no CSV: {error}") from error


def _lines(file: IO[bytes]) -> Iterator[str]:
    """The lines of a file. Raises CsvRefused for a line that is too long.

    It cuts bytes into lines, so that it can name a line that does not decode.
    """
    encoding, number = _encoding(file), 0
    newline = "\n".encode(encoding)
    while line := _line(file, newline):
        number += 1
        if len(line) > LARGEST:
            raise CsvRefused(f"line {number} is longer than {LARGEST:,} bytes: this is no CSV of contacts")
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError as error:
            raise CsvRefused(
                f"line {number} is not {encoding[:6].upper()}, and no other encoding is certain: "
                "export the contacts as a CSV in UTF-8"
            ) from error


def _line(file: IO[bytes], newline: bytes) -> bytearray:
    """The bytes up to the next newline, which in UTF-16 is two bytes, beginning at an even one."""
    line, width = bytearray(), len(newline)
    while len(line) <= LARGEST and not (line.endswith(newline) and len(line) % width == 0):
        more = file.read(1) if len(line) % width else file.readline(LARGEST + 1 - len(line))
        if not more:
            break
        line += more
    return line


def _encoding(file: IO[bytes]) -> str:
    """The encoding, by the mark at the beginning, which is read past; without a mark a letter's NUL shows UTF-16."""
    file.seek(0)
    start = file.read(3)
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            file.seek(len(mark))
            return encoding
    file.seek(0)
    if len(start) < 2 or (start[0] == 0) == (start[1] == 0):
        return "utf-8"
    return "utf-16-be" if start[0] == 0 else "utf-16-le"
