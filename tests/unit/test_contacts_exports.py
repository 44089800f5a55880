"""Address books export the same six people in their own ways; what comes of them is the same."""

from __future__ import annotations

import csv
from collections.abc import Callable
from io import BytesIO, StringIO
from itertools import product

import pytest

from labkit.services.contacts.content import Contact
from labkit.services.contacts.exports import LARGEST, SEPARATORS, CsvRefused, layout, read
from labkit.services.contacts.importer import sort_out
from labkit.services.contacts.jobs import ContactsJob, split

ODD = "\u0a0a\u0100\u0a0a\u4e0a\u010a"  # in UTF-16 the bytes of a newline, at odd places; and no newline
# First, middle and last name, e-mails, phones, notes.
Person = tuple[str, str, str, list[str], list[str], str]
PEOPLE: list[Person] = [
    ("Gaëlle", "", "Amberwick", ["gaelle@example.com"], ["+44 1632 960001", "+44 1632 960002"], '"call",\tMay;'),
    ("Zoë", "Q.", "Inkpen-Vale", ["zoe@example.org", "zoe@example.net"], ["+1 202 555 0101"], "Two lines:\nthe last"),
    ("Jorun", "", "", ["jorun@example.com"], [], "\n\nthree lines,\n\n   and one\n"),
    ("", "", "Rushlight", ["r@example.net", "r2@example.net", "r3@example.net"], ["+44 7700 900001"], ""),
    ("Ottoline", "", "Umberlake", ["o.u@example.org"], [], '=HYPERLINK("http://example.org")'),
    ("Ol\u00ebna", "", ODD, ["olena@example.com"], ["+44 7700 900002"], f"{ODD}\n\u0a01\n\u0100"),
]
CONTACTS = [
    Contact(" ".join(part for part in one[:3] if part), one[3][0], "".join(one[4][:1]), one[5].strip())
    for one in PEOPLE
]

# The headers are those of the address books, without some forty columns that hold nothing here.
GOOGLE_OLD = (
    "Name,Given Name,Additional Name,Family Name,Yomi Name,Name Prefix,Name Suffix,Nickname,Birthday,Notes,Photo,"
    "Group Membership,E-mail 1 - Type,E-mail 1 - Value,E-mail 2 - Type,E-mail 2 - Value,Phone 1 - Type,Phone 1 - Value,"
    "Organization 1 - Name,Organization 1 - Title"
)
GOOGLE_NEW = (
    "First Name,Middle Name,Last Name,Phonetic First Name,Name Prefix,Name Suffix,Nickname,File As,Organization Name,"
    "Organization Title,Birthday,Notes,Photo,Labels,E-mail 1 - Label,E-mail 1 - Value,E-mail 2 - Label,"
    "E-mail 2 - Value,Phone 1 - Label,Phone 1 - Value,Phone 2 - Label,Phone 2 - Value"
)
OUTLOOK = (
    "Title,First Name,Middle Name,Last Name,Suffix,Company,Department,Job Title,Business Phone,Home Phone,Mobile Phone,"
    "Birthday,E-mail Address,E-mail Type,E-mail Display Name,E-mail 2 Address,E-mail 3 Address,Notes,Web Page,"
)


def plain(one: Person) -> dict[str, str]:
    first, middle, last, emails, phones, notes = one
    name = " ".join(part for part in (first, middle, last) if part)
    return {"NAME": name, " eMail": emails[0], "phone": "".join(phones[:1]), "Notes ": notes, "shoe size": "40"}


def google_old(one: Person) -> dict[str, str]:
    first, middle, last, emails, phones, notes = one
    return {
        "Name": " ".join(part for part in (first, middle, last) if part), "Given Name": first,
        "Additional Name": middle, "Family Name": last, "Notes": notes, "Group Membership": "Fair ::: * myContacts",
        "E-mail 1 - Type": "* ::: Work", "E-mail 1 - Value": " ::: ".join(emails), "Phone 1 - Type": "Mobile",
        "Phone 1 - Value": " ::: ".join(phones), "Organization 1 - Title": "Baker",
    }  # fmt: skip


def google_new(one: Person) -> dict[str, str]:
    first, middle, last, emails, phones, notes = one
    return {
        "First Name": first, "Middle Name": middle, "Last Name": last, "Notes": notes, "Labels": "* myContacts",
        "E-mail 1 - Value": emails[0], "E-mail 2 - Value": " ::: ".join(emails[1:]),
        "Phone 1 - Value": "", "Phone 2 - Value": " ::: ".join(phones), "Organization Title": "Baker",
    }  # fmt: skip


def outlook(one: Person) -> dict[str, str]:
    first, middle, last, emails, phones, notes = one
    return {
        "First Name": first, "Middle Name": middle, "Last Name": last, "Notes": notes, "Job Title": "Baker",
        "E-mail Address": emails[0], "E-mail 2 Address": "".join(emails[1:2]), "E-mail 3 Address": "".join(emails[2:]),
        "Mobile Phone": "".join(phones[:1]), "Business Phone": "".join(phones[1:]), "E-mail Type": "SMTP",
    }  # fmt: skip


FORMS: dict[str, tuple[str, Callable[[Person], dict[str, str]]]] = {
    "plain": ("shoe size,NAME, eMail,phone,Notes ", plain),
    "google_old": (GOOGLE_OLD, google_old),
    "google_new": (GOOGLE_NEW, google_new),
    "outlook": (OUTLOOK, outlook),
}
ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "utf-16": b""}


