"""The story of pattern 3: Business Manager, Bookings and Events, which share stores and never call each other."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from lab_helpers import wait_ready
from processes import wait_until
from stores import raw, store_topic

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.lab.board.panels import store_lag
from labkit.patterns.key_value_store import KeyValueStore, StoreNotReady
from labkit.services.faults import NONE, Misbehaviour, ServiceFaults
from labkit.services.time_zones.bookings import Bookings
from labkit.services.time_zones.business_manager import BusinessManager
from labkit.services.time_zones.countries import Country, Zone, iso_countries, zone_at, zones_by_country
from labkit.services.time_zones.events import Events

WINTER, SUMMER = datetime(2026, 3, 29, 0, 59, tzinfo=UTC), datetime(2026, 3, 29, 1, 0, tzinfo=UTC)


def zones_of(countries: Iterable[str], now: datetime) -> dict[str, Zone]:
    zones = zones_by_country()
    return {name: zone_at(name, code, now) for code in countries for name in zones.get(code, ())}


class Platform:
    """The three services on a Kafka of their own."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.countries = lab.topic("countries", 2, Country, compacted=True)
        self.zones = lab.topic("zones", 2, Zone, compacted=True)
        self.clock = KeyValueStore(lab.topic("clock", 1, datetime, compacted=True)).wait_ready()
        self.faults = ServiceFaults(lab.topic("service-faults", 1, Misbehaviour, compacted=True))
        self.faults.wait_ready()
        with KeyValueStore(self.countries) as store:
            store.update({code: country for code, country in iso_countries().items() if code != "SS"})
        self.manager = lab.deploy("manager", BusinessManager(lab.port("manager"), self.countries))
        self.bookings = lab.deploy("bookings", Bookings(self.countries, self.clock.topic, self.zones, zones_of))
        self.events = lab.deploy("events", Events(lab.port("events"), self.zones, self.faults))
        for deployment in (self.manager, self.bookings, self.events):
            wait_ready(deployment)

    def ask(self, service: str, path: str, method: str = "GET") -> tuple[int, Any]:
        """Status and answer; 0 while nobody listens."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.lab.port(service)}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text[:1] in "{[" and text else text
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return 0, None

    def offset(self, zone: str) -> int | None:
        status, answer = self.ask("events", f"/zones/{zone}")
        return answer["offset"] if status == 200 else None

    def begin(self) -> None:
        """A winter's day without South Sudan."""
        self.clock.put("now", WINTER)
        wait_until(lambda: self.ask("manager", "/countries/SS", "DELETE")[0] == 204, 30, "the manager")
        here = lambda: (self.offset("Europe/Berlin"), self.offset("Africa/Juba"))  # noqa: E731
        wait_until(lambda: here() == (60, None), 30, f"the zones: {self.logs()}")

    def logs(self) -> list[str]:
        return [line.text for one in (self.manager, self.bookings, self.events) for line in one.log]

    def change(self, code: str, method: str) -> None:
        assert self.ask("manager", f"/countries/{code}", method) == (204, "")


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Lab("stores", cluster="private") as lab:
        platform = Platform(lab)
        yield platform
        platform.clock.close()
        platform.faults.close()


def test_iso_and_iana() -> None:
    assert len(iso_countries()) == 249
    assert iso_countries()["SS"] == Country("South Sudan")
    zones = zones_by_country()
    assert set(iso_countries()) - set(zones) == {"BV", "HM"}
    assert zones["SS"] == ("Africa/Juba",)
    assert zones["DE"][0] == "Europe/Berlin"
    assert zone_at("Europe/Berlin", "DE", WINTER) == Zone("DE", 60, "CET")
    assert zone_at("Europe/Berlin", "DE", SUMMER) == Zone("DE", 120, "CEST")


@pytest.mark.long
def test_a_country_appears_and_goes_without_anyone_calling_bookings(platform: Platform) -> None:
    platform.begin()
    assert platform.ask("events", "/zones/Africa/Juba")[0] == 404
    platform.change("SS", "PUT")
    wait_until(lambda: platform.offset("Africa/Juba") == 120, 10, "Africa/Juba")
    assert platform.ask("events", "/local/Africa/Juba?utc=2026-03-29T09:00") == (200, "2026-03-29T11:00")
    platform.change("SS", "DELETE")
    wait_until(lambda: platform.offset("Africa/Juba") is None, 10, "the end of Africa/Juba")
    assert platform.ask("manager", "/countries/XX", "PUT")[0] == 400
    for wrong in ("noon", "2026-03-29T09:00Z", "2026-03-29T09:00%2B01:00", "9999-12-31T23:59"):
        status, why = platform.ask("events", f"/local/Europe/Berlin?utc={wrong}")
        assert (status, "a time like 2026-03-29T09:00, in UTC" in why) == (400, True), wrong


