"""Bookings keeps the time zones of all countries there are. Nobody calls it: it has no address to be called at."""

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
    """Follows `countries`, and writes what follows from them to `zones`.

    `clock` may hold another time than now, under the key "now": so an hour of next spring can be had today. While
    that cannot be read, the last time that could counts; before there was one, nothing is followed.

    The zones of a country that cannot be read stay as they are, until it is written again.
    """

    countries: Topic[Country]
    clock: Topic[datetime]
    zones: Topic[Zone]
    follow: Callable[[Iterable[str], datetime], dict[str, Zone]]
    """What the zones should be, from nothing but the countries there are and the time. So it does not matter what was
    missed while this service was away, nor how often it is told the same."""

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
                with suppress(PoisonRecord):  # the store has said so in the log
                    now = clock.get("now") or datetime.now(UTC)
                try:
                    if now is not None:
                        unreadable = countries.unreadable
                        wanted = self.follow(countries, now)
                        # Before and after: one may become unreadable or readable meanwhile, and so be in neither.
                        self._bring_about(zones, wanted, unreadable.keys() | countries.unreadable.keys())
                except DeliveryFailed as error:  # Kafka is away: what is wanted stays so, and is tried again
                    print(error)  # noqa: T201 - a pod's log is what it prints
                for store in (countries, zones):
                    report(Step.MEASURED, store.measured())
                changed.wait(TICK)

    @staticmethod
    def _bring_about(zones: KeyValueStore[Zone], wanted: dict[str, Zone], unreadable: Collection[str]) -> None:
        has = zones.snapshot()  # a zone that cannot be read is not in there, and is written again
        zones.update({name: zone for name, zone in wanted.items() if has.get(name) != zone})
        for name in has.keys() - wanted.keys():
            if has[name].country not in unreadable:
                zones.delete(name)
