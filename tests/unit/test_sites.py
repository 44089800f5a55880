"""The sites are the same for everybody, and realistic enough."""

from __future__ import annotations

import tracemalloc
from collections import Counter, deque
from pathlib import Path

import msgspec

from labkit.kafka.records import encode
from labkit.services.sites.content import Site, changes, site, site_id, sites, updates

FILE = Path(__file__).parents[2] / "data" / "sites.jsonl"


def test_the_file_is_what_the_generator_makes() -> None:
    """On every machine, and with every Python."""
    lines = FILE.read_bytes().splitlines()
    assert lines == [encode(one) for one in sites(len(lines), pages=0)]
    assert msgspec.json.decode(lines[17], type=Site) == site(17, pages=0)


def test_another_seed_makes_other_sites() -> None:
    assert [one.apps for one in sites(20, seed=1)] != [one.apps for one in sites(20, seed=2)]


def test_few_apps_on_most_sites_many_on_few() -> None:
    many = list(sites(2000, pages=0))
    sizes = Counter(len(one.apps) for one in many)
    assert 0.5 < sizes[1] / len(many) < 0.7
    assert 0 < sum(count for size, count in sizes.items() if size >= 10) / len(many) < 0.1
    apps = Counter(app.name for one in many for app in one.apps)
    assert apps["stores"] > 10 * apps["horoscopes"] > 0
    assert len({one.id for one in many}) == len(many)
    assert max(Counter(one.owner for one in many).values()) > 3


def test_a_site_is_large_and_what_most_want_of_it_small() -> None:
    one = site(21)
    assert len(encode(one)) > 30 * len(encode(one.apps))


def test_versions_follow_each_other_and_change_apps() -> None:
    many = list(updates(50, 300, pages=0))
    seen: dict[str, int] = {}
    for one in many:
        assert one.version == seen.get(one.id, 1) + 1
        seen[one.id] = one.version
        assert one == site(int(one.id.removeprefix("site-")), one.version, pages=0)
    changed = [number for number in range(50) if site(number, 2).apps != site(number, 1).apps]
    assert len(changed) > 40
    assert next(updates(50, 1, first=7)).version == 7
    assert site_id(7) == "site-000007"


def test_one_change_in_twenty_is_a_deletion() -> None:
    many = list(changes(200, 1500, pages=0))
    assert many == list(changes(200, 1500, pages=0))
    same = [(one.id, one.version) for one in updates(200, 1500, pages=0)]
    assert [(name, version) for name, version, _ in many] == same
    deleted = [one for _, _, one in many].count(None)
    assert 0.04 < deleted / len(many) < 0.06
    there: dict[str, bool] = {}
    for name, version, one in many:
        assert one is not None or there.get(name, True)  # what is gone is not deleted again
        assert one is None or (one.id, one.version) == (name, version)
        there[name] = one is not None
    assert 0 < list(there.values()).count(False) < deleted  # some are back
    assert None not in [one for _, _, one in changes(200, 500, pages=0, deletes=0)]


def test_sites_stream_by_in_constant_memory() -> None:
    deque(sites(10, pages=1), maxlen=0)
    tracemalloc.start()
    deque(sites(3000, pages=1), maxlen=0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000