@pytest.mark.long
def test_a_zone_that_cannot_be_read_is_written_again(platform: Platform) -> None:
    platform.begin()
    for partition in range(2):  # wherever Berlin is
        raw(platform.zones, (b"Europe/Berlin", b"oops"), partition=partition)
    with KeyValueStore(platform.zones) as zones:
        wait_until(lambda: zones.snapshot().get("Europe/Berlin") == Zone("DE", 60, "CET"), 20, "what Bookings mends")
    restarts = platform.bookings.pods[0].restarts
    platform.change("SS", "PUT")
    wait_until(lambda: platform.offset("Africa/Juba") == 120, 10, "Africa/Juba")
    assert platform.bookings.pods[0].restarts == restarts


def test_a_country_that_cannot_be_read_keeps_its_zones(platform: Platform) -> None:
    platform.begin()
    raw(platform.countries, (b"DE", b"oops"), partition=-1)
    wait_until(lambda: "'DE' cannot be read" in str(platform.bookings.log), 10, "what Bookings meets")
    platform.change("SS", "PUT")
    platform.clock.put("now", SUMMER)
    wait_until(lambda: platform.offset("Africa/Juba") == 120, 10, "Africa/Juba")
    wait_until(lambda: platform.offset("Europe/Paris") == 120, 10, "summer")
    assert platform.offset("Europe/Berlin") == 60
    platform.change("DE", "PUT")
    wait_until(lambda: platform.offset("Europe/Berlin") == 120, 10, "summer in Berlin")


def test_a_clock_that_cannot_be_read_stands_still_until_it_is_written_again(platform: Platform) -> None:
    platform.begin()
    (pod,) = platform.bookings.pods
    restarts = pod.restarts
    said = lambda: str(platform.bookings.log).count("'now' cannot be read until it is written again")  # noqa: E731
    raw(platform.clock.topic, (b"now", b"oops"))
    wait_until(lambda: said() == 1, 10, "what Bookings meets")
    platform.change("SS", "PUT")
    wait_until(lambda: platform.offset("Africa/Juba") == 120, 20, f"Africa/Juba: {platform.logs()}")
    assert platform.offset("Europe/Berlin") == 60
    pod.kill()
    wait_until(lambda: said() == 2, 20, "what another process meets")
    platform.change("SS", "DELETE")  # which waits for a time to go by
    assert platform.offset("Africa/Juba") == 120
    platform.clock.put("now", SUMMER)
    wait_until(lambda: platform.offset("Europe/Berlin") == 120, 10, "summer")
    wait_until(lambda: platform.offset("Africa/Juba") is None, 10, "the end of Africa/Juba")
    assert pod.restarts == restarts + 1


def test_clocks_go_forward_in_both_stores(platform: Platform) -> None:
    platform.begin()
    before = platform.ask("events", "/zones")[1]
    platform.clock.put("now", SUMMER)
    wait_until(lambda: platform.offset("Europe/Berlin") == 120, 10, "summer")
    expected = {
        name: zone_at(name, code, SUMMER).offset
        for code, names in zones_by_country().items()
        for name in names
        if code != "SS"
    }
    wait_until(lambda: platform.ask("events", "/zones")[1] == expected, 10, "all zones as their rules say")
    with KeyValueStore(platform.zones) as zones:
        assert {name: zone.offset for name, zone in zones.items()} == expected
    changed = {name for name, offset in expected.items() if before[name] != offset}
    assert {"Europe/Berlin", "Europe/London"} <= changed
    assert "America/Phoenix" not in changed


@pytest.mark.long
def test_each_survives_kill_9_and_what_happened_meanwhile(platform: Platform) -> None:
    platform.begin()
    platform.change("SS", "PUT")
    wait_until(lambda: platform.offset("Africa/Juba") == 120, 20, "Africa/Juba")
    for deployment in (platform.manager, platform.bookings, platform.events):
        (pod,) = deployment.pods
        restarts = pod.restarts
        pod.kill()  # which takes a moment, in which the old one may still answer
        wait_until(lambda pod=pod, before=restarts: pod.restarts > before, 20, "another process")
        wait_ready(deployment)
    wait_until(lambda: platform.offset("Africa/Juba") == 120, 20, "Africa/Juba again")
    wait_until(lambda: platform.ask("manager", "/countries")[0] == 200, 20, "the manager")
    assert platform.ask("manager", "/countries")[1]["SS"] == "South Sudan"
    platform.bookings.scale(0)
    try:
        wait_until(lambda: not platform.bookings._retired, 20, "the end of bookings")
        platform.change("SS", "DELETE")  # nobody who would take the zone away
        assert platform.offset("Africa/Juba") == 120
    finally:
        platform.bookings.scale(1)
    wait_until(lambda: platform.offset("Africa/Juba") is None, 20, "what is made up for")


