"""Records on the wire: what decodes, and what is poison."""

from __future__ import annotations

import os
import pickle
import random
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import pytest

from labkit.kafka.consumer.failures import FailedRecord, Retry, keep_trying
from labkit.kafka.errors import PoisonRecord
from labkit.kafka.records import Message, decoder, encode


class Order(msgspec.Struct):
    id: int
    note: str = "none"


@dataclass
class Plain:
    id: int


class Fetched:
    def __init__(self, value: bytes | None, key: bytes | None = None, headers: Any = None) -> None:
        self._value, self._key, self._headers = value, key, headers

    def topic(self) -> str:
        return "orders"

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return 17

    def key(self) -> bytes | None:
        return self._key

    def value(self) -> bytes | None:
        return self._value

    def timestamp(self) -> tuple[int, int]:
        return 1, 1_500

    def headers(self) -> Any:
        return self._headers


def decode(kind: Any, *parts: Any) -> Any:
    return decoder(kind)(cast(Message, Fetched(*parts)))


@pytest.mark.parametrize(
    ("kind", "value"),
    [(Order, Order(1, "é")), (Plain, Plain(2)), (dict, {"a": [1, None]}), (int, 5), (str, "x"), (list, [1, "2"])],
)
def test_a_value_comes_back_as_it_was(kind: Any, value: Any) -> None:
    record = decode(kind, encode(value), b"k")
    assert (record.value, record.key, record.place) == (value, "k", "orders/3/17")


def test_upgraded_producers_and_consumers_understand_each_other() -> None:
    assert decode(Order, b'{"id": 1, "added later": true}').value == Order(1, "none")


def test_a_tombstone_is_none() -> None:
    record = decode(Order, None, b"k")
    assert record.value is None
    assert record.key == "k"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b"{", b"k"),
        (b'{"id": "one"}', None),
        (b"{}", None),
        (b"\xff\xfe", None),
        (b'{"id": 1, "note": "\xff"}', None),
        (b'{"id": 1}', b"\xff"),
        (b"", None),
    ],
)
def test_poison_names_its_place(value: bytes, key: bytes | None) -> None:
    with pytest.raises(PoisonRecord, match=r"^orders/3/17 does not decode: ") as caught:
        decode(Order, value, key)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.offset) == (str(caught.value), 17)


def test_any_bytes_decode_or_are_poison() -> None:
    chance = random.Random(os.environ.get("PYTEST_SEED", "7"))
    seeds = [b'{"id": 1, "note": "x"}', b"[" * 100_000, b'{"id":' * 5_000, b"1e999", b"-0", b"null"]
    for _ in range(2000):
        raw = bytearray(chance.choice(seeds[:1] + seeds[3:]))
        for _ in range(chance.randrange(4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        try:
            decode(Order, bytes(raw))
        except PoisonRecord:
            pass
    for raw_bytes in seeds[1:3]:
        for kind in (Order, Any):
            with pytest.raises(PoisonRecord):
                decode(kind, raw_bytes)


def test_headers_are_text_and_the_last_of_a_name_wins() -> None:
    record = decode(int, b"1", None, [("a", b"1"), ("a", b"2"), ("b", None), ("c", b"\xff")])
    assert record.headers == {"a": "2", "b": "", "c": "\N{REPLACEMENT CHARACTER}"}
    assert decode(int, b"1").headers == {}
    assert record.timestamp == 1.5


def test_back_offs_double_up_to_the_cap_and_never_end() -> None:
    decide = keep_trying(first=0.1, cap=10.0)

    def wait(attempt: int) -> float:
        failed = FailedRecord(cast(Message, Fetched(b"1")), lambda failed: None)
        failed.attempt = attempt
        decision = decide(failed)
        assert isinstance(decision, Retry)
        return decision.after

    assert [wait(attempt) for attempt in (1, 2, 3, 8)] == pytest.approx([0.1, 0.2, 0.4, 10.0])
    assert wait(100_000) == 10.0
