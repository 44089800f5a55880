"""Records, and how their keys and values are written on the wire.

Values are JSON, so that `kafka-console-consumer` reads them; keys are raw UTF-8, because quoted JSON would change the
partition they are placed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import methodcaller
from typing import Any, Generic, Protocol, Self, TypeVar

import msgspec

from labkit.kafka.errors import LabkitError, PoisonRecord, error_text, place_of

T = TypeVar("T")

# The headers that labkit adds. The first name is a common one: a record that has such a header keeps its own.
CORRELATION, CAUSE, MADE_BY = "correlation-id", "labkit-cause", "labkit-pod"


class Message(Protocol):
    """A record as the client delivers it: raw bytes, and its coordinates."""

    def topic(self) -> str: ...
    def partition(self) -> int: ...
    def offset(self) -> int: ...
    def key(self) -> bytes | None: ...
    def value(self) -> bytes | None: ...
    def timestamp(self) -> tuple[int, int]: ...
    def headers(self) -> list[tuple[str, bytes | None]] | None: ...
    def set_headers(self, value: list[tuple[str, bytes | None]]) -> None: ...
    def error(self) -> Any: ...


def coordinates(message: Message) -> str:
    """`topic/partition/offset` of a record as the client delivers it."""
    return place_of(message.topic(), message.partition(), message.offset())


class Placed:
    """An object that stands for one record."""

    __slots__ = ()

    topic: str
    partition: int
    offset: int

    @property
    def place(self) -> str:
        """`topic/partition/offset`, the name under which logs and verdicts know the record."""
        return place_of(self.topic, self.partition, self.offset)


class WholeRecord:
    """A value that is read from the whole record, its headers included, and not from the record's value alone."""

    __slots__ = ()

    @classmethod
    def of(cls, message: Message) -> Self:
        """The value of this record, which is no tombstone. If it raises, the record is poison."""
        raise NotImplementedError


def headers_of(message: Message) -> list[tuple[str, bytes | None]]:
    """Headers as they were sent, in their order; none at all when the name of one is not UTF-8."""
    try:
        return list(_headers(message) or [])
    except SystemError:  # the client raises it; asked again, it would return a null pointer, and end the process
        message.set_headers([])
        return []


# The client sets an error and returns a value, too. A call from C checks for that. A call from Python does not, once it
# is frequent: then the error is raised somewhere else, or the process ends.
_headers: Callable[[Message], list[tuple[str, bytes | None]] | None] = methodcaller("headers")
_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # raised by keys and values that do not decode


def encode(value: Any) -> bytes:
    """A value as JSON. Raises TypeError for what JSON cannot hold, and LabkitError for NaN and infinity, which would
    silently become null."""
    raw = _encode(value)
    if b"null" in raw and _has_nan(msgspec.to_builtins(value)):
        raise LabkitError(f"JSON has no NaN or infinity, and a {type(value).__name__} holds one: send None or a text")
    return raw


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(map(_has_nan, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_nan, value))


class Record(Placed, Generic[T]):
    """One record as a handler sees it: decoded key and value, with its place.

    A null value (a tombstone on a compacted topic) arrives as `None`. Timestamp and headers are read when asked for,
    because most handlers never look.
    """

    __slots__ = ("_message", "key", "offset", "partition", "topic", "value")

    def __init__(self, message: Message, key: str | None, value: T) -> None:
        self._message = message
        self.topic = message.topic()
        self.partition = message.partition()
        self.offset = message.offset()
        self.key = key
        self.value = value

    @property
    def timestamp(self) -> float:
        """When it was produced, in seconds since 1970."""
        return float(self._message.timestamp()[1]) / 1000

    @property
    def headers(self) -> dict[str, str]:
        """Headers as text; bytes that are not UTF-8 are shown with replacement characters. The last of a name wins."""
        return {name: (value or b"").decode(errors="replace") for name, value in headers_of(self._message)}

    @property
    def raw_headers(self) -> list[tuple[str, bytes | None]]:
        """Headers as they came: in order, with repeated ones, values as bytes. `send` takes them in this form, too."""
        return headers_of(self._message)

    def __repr__(self) -> str:
        return f"Record({self.place}, key={self.key!r}, value={self.value!r})"


def parser(value: type[T]) -> Callable[[bytes], T]:
    """A function from a value on the wire to the value; raises one of UNDECODABLE, or what the type's checks raise.

    `value` is anything msgspec can check: a Struct, a dataclass, a TypedDict, `dict`, `list`, `str`, `int` … Unknown
    fields are ignored, missing ones take their default, so producers and consumers can be upgraded one by one.
    """
    parse: Callable[[bytes], T] = msgspec.json.Decoder(value).decode
    return parse


def whole(value: type[T]) -> Callable[[Message], T] | None:
    """A function from a message to the value, if its type is read from the whole record."""
    return value.of if isinstance(value, type) and issubclass(value, WholeRecord) else None


def poison(message: Message, error: Exception) -> PoisonRecord:
    """The error of a record that did not decode."""
    reason = str(error) if isinstance(error, UNDECODABLE) else error_text(error)
    return PoisonRecord(message.topic(), message.partition(), message.offset(), reason)


def decoder(value: type[T]) -> Callable[[Message], Record[T]]:
    """A function from a client's message to a `Record` (see `parser`); it raises PoisonRecord, with the coordinates."""
    parse, of_whole = parser(value), whole(value)

    def decode(message: Message) -> Record[T]:
        raw_key, raw = message.key(), message.value()
        try:
            return Record(
                message,
                None if raw_key is None else raw_key.decode(),
                None if raw is None else parse(raw) if of_whole is None else of_whole(message),  # type: ignore[arg-type]
            )
        except Exception as error:  # a value type's own checks may raise anything
            raise poison(message, error) from error

    return decode
