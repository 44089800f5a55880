"""How the loop asks the client for records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from labkit.kafka.consumer.loop import TURN, Loop


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
    ("records", "asked"), [(0, [(1, TURN)]), (1, [(1, TURN), (499, 0)]), (9, [(1, TURN), (499, 0)])]
)
def test_one_record_is_waited_for_and_then_what_is_there_already(records: int, asked: list[tuple[int, float]]) -> None:
    """correctness 8: who asks for many at once waits until they have come."""
    loop = Loop.__new__(Loop)
    client = Client(records)
    loop.client, loop.batch, loop.states = client, 500, None  # type: ignore[assignment]
    loop.workers = SimpleNamespace(next_due=lambda: None)  # type: ignore[assignment]
    loop.shared = SimpleNamespace(more=False)  # type: ignore[assignment]
    loop.assignment = SimpleNamespace(newly_assigned=set())  # type: ignore[assignment]
    assert sum(map(len, loop.fetch())) == records
    assert client.asked == asked