@pytest.mark.long
def test_all_go_on_reading_while_kafka_is_down_and_writing_once_it_is_back(platform: Platform) -> None:
    platform.begin()
    platform.lab.broker.kill()
    try:
        assert platform.offset("Europe/Berlin") == 60
        status, why = platform.ask("manager", "/countries/SS", "PUT")
        assert status == 503
        assert "not confirmed within 8 s" in why
        assert len(platform.ask("manager", "/countries")[1]) == 248
    finally:
        platform.lab.broker.recover()
    platform.change("SS", "PUT")
    wait_until(lambda: platform.offset("Africa/Juba") == 120, 30, "Africa/Juba")


@pytest.mark.long
def test_the_lag_of_a_frozen_pods_store_grows(platform: Platform) -> None:
    pod = platform.events.pods[0]
    behind = lambda: store_lag(platform.lab.deployments, "events", platform.zones)  # noqa: E731
    wait_until(lambda: behind() == 0, 20, "no lag")
    pod.freeze()
    try:
        with KeyValueStore(platform.zones) as zones:
            for _ in range(3):
                zones.put("Mars/Olympus", Zone("DE", 0, "MST"))  # which Bookings takes away
        wait_until(lambda: behind() >= 3, 10, "lag")
    finally:
        pod.recover()
    wait_until(lambda: behind() == 0, 20, "no lag")
    panels = platform.lab.stores((platform.events, platform.zones), (platform.bookings, platform.countries))
    assert [panel.title for panel in panels] == ["Lag", "Reloads", "Entries"]
    platform.lab.board(panels=panels)

    def seen(metric: str, label: str) -> float:
        samples = platform.lab._history.snapshot().samples
        return next((one.value for one in reversed(samples) if (one.metric, one.label) == (metric, label)), -1)

    wait_until(lambda: seen("behind", "events") == 0, 10, "the watched lag")
    wait_until(lambda: seen("countries entries", "bookings") >= 248, 10, "entries")
    assert seen("zones loads", "events") >= 1


# -- faults of services


def test_a_service_misbehaves_as_told_and_recovers(platform: Platform) -> None:
    events = platform.lab.service("events", platform.faults)
    status = lambda: platform.ask("events", "/zones")[0]  # noqa: E731
    wait_until(lambda: status() == 200, 30, "the service")
    events.fail(status=500)
    wait_until(lambda: status() == 500, 20, "the fault")
    for path in ("/zones/Europe/Berlin", "/local/Europe/Berlin?utc=2026-03-29T09:00", "/nothing"):
        assert platform.ask("events", path) == (500, "events refuses this, by a fault\n")
    assert [fault.text for fault in platform.lab._history.standing()] == ["fail events"]
    events.slow(0.3)
    assert [fault.text for fault in platform.lab._history.standing()] == ["fail events", "slow events by 0.3 s"]
    assert events.recover() == "ended: fail events, slow events by 0.3 s"
    events.slow(0.3)

    def answers_late() -> bool:
        began = time.monotonic()
        return status() == 200 and time.monotonic() - began > 0.3

    wait_until(answers_late, 20, "the other fault")
    events.recover()
    assert platform.lab._history.standing() == []
    assert events.recover() == "nothing to mend: events is as it should be"
    events.fail(seconds=60)
    wait_until(lambda: status() == 503, 20, "the fault")
    events.fail(seconds=0.5)  # which may be over before it is seen
    wait_until(lambda: status() == 200, 20, "its end by itself")
    wait_until(lambda: platform.lab._history.standing() == [], 20, "the end of its window")
    assert [action.label for action in events.actions()] == ["Fail events", "Slow events", "Recover events"]
    assert events.actions()[2].available() == "It is as it should be: there is nothing to mend."
    for wrong in (lambda: events.fail(1.5), lambda: events.fail(status=200)):
        with pytest.raises(LabkitError, match="events cannot do that"):
            wrong()
    for wrong in (lambda: events.fail(0), lambda: events.slow(-1), lambda: events.fail(seconds=0)):
        with pytest.raises(LabkitError, match="must be a positive number"):
            wrong()
    with pytest.raises(LabkitError, match=r"events cannot do that: .*`cut`"):
        events.cut()


def test_faults_that_are_not_loaded_say_so(cluster: Cluster) -> None:
    faults = ServiceFaults(store_topic(cluster, 1, Misbehaviour))
    with pytest.raises(StoreNotReady):
        faults.of("anyone")
    faults.wait_ready()
    assert faults.of("anyone") is NONE
    faults.tell("anyone", {"errors": 0.5})
    assert faults.of("anyone").errors == 0.5
    faults.tell("anyone", {})
    assert faults.of("anyone") is NONE
    faults.close()
