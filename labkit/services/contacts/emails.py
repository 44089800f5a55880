"""Which text is an e-mail address. email-validator knows; asked for every address it would take 90 µs.

An address book has many addresses of few domains. So the library is asked once for each domain, and for every address
whose part before the @ is more than letters, digits and the signs that are allowed everywhere.
"""

from __future__ import annotations

import re
from functools import lru_cache

from email_validator import EmailNotValidError, validate_email

from labkit.kafka.errors import LabkitError

LONGEST = 254  # characters
_ORDINARY = re.compile(r"[\w!#$%&'*+/=?^`{|}~-]+(\.[\w!#$%&'*+/=?^`{|}~-]+)*", re.ASCII)


class NoEmail(LabkitError):
    """A text is no e-mail address. The message says why."""


def email_address(text: str) -> str:
    """The address in the one form in which it is compared: in lower case. Raises NoEmail. Nobody is asked for it."""
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
