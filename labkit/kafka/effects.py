"""What was sent and what took effect: services state it, a verdict compares it."""

from __future__ import annotations

from typing import NamedTuple


class Sent(NamedTuple):
    """One send; an id sent twice is listed twice. `order` counts the sends; `key=None` expects no order."""

    id: str
    key: str | None
    order: int
    confirmed: bool = True  # False: the broker never answered, so it may have arrived or not


class Effect(NamedTuple):
    """One thing that took effect: a record or a database row.

    `place`: "done/0/17" (topic/partition/offset), or a row ("charges/17": its number tells no order). `time`:
    unix seconds. `cause`: the source record handled ("orders/2/118").
    """

    id: str
    key: str | None
    place: str
    time: float
    cause: str | None = None
    pod: str | None = None