def exported(
    form: str, people: list[Person], separator: str = ",", encoding: str = "utf-8", newline: str = "\n"
) -> bytes:
    """What the address book writes."""
    header, row = FORMS[form]
    text = StringIO()
    writer = csv.DictWriter(text, header.split(","), delimiter=separator, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(one) for one in people)
    return ENCODINGS.get(encoding, b"") + text.getvalue().replace("\n", newline).encode(encoding)


def only(data: bytes) -> ContactsJob:
    """The one job of a file."""
    (job,) = split(BytesIO(data), "YYY")
    return job


@pytest.mark.parametrize("form", FORMS)
def test_the_same_people_in_every_form_give_the_same_contacts(form: str) -> None:
    for separator, encoding, newline in product(SEPARATORS, ENCODINGS, ("\n", "\r\n")):
        found, bad = sort_out(only(exported(form, PEOPLE, separator, encoding, newline)))
        assert [contact for _, contact in found.values()] == CONTACTS, (separator, encoding, newline)
        assert not bad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_bad_row_is_named_by_its_line_in_every_form(form: str, encoding: str) -> None:
    bad: Person = ("Bad", "", "Row", ["none"], [], "of two\nlines")
    people = [row for one in PEOPLE for row in (one, bad)]
    lines, line = [], 2
    for one in people:
        if one is bad:
            lines.append(line)
        line += 1 + one[5].count("\n")
    found, refused = sort_out(only(exported(form, people, ";", encoding, "\r\n")))
    assert [row.line for row in refused] == lines
    assert len(found) == len(PEOPLE)


def test_utf_16_without_a_mark_is_told_by_its_nuls() -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        found, _ = sort_out(only(exported("outlook", PEOPLE, "\t", encoding)[2:]))
        assert [contact for _, contact in found.values()] == CONTACTS


def test_a_name_in_pieces_counts_where_the_whole_one_is_empty() -> None:
    data = "Name,Given Name,Family Name,E-mail 1 - Value\n,Ada, Amberwick ,a@example.org\nBea,x,y,b@example.org\n"
    found, _ = sort_out(only(data.encode()))
    assert [contact.name for _, contact in found.values()] == ["Ada Amberwick", "Bea"]


def test_cells_beyond_the_header_are_bad_only_with_something_in_them() -> None:
    found, bad = sort_out(only(b"name,email\nAda,a@example.org,,\nBea,b@example.org,,x\n"))
    assert list(found) == ["a@example.org"]
    assert bad == [(3, "4 cells in a file of 2 columns")]


def test_the_form_is_known_to_who_handles_a_job() -> None:
    makers = [layout(tuple(only(exported(form, PEOPLE)).columns)).maker for form in FORMS]
    assert makers == ["plain", "Google", "Google", "Outlook"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,email,E-mail Address\nAda,a,b\n", "the e-mail as email and as e-mail address"),
        ("First Name,E-mail 1 - Value,E-mail Address\n", "the e-mail as e-mail 1 - value and as e-mail address"),
        ("First Name,Given Name,E-mail 1 - Value\nAda,Bea,a@example.org\n", "names first name and given name"),
        ("First Name,E-mail 1 - Value,E-mail 1 - Value\nAda,a,b\n", "the column e-mail 1 - value twice"),
        ("First Name,First Name,E-mail Address\nAda,Bea,a\n", "the column first name twice"),
        ("Name;Mail\nAda;a@example.org\n", "names no column email, but: name, mail"),
        ("Organization Name\tE-mail 1 - Value\nA\ta@example.org\n", "names no column name"),
        ("name,email,x;name;email\nAda,a,b\n", "',' and ';' may separate the columns"),
        (exported("outlook", PEOPLE[:2], encoding="cp1252"), "line 2 is not UTF-8, and no other encoding is certain"),
        (exported("outlook", PEOPLE, encoding="utf-16")[:-1], "is not UTF-16"),
        (b"\xff\xfe" + ("name,email\n" + "x" * LARGEST).encode("utf-16-le"), "line 2 is longer than"),
        (b"\xff\xfe" + "name,email\n\ud800,x\n".encode("utf-16-le", "surrogatepass"), "line 2 is not UTF-16"),
        (b"\xff\xfe", "the file is empty"),
        (b"PK\x03\x04\x14\x00\x06\x00\x08\x00", "names no column name and no column email"),  # a spreadsheet
        ('"name;email"\nAda;a@example.org\n', "names no column name and no column email"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_apart_is_refused_with_the_reason(text: str | bytes, told: str) -> None:
    with pytest.raises(CsvRefused, match=told):
        split(BytesIO(text.encode() if isinstance(text, str) else text), "YYY")


def test_a_line_of_newline_bytes_that_are_none_is_cut_off_in_no_time() -> None:
    """Each byte pair of this line looks like a newline to who looks for the byte alone."""
    with pytest.raises(CsvRefused, match="line 2 is longer than"):
        split(BytesIO(b"\xff\xfe" + ("name,email\n" + "\u0a0a" * LARGEST).encode("utf-16-le")), "YYY")


def test_what_is_read_is_as_it_is_there() -> None:
    columns, rows = read(BytesIO(exported("outlook", PEOPLE, ";")))
    assert columns == [name.lower() for name in OUTLOOK.split(",")]
    assert [row.line for row in rows] == [2, 3, 5, 11, 12, 13]
