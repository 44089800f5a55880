"""Countries and their time zones, as ISO 3166 and the IANA database have them: the data of the wheel `tzdata`.

The wheel alone counts, on every machine: the system's own data on time zones may be years older.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from importlib.resources import files
from zoneinfo import ZoneInfo

import msgspec

_DATA = files("tzdata.zoneinfo")


class Country(msgspec.Struct, frozen=True):
    """A country of ISO 3166, by its short English name."""

    name: str


class Zone(msgspec.Struct, frozen=True):
    """A time zone at some moment."""

    country: str
    """Two letters of ISO 3166."""
    offset: int
    """Minutes ahead of UTC."""
    abbreviation: str


@lru_cache(1)
def iso_countries() -> dict[str, Country]:
    """All 249 countries, by code."""
    return {code: Country(name) for code, name in _table("iso3166.tab")}


@lru_cache(1)
def zones_by_country() -> dict[str, tuple[str, ...]]:
    """The names of a country's zones. Two countries, BV and HM, have none: nobody lives there."""
    found: dict[str, list[str]] = {}
    for code, _, zone, *_ in _table("zone.tab"):  # not zone1970.tab, which has Zurich for Germany
        found.setdefault(code, []).append(zone)
    return {code: tuple(zones) for code, zones in found.items()}


def zone_at(name: str, country: str, moment: datetime) -> Zone:
    """A zone at `moment`, by its rules."""
    local = moment.astimezone(_rules(name))
    ahead = local.utcoffset()
    if ahead is None:
        raise ValueError(f"{name} has no offset")
    return Zone(country, round(ahead.total_seconds() / 60), local.tzname() or "")


@lru_cache(None)
def _rules(name: str) -> ZoneInfo:
    with _DATA.joinpath(name).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


def _table(name: str) -> list[list[str]]:
    lines = _DATA.joinpath(name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]
