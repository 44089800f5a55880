"""Contacts: the generator, splitting a CSV, what is a contact, and what the store counts."""

from __future__ import annotations

import csv
import tracemalloc
from collections import Counter
from io import BytesIO
from itertools import islice
from pathlib import Path

import msgspec
import pytest

from labkit.kafka.errors import LabkitError
from labkit.kafka.records import encode
from labkit.lab.pods.travel import pack, unpack
from labkit.services.contacts.content import DOMAINS, PHONES, Contact, contacts, write_csv
from labkit.services.contacts.exports import LARGEST, CsvRefused
from labkit.services.contacts.importer import BadRow, sort_out
from labkit.services.contacts.jobs import MOST, ContactsJob, Job, split
from labkit.services.contacts.reports import JobFinished, Progress, Reports, progress

FILE = Path(__file__).parents[2] / "data" / "contacts.csv"


def jobs(text: str | bytes, size: int = 2) -> list[ContactsJob]:
    """The jobs of a CSV with this text."""
    return list(split(BytesIO(text.encode() if isinstance(text, str) else text), "YYY", size))


def only(text: str) -> ContactsJob:
    """The one job of a CSV."""
    (job,) = jobs(text, 100)
    return job


# -- the data ----------------------------------------------------------------------------------------------------------


def test_the_file_is_what_the_generator_makes(tmp_path: Path) -> None:
    """On every machine, and with every Python."""
    write_csv(tmp_path / "made.csv", contacts(1000))
    assert FILE.read_bytes() == (tmp_path / "made.csv").read_bytes()
    with open(FILE, encoding="utf-8", newline="") as file:
        assert [Contact(**row) for row in csv.DictReader(file)] == list(contacts(1000))


def test_contacts_are_nobodys_and_a_few_are_bad_or_come_again() -> None:
    made = list(contacts(1000))
    starts = tuple(phone.partition("{")[0] for phone in PHONES)
    assert all(one.phone.startswith(starts) for one in made)
    found, bad = sort_out(as_job(made))
    assert {email.rpartition("@")[2] for email in found} == set(DOMAINS)
    assert 3 <= len(bad) <= 15
    assert 5 <= len(made) - len(bad) - len(found) <= 25
    assert sum("\n" in one.notes for one in made) > 20
    assert list(contacts(100)) == made[:100]
    assert list(contacts(100, seed=2)) != made[:100]


def as_job(made: list[Contact]) -> ContactsJob:
    """These contacts as one job; their lines are their numbers."""
    rows = [{"line": number, "cells": list(one)} for number, one in enumerate(made)]
    told = {"request": "YYY", "number": 1, "total": 1, "columns": Contact._fields, "rows": rows}
    return msgspec.convert(told, ContactsJob)


def test_contacts_and_jobs_stream_by_in_constant_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    write_csv(tmp_path / "many.csv", contacts(20_000))
    rows = sum(len(job.rows) for job in split(tmp_path / "many.csv", "YYY"))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 20_000
    assert most < 1_000_000 < (tmp_path / "many.csv").stat().st_size


# -- splitting ---------------------------------------------------------------------------------------------------------


def test_a_csv_becomes_jobs_that_know_how_many_they_are() -> None:
    text = "Name, EMAIL ,shoe size\n" + "".join(f"n{number},n{number}@example.org,40\n" for number in range(5))
    made = jobs(text)
    assert [(job.number, job.total, [row.line for row in job.rows]) for job in made] == [
        (1, 3, [2, 3]),
        (2, 3, [4, 5]),
        (3, 3, [6]),
    ]
    assert made[2].columns == ["name", "email", "shoe size"]
    assert made[2].rows[0].cells == ["n4", "n4@example.org", "40"]
    assert [job.id for job in made] == ["YYY/1/3", "YYY/2/3", "YYY/3/3"]
    assert jobs(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()) == made  # as Windows saves it


