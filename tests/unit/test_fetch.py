"""How the loop asks the client for records."""

from __future__ import annotations

from typing import Any

import pytest

from labkit.kafka.loop import Loop


class Client:
    """Has so many records; notes how it is asked."""

    def __init__(self, records: int) -> None:
        self.records, self.asked = records, list[tuple[int, float]]()

    def consume(self, most: int, patience: float) -> list[Any]:
        self.asked.append((most, patience))
        taken = min(most, self.records)
        self.records -= taken
        return [object()] * taken


@pytest.mark.parametrize(
    ("records", "asked"), [(0, [(1, 0.05)]), (1, [(1, 0.05), (499, 0)]), (9, [(1, 0.05), (499, 0)])]
)
def test_one_record_is_waited_for_and_then_what_is_there_already(
    records: int, asked: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 8: who asks for many at once waits until they have come."""
    loop = Loop.__new__(Loop)
    client = Client(records)
    loop.client, loop.batch, loop.arrived = client, 500, set()  # type: ignore[assignment]
    monkeypatch.setattr(loop, "patience", lambda: 0.05, raising=False)
    assert sum(map(len, loop.fetch())) == records
    assert client.asked == asked
