"""The retry history of a record: where it came from, how often it has failed, and when it is due.

It travels with the record in one header, as JSON. Headers come from outside and may be forged: one that does not decode
counts as none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from labkit.kafka.producer import RawHeaders
from labkit.kafka.records import Message, Placed, headers_of
from labkit.patterns.own_topics import LONGEST_NAME

HEADER = "labkit-retry"
SHOWN = 1000  # characters of a key or a value that are shown
TIMES = 50  # of failed attempts that are kept: the newest
FUTURE = 1e12  # seconds since 1970: no time is later

Count = Annotated[int, msgspec.Meta(ge=0, le=10**18)]
Time = Annotated[float, msgspec.Meta(ge=0, le=FUTURE)]


class RetryHistory(Placed, msgspec.Struct, omit_defaults=True, frozen=True):
    """Where a record came from first, which never changes, and what has happened to it since."""

    topic: Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
    partition: Count
    offset: Count
    timestamp: Time
    """When the record was produced, in seconds since 1970."""
    group: str
    attempts: Count = 0
    """Failed calls of the handler so far."""
    failed: Annotated[tuple[Time, ...], msgspec.Meta(max_length=TIMES)] = ()
    """When the newest of these calls failed."""
    error: str = ""
    """What the last one raised."""
    due: Time | None = None
    """When the record may be handled, in seconds since 1970."""
    replayed: bool = False
    """The record comes out of the dead-letter queue, and leaves the queue once it is handled."""


def parse(header: str | bytes | None) -> RetryHistory | None:
    """The history in a header; None when there is none, or it does not decode."""
    if header is None:
        return None
    try:
        return msgspec.json.decode(header, type=RetryHistory)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def history_of(message: Message) -> RetryHistory | None:
    """The history that a record has in its headers."""
    return parse(dict(headers_of(message)).get(HEADER))


def with_header(headers: Iterable[tuple[str, bytes | None]], name: str, value: bytes) -> RawHeaders:
    """These headers, and behind them the only one of this name."""
    return [*(one for one in headers if one[0] != name), (name, value)]


def text_of(raw: bytes | None) -> str | None:
    """Bytes for people; what is not UTF-8 is shown by replacement characters."""
    return None if raw is None else raw.decode(errors="replace")


def shown(raw: bytes | None) -> str | None:
    """The beginning of a key or a value, for people: a record may be of any size."""
    return None if raw is None else raw[: 4 * SHOWN].decode(errors="replace")[:SHOWN]
