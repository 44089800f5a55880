"""The platform's sites, drawn from a seed: `site(17, 3)` is the third version of site 17, here and on every machine.

Most sites have a few apps, and few have many; a few apps are on most sites, and most on few. Nothing is kept: a hundred
thousand sites stream by in constant memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from random import Random

import msgspec

APPS = (
    "stores", "forms", "bookings", "blog", "chat", "events", "members", "forum", "restaurants", "gallery", "reviews",
    "donations", "courses", "coupons", "bank-holidays", "music", "portfolio", "hotels", "menus", "loyalty", "video",
    "invoices", "tickets", "faq", "countdown", "weather", "podcasts", "recipes", "auctions", "horoscopes",
)  # fmt: skip
OWNERS = 0.6  # owners for each site, as some own several
PAGES, PAGE = 6, 2000  # pages of a site, and about how many bytes each has
WORDS = (
    "we", "are", "open", "bread", "coffee", "every", "day", "from", "seven", "fresh", "local", "made", "by", "hand",
    "come", "and", "see", "our", "new", "room",
)  # fmt: skip


class App(msgspec.Struct):
    """An app that is installed on a site."""

    name: str
    version: str
    settings: dict[str, str] = {}


class Page(msgspec.Struct):
    """What visitors see."""

    title: str
    body: str


class Site(msgspec.Struct):
    """A site as MetaSite keeps it. Most readers want nothing of it but `apps`."""

    id: str
    version: int
    owner: str
    name: str
    apps: list[App]
    pages: list[Page] = []


def site(number: int, version: int = 1, seed: int = 1, pages: int = PAGES) -> Site:
    """One version of one site. From version to version an app comes, goes or is upgraded."""
    base = Random(f"{seed}/{number}")
    apps = {name: _app(name, base) for name in _installed(base)}
    owner, town = base.random(), base.choice(("Oslo", "Porto", "Haifa", "Lima", "Kyoto", "Accra", "Perth", "Quito"))
    for later in range(2, version + 1):
        change = Random(f"{seed}/{number}/{later}")
        name = change.choices(APPS, _popularity())[0]
        if name in apps and change.random() < 0.5:
            del apps[name]
        else:
            apps[name] = _app(name, change)
    return Site(
        id=site_id(number),
        version=version,
        owner=f"user-{int(owner * OWNERS * (number + 1)):06}",
        name=f"{base.choice(WORDS).title()} & {base.choice(WORDS)} {town}",
        apps=list(apps.values()),
        pages=[Page(f"Page {page}", _text(base.randrange(50_000))) for page in range(pages)],
    )


def site_id(number: int) -> str:
    return f"site-{number:06}"


def sites(count: int, seed: int = 1, pages: int = PAGES) -> Iterator[Site]:
    """The first version of every site."""
    return (site(number, 1, seed, pages) for number in range(count))


def updates(count: int, many: int, seed: int = 1, pages: int = PAGES, first: int = 2) -> Iterator[Site]:
    """`many` updates of `count` sites, some of which are edited often: versions `first`, `first` + 1 … of each."""
    edited: dict[int, int] = {}
    chance = Random(f"{seed}/edits/{first}")
    for _ in range(many):
        number = int(count * chance.random() ** 2)
        edited[number] = edited.get(number, first - 1) + 1
        yield site(number, edited[number], seed, pages)


def _installed(chance: Random) -> list[str]:
    """Names of apps: mostly one to four, sometimes up to twenty."""
    wanted = min(len(APPS), int(chance.paretovariate(1.3)))
    return list(dict.fromkeys(chance.choices(APPS, _popularity(), k=wanted)))


def _app(name: str, chance: Random) -> App:
    version = f"{chance.randint(1, 9)}.{chance.randint(0, 30)}"
    return App(name, version, {"colour": f"#{chance.randrange(0xFFFFFF):06x}"})


@lru_cache(maxsize=1)
def _popularity() -> list[float]:
    return [1 / (rank + 1) for rank in range(len(APPS))]


@lru_cache(maxsize=1)
def _words() -> str:
    chance = Random("pages")
    return " ".join(chance.choice(WORDS) for _ in range(12_000))


def _text(start: int) -> str:
    return _words()[start : start + PAGE]
