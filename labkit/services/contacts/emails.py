"""Which texts are e-mail addresses. The library email-validator knows, but takes 90 µs for each address.

An address book has many addresses in few domains. So the library is asked once for each domain, and for every address
whose part before the @ has other signs than letters, digits and those that are allowed everywhere.
"""

from __future__ import annotations

import re
from functools import lru_cache

from email_validator import EmailNotValidError, validate_email

from labkit.kafka.errors import LabkitError

LONGEST = 254  # characters
_ORDINARY = re.compile(r"[\w!#$%&'*+/=?^`{|}~-]+(\.[\w!#$%&'*+/=?^`{|}~-]+)*", re.ASCII)


class NoEmail(LabkitError):
    """The text is no e-mail address. The message says why."""


def email_address(text: str) -> str:
    """The address in the form in which addresses are compared: in lower case. Asks no server. Raises NoEmail."""
    local, _, domain = text.rpartition("@")
    try:
        if len(text) > LONGEST:
            raise NoEmail(f"{text[:LONGEST]!r} is no e-mail: it is longer than {LONGEST} characters")
        if domain.isascii() and _ORDINARY.fullmatch(local):
            return f"{local}@{_domain(domain)}".lower()
        return validate_email(text, check_deliverability=False).normalized.lower()
    except EmailNotValidError as error:
        raise NoEmail(f"{text!r} is no e-mail: {error}") from error


@lru_cache(10_000)
def _domain(domain: str) -> str:
    return str(validate_email(f"a@{domain}", check_deliverability=False).domain)
