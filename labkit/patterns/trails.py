"""What retries, blocked lanes and dead letters share: names of a consumer's own topics, and the trail of a record.

The trail is one header, JSON. Headers come from outside and may be forged: one that does not hold counts as none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Annotated

import msgspec

from labkit.kafka.errors import LabkitError
from labkit.kafka.producer import RawHeaders
from labkit.kafka.records import Message, Placed, headers_of

HEADER = "labkit-retry"
SHOWN = 1000  # characters of a key or a value that are shown
LONGEST_NAME = 249  # of a topic, says Kafka
TIMES = 50  # of failed attempts that are kept: the newest
OWN_TOPIC = re.compile(r"(.+)_([A-Za-z0-9.-]+)_(?:replay|retry\d+-\d+m?s|dead-letters|lanes|skips)")
FUTURE = 1e12  # seconds since 1970: no time is later

Count = Annotated[int, msgspec.Meta(ge=0, le=10**18)]
Time = Annotated[float, msgspec.Meta(ge=0, le=FUTURE)]


class Trail(Placed, msgspec.Struct, omit_defaults=True, frozen=True):
    """Where a record came from first, which never changes, and what has happened to it since."""

    topic: Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
    partition: Count
    offset: Count
    timestamp: Time
    """When it was produced, in seconds since 1970."""
    group: str
    attempts: Count = 0
    """Failed calls of the handler so far."""
    failed: Annotated[tuple[Time, ...], msgspec.Meta(max_length=TIMES)] = ()
    """When these were: the newest."""
    error: str = ""
    """The last one."""
    due: Time | None = None
    """When it may be handled, in seconds since 1970."""
    replayed: bool = False
    """It comes out of the dead-letter queue, and leaves that once it is handled."""


def parse(header: str | bytes | None) -> Trail | None:
    """The trail in a header; None when there is none that holds."""
    if header is None:
        return None
    try:
        return msgspec.json.decode(header, type=Trail)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def trail_of(message: Message) -> Trail | None:
    """The trail that a record has in its headers."""
    return parse(dict(headers_of(message)).get(HEADER))


def with_header(headers: Iterable[tuple[str, bytes | None]], name: str, value: bytes) -> RawHeaders:
    """These headers, and behind them the only one of this name."""
    return [*(one for one in headers if one[0] != name), (name, value)]


def text_of(raw: bytes | None) -> str | None:
    """Bytes for people; what is no UTF-8 is shown by replacement characters."""
    return None if raw is None else raw.decode(errors="replace")


def shown(raw: bytes | None) -> str | None:
    """The beginning of it: a record may be of any size, what is told of it not."""
    return None if raw is None else raw[: 4 * SHOWN].decode(errors="replace")[:SHOWN]


def own_topic(topic: str, group: str, what: str) -> str:
    """The name of a topic that a group has beside `topic`; two groups, or two topics, never get the same.

    Nor do they get two that Kafka would not keep beside each other: it takes "." and "_" for the same. It begins with
    the topic's name, so that who clears away by prefix finds it. Raises LabkitError when it would be longer than Kafka
    allows.
    """
    told = digest(group)
    if re.fullmatch(r"[A-Za-z0-9.-]+", group):
        told = group if _reads_one_way(topic, group) else digest(group, len(group))
    name = f"{topic}_{told}_{what}"
    if len(name) > LONGEST_NAME:
        name = f"{topic}_{digest(group)}_{what}"
    if len(name) > LONGEST_NAME:
        raise LabkitError(
            f"topic {topic} has a name too long for {what} topics of its consumers: at most "
            f"{LONGEST_NAME - len(name) + len(topic)} characters"
        )
    return name


def taken_apart(name: str) -> tuple[str, str]:
    """The topic and the group whose own topic this is, as `own_topic` put them into the name.

    The group may be there by its digest only. Two empty texts for any other topic.
    """
    found = OWN_TOPIC.fullmatch(name)
    if found is None:
        return "", ""
    whole = found[2].rpartition("-")[0]
    return found[1], whole if digest(whole, len(whole)) == found[2] else found[2]


def digest(group: str, readable: int = 24) -> str:
    """A group whose name cannot be part of a topic's; no underscore, which separates the parts."""
    shown = re.sub(r"[^A-Za-z0-9.-]+", "-", group)[:readable]
    return f"{shown}-{hashlib.sha256(group.encode()).hexdigest()[:12]}"


def _reads_one_way(topic: str, group: str) -> bool:
    """Whether `topic_group`, with "." for "_" and the other way round, is read as this topic and this group.

    A group begins where a part is the same as the topic's first one (`shop.orders_shop.billing`, all names of a lab),
    the last of such; if there is none, it is the last part.
    """
    first, *parts = re.split("[._]", f"{topic}_{group}")
    begins = max((number for number, part in enumerate(parts) if part == first), default=len(parts) - 1)
    return begins == len(re.findall("[._]", topic))