def test_line_numbers_stay_right_though_cells_span_lines() -> None:
    rows = ["Ada,none,", 'Bea,b@example.org,"two\nlines"', "", 'Cy,"bad,\n\none",x', "Dan,also bad,"]
    job = only("name,email,notes\n" + "\n".join(rows))
    assert [row.line for row in job.rows] == [2, 3, 6, 9]
    _, bad = sort_out(job)
    assert [one.line for one in bad] == [2, 6, 9]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("name,email\n", "a header and no contacts"),
        ("name,phone\nAda,1\n", "line 1 names no column email"),
        ("first,last\nAda,1\n", "line 1 names no column name and no column email"),
        ("name,email,EMAIL\nAda,a,b\n", "the column email twice"),
        (b"name,email\nAda,a@example.org\nZo\xeb,z@example.org\n", "line 3 is not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1 is not UTF-8"),
        ('name,email\nAda,a@example.org\n"Bea,b@example.org\nCy,c@example.org\n', "line 3: this is no CSV"),
        ("name,email\n" + "x" * (LARGEST + 1), "line 2 is longer than"),
        ("name,email\n" + '"' + ("x" * 1000 + "\n") * 120 + '",' + "y" * 40_000, "line 2: the row is longer than"),
        ('name,email\nAda,"' + ("x" * 1000 + "\n") * 200 + '"\n', "line 2: this is no CSV"),
    ],
)  # fmt: skip
def test_what_is_no_csv_of_contacts_is_refused_before_there_is_a_job(text: str | bytes, told: str) -> None:
    with pytest.raises(CsvRefused, match=told):
        split(BytesIO(text.encode() if isinstance(text, str) else text), "YYY")


def test_one_row_is_one_job_and_long_rows_make_small_ones() -> None:
    assert [len(job.rows) for job in jobs("name,email\nAda,a@example.org")] == [1]
    long = "name,email,notes\n" + f"Ada,a@example.org,{'x' * 70_000}\n" * 5
    made = jobs(long, 100)
    assert [len(job.rows) for job in made] == [2, 2, 1]
    assert all(len(encode(job)) < 1_000_000 for job in made)
    control = jobs("name,email,notes\n" + f"Ada,a@example.org,{chr(1) * 130_000}\n", 100)
    assert len(encode(control[0])) < 1_000_000  # each of them is six characters in JSON


def test_what_makes_no_sense_is_refused() -> None:
    text = BytesIO(b"name,email\n" + b"Ada,a@example.org\n" * (MOST + 1))
    with pytest.raises(LabkitError, match="at least one row"):
        split(text, "YYY", 0)
    with pytest.raises(LabkitError, match=r"100,001 jobs are too many.*size=2"):
        split(text, "YYY", 1)
    with pytest.raises(ValueError, match="needs a request"):
        split(text, "")
    for told in ("", "YYY", "YYY/1", "YYY/0/6", "YYY/7/6", "YYY/1/0", "YYY/-1/6", "/1/6", "YYY/one/6"):
        with pytest.raises(ValueError):  # noqa: PT011 - some are int's own
            Job.parse(told)
    assert Job.parse("a/b/3/6") == Job("a/b", 3, 6)
    assert str(Job.parse("YYY/3/6")) == "YYY/3/6"
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"request":"Y","number":7,"total":6,"columns":[],"rows":[]}', type=ContactsJob)


def test_a_file_that_is_changed_meanwhile_is_told(tmp_path: Path) -> None:
    path, text = tmp_path / "contacts.csv", "name,email\n" + "Ada,a@example.org\n" * 6
    for now, made in ((text * 2, 3), ("name,email\nAda,a@example.org\n", 1)):
        path.write_text(text)
        parts = split(path, "YYY", 2)
        path.write_text(now)
        assert len(list(islice(parts, made))) == made
        with pytest.raises(CsvRefused, match="3 jobs, and was changed"):
            next(parts)


