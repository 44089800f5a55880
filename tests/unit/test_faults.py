"""Faults of a service: what was told, and what the history says of it."""

from __future__ import annotations

from collections.abc import Mapping

from processes import wait_until

from labkit.kafka.errors import LabkitError
from labkit.lab.faults.service import Service
from labkit.lab.history import History


class Switch:
    """Takes no orders while it is away."""

    understands = ("errors", "status", "delay")

    def __init__(self) -> None:
        self.away, self.tried = False, 0
        self.told: Mapping[str, object] = {}

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        self.tried += 1
        if self.away:
            raise LabkitError("away")
        self.told = told


def test_a_fault_that_cannot_be_ended_in_time_stands_until_it_can() -> None:
    switch, history = Switch(), History()
    service = Service("payments", switch, history)
    service.fail(seconds=0.05)
    switch.away = True
    wait_until(lambda: switch.tried == 2, 10, "the end of the fault to be told")
    assert service.standing() == ["fail payments"]
    assert switch.told["errors"] == 1
    switch.away = False
    wait_until(lambda: not service.standing(), 10, "the end of the fault")
    assert switch.told == {}
