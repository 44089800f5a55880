"""What is an e-mail address: as the library says, and fast."""

from __future__ import annotations

from itertools import product

import email_validator
import pytest

from labkit.services.contacts import emails
from labkit.services.contacts.content import contacts
from labkit.services.contacts.emails import LONGEST, NoEmail, email_address

LOCALS = (
    "ada",
    "Ada.B",
    "o'neil+tag",
    "a..b",
    ".a",
    "a.",
    "",
    "a b",
    '"a b"',
    "zoë",
    "ａ",
    "a\u200b",
    "a\0",
    "x@y",
    "=1+1",
    "a" * 65,
    "mailto:a",
    "Ada <a",
    "a\n",
    "{a}",
    "a,b",
)
DOMAINS = (
    "example.org",
    "EXAMPLE.org",
    "bücher.example",
    "xn--bcher-kva.example",
    "localhost",
    "printer.local",
    "example.org.",
    "-x.com",
    "x_y.com",
    "example.123",
    "[127.0.0.1]",
    "",
    "b" * 64 + ".org",
    "exam\u00adple.org",
    "example.org\n",
    "example.org>",
    "a..b",
    ".org",
    "e\u212aample.org",
)


def library(text: str) -> str | None:
    """What the library makes of it; None if it is no address."""
    try:
        return email_validator.validate_email(text, check_deliverability=False).normalized.lower()
    except email_validator.EmailNotValidError:
        return None


def ours(text: str) -> str | None:
    try:
        return email_address(text)
    except NoEmail:
        return None


def test_an_address_is_one_where_the_library_says_so() -> None:
    texts = [f"{local}@{domain}" for local, domain in product(LOCALS, DOMAINS)] + ["none", "@", "a@b@c", "ada@"]
    for longest in (LONGEST, LONGEST + 1):
        texts += [f"{'a' * (longest - 12)}@example.org", f"a@{'b.' * ((longest - 5) // 2)}{'c' * (longest % 2)}org"]
    texts.append(f"{'a' * 237}@bücher.example")  # of 252 letters, and longer as it is sent
    found = {text: ours(text) for text in texts}
    assert found == {text: library(text) for text in texts}
    assert 40 < sum(one is not None for one in found.values()) < len(texts) - 40


def test_the_library_is_asked_once_for_a_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def validate(text: str, **options: bool) -> email_validator.ValidatedEmail:
        asked.append(text)
        return email_validator.validate_email(text, **options)

    monkeypatch.setattr(emails, "validate_email", validate)
    emails._domain.cache_clear()
    good = sum(ours(one.email) is not None for one in contacts(5000))
    assert good > 4900 > 100 > len(asked)
