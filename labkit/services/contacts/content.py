"""Contacts of people who do not exist, drawn from a seed: the same here and on every machine.

Their names are invented. Their domains, and their ranges of phone numbers, are reserved for examples.
Nothing is kept: a million of them stream by in constant memory.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

FIRST = (
    "Abrielle", "Bastel", "Corvane", "Delphira", "Eskild", "Fenna", "Gaëlle", "Havik", "Isolde", "Jorun", "Kestrel",
    "Lumira", "Marisk", "Nérine", "Ottoline", "Perrin", "Quilla", "Rosvald", "Sunniva", "Tancred", "Ulvar", "Zoë",
)  # fmt: skip
LAST = (
    "Amberwick", "Brackenfell", "Copperlane", "Dunmarrow", "Elderquill", "Fennimark", "Glasswater", "Hollowmere",
    "Inkpen-Vale", "Juniperus", "Kettlestone", "Larkspindle", "Mossgrave", "Nettlefield", "Oakenshaw", "Pebblecroft",
    "Quaverley", "Rushlight", "Silverthwaite", "Thistlebrook", "Umberlake", "Willowmarch",
)  # fmt: skip
DOMAINS = ("example.com", "example.net", "example.org")
PHONES = ("+44 1632 960{:03}", "+44 7700 900{:03}", "+1 202 555 01{:02.0f}")  # ranges without subscribers
NOTES = (
    'Met at the fair, said "call in spring"', "Two lines:\nthe second one", "prefers e-mail; no calls",
    "Moved in May,\nold address void,\nsee mail",
)  # fmt: skip
BAD = ("", "none", "@example.com", "{}@", "{}@localhost", "{} at example.org", "{}@@example.net")
BAD_SHARE, REPEATED, NOTED = 0.006, 0.012, 0.15  # of all contacts


class Contact(NamedTuple):
    """A person in somebody's address book. Its fields are the columns that a CSV may have, by name."""

    name: str
    email: str
    phone: str = ""
    notes: str = ""


def contacts(count: int, seed: int = 1) -> Iterator[Contact]:
    """Contacts as they come out of an address book: a few e-mails are invalid, and a few come again, in capitals.

    With one seed, fewer contacts are the first ones of more.
    """
    chance = Random(seed)
    earlier = ""  # an e-mail some fifty contacts back, mostly in another job
    for number in range(count):
        first, last = chance.choice(FIRST), chance.choice(LAST)
        user = f"{_ascii(first)}.{_ascii(last)}.{number}"
        email = f"{user}@{chance.choice(DOMAINS)}"
        share = chance.random()
        if share < BAD_SHARE:
            email = chance.choice(BAD).format(user)
        elif share < BAD_SHARE + REPEATED:
            email, earlier = earlier.upper() or email, earlier or email
        elif share > 0.98:
            earlier = email
        phone = chance.choice(PHONES).format(chance.randrange(100))
        yield Contact(f"{first} {last}", email, phone, chance.choice(NOTES) if chance.random() < NOTED else "")


def write_csv(path: Path | str, made: Iterable[Contact]) -> None:
    """Write contacts into a file, below a header with the names of their fields."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Contact._fields)
        writer.writerows(made)


def write_google_csv(path: Path | str, made: Iterable[Contact]) -> None:
    """Write contacts as Google exports them. Every third one has asked for the newsletter."""
    header = ("First Name", "Last Name", "Notes", "Labels", "E-mail 1 - Value", "Phone 1 - Value")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for number, (name, email, phone, notes) in enumerate(made):
            first, _, last = name.partition(" ")
            labels = "* myContacts" if number % 3 else "Newsletter ::: * myContacts"
            writer.writerow((first, last, notes, labels, email, phone))


@lru_cache
def _ascii(name: str) -> str:
    """A name as e-mail addresses have it."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
