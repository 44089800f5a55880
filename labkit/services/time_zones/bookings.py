"""Bookings keeps the time zones of all countries. Nobody calls it: it has no address."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from labkit.kafka.consumer.steps import Report, Step
from labkit.kafka.errors import DeliveryFailed, PoisonRecord
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore
from labkit.services.time_zones.countries import Country, Zone

TICK = 0.5  # seconds between two looks at the clock


@dataclass(frozen=True)
class Bookings:
    """Reads `countries`, and writes their zones to `zones`.

    `clock` may hold another time than now, under the key "now", so that one can try an hour of next spring. While that
    time cannot be read, the last one counts; before there was one, Bookings writes nothing.

    The zones of a country that cannot be read stay as they are, until the country is written again.
    """

    countries: Topic[Country]
    clock: Topic[datetime]
    zones: Topic[Zone]
    follow: Callable[[Iterable[str], datetime], dict[str, Zone]]
    """Computes what the zones should be, from nothing but the present countries and the time. So it does not matter
    what this service missed while it was away, or how often it sees the same."""

    def run(self, stop: threading.Event, report: Report) -> None:
        """Follow until `stop` is set."""
        changed = threading.Event()
        now: datetime | None = None
        with (
            KeyValueStore(self.countries) as countries,
            KeyValueStore(self.clock) as clock,
            KeyValueStore(self.zones) as zones,
            countries.subscribe(lambda *_: changed.set()),
            clock.subscribe(lambda *_: changed.set()),
        ):
            while not stop.is_set():
                changed.clear()
                with suppress(PoisonRecord):  # the store has logged it
                    now = clock.get("now") or datetime.now(UTC)
                try:
                    if now is not None:
                        unreadable = countries.unreadable
                        wanted = self.follow(countries, now)
                        # Both before and after: a country may become readable, or unreadable, in between.
                        self._bring_about(zones, wanted, unreadable.keys() | countries.unreadable.keys())
                except DeliveryFailed as error:  # Kafka is away: the next look tries again
                    print(error)  # noqa: T201 - a pod's log is what it prints
                for store in (countries, zones):
                    report(Step.MEASURED, store.measured())
                changed.wait(TICK)

    @staticmethod
    def _bring_about(zones: KeyValueStore[Zone], wanted: dict[str, Zone], unreadable: Collection[str]) -> None:
        has = zones.snapshot()  # without zones that cannot be read: these are written again
        zones.update({name: zone for name, zone in wanted.items() if has.get(name) != zone})
        for name in has.keys() - wanted.keys():
            if has[name].country not in unreadable:
                zones.delete(name)