# -- what is a contact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("email", ["a@example.org", "A.B+c@mail.example.co.uk", "ü@exämple.org", "  a@b.cd "])
def test_an_email(email: str) -> None:
    found, bad = sort_out(only(f"name,email\nAda,{email}\n"))
    assert (list(found), bad) == ([email.strip().lower()], [])


@pytest.mark.parametrize(
    "email", ["none", "@example.org", "a@", "a@localhost", "a@.org", "a@b..org", "a@b.org.", "a@b@c.org", "a b@c.org",
              "a\x7f@c.org", "a@c.o\0rg", "x" * 250 + "@c.org"]
)  # fmt: skip
def test_no_email(email: str) -> None:
    found, bad = sort_out(only(f"name,email\nAda,a@example.org\nBea,{email}\n"))
    assert list(found) == ["a@example.org"]
    (one,) = bad
    assert one.line == 3
    assert "is no e-mail" in one.reason
    assert "\0" not in one.reason


def test_cells_too_many_too_few_or_with_a_nul() -> None:
    rows = ["Ada,a@example.org", "Bea,b@example.org,1,2,3", "Cy", "D\0n,d@example.org,1", ",e@example.org,=1+1"]
    found, bad = sort_out(only("name,email,phone\n" + "\n".join(rows)))
    assert found == {
        "a@example.org": (2, Contact("Ada", "a@example.org")),
        "e@example.org": (6, Contact("", "e@example.org", "=1+1")),
    }
    assert bad == [
        BadRow(3, "5 cells in a file of 3 columns"),
        BadRow(4, "no e-mail"),
        BadRow(5, "a cell with a NUL, which no database takes for text"),
    ]


def test_of_an_email_that_comes_again_the_last_line_counts() -> None:
    found, _ = sort_out(only("email,name\na@example.org,Ada\nA@Example.ORG,Ada Again\n"))
    assert found == {"a@example.org": (3, Contact("Ada Again", "a@example.org"))}


# -- progress ----------------------------------------------------------------------------------------------------------


def after(*commands: JobFinished) -> Progress:
    """The value after these commands, each of which reads it as the store does, from JSON."""
    value: Progress | None = None
    for command in commands:
        value = msgspec.json.decode(encode(progress(value, command)), type=Progress)
    assert value is not None
    return value


def test_each_job_counts_once() -> None:
    made = after(*(JobFinished(job, 20) for job in (3, 20, 3, 1, 20)))
    assert (made.done, made.failed, made.total, made.completed) == (3, 0, 20, False)
    assert after(*(JobFinished(job, 20) for job in range(1, 21))).completed


def test_five_done_one_failed_is_completed() -> None:
    commands = [JobFinished(job, 6, failed=job == 4) for job in (2, 4, 4, 1, 6, 3, 5)]
    made = after(*commands)
    assert (made.done, made.failed, made.completed) == (5, 1, True)
    assert not after(*commands[:-1]).completed
    replayed = after(*commands, JobFinished(4, 6))
    assert (replayed.done, replayed.failed, replayed.completed) == (6, 0, True)
    assert after(*commands, JobFinished(4, 6), JobFinished(4, 6, failed=True)) == replayed  # it was done all the same


def test_the_largest_import_is_counted() -> None:
    made = after(JobFinished(MOST, MOST), JobFinished(1, MOST, failed=True))
    assert Counter(done=made.done, failed=made.failed) == {"done": 1, "failed": 1}
    assert len(encode(made)) < 20_000


def test_a_command_that_cannot_be_is_refused() -> None:
    for job, total in ((0, 6), (7, 6), (-1, 6), (1, 0), (1, -6), (1, MOST + 1)):
        with pytest.raises(ValueError, match="there is no job"):
            JobFinished(job, total)
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(encode({"job": job, "total": total}), type=JobFinished)
    with pytest.raises(LabkitError, match="is one of 7, and its import has 6 jobs"):
        progress(after(JobFinished(1, 6)), JobFinished(1, 7))


def test_reports_travel() -> None:
    reports = Reports(None)  # type: ignore[arg-type]
    assert unpack(pack(reports)) == reports
