"""Which change of a key stands, and what a view refuses to be called."""

from __future__ import annotations

import itertools
import random

import pytest

from labkit.kafka.errors import LabkitError
from labkit.patterns.views import Change, PostgresView, SqliteView, newest


def change(key: str, version: int | None, *rows: str) -> Change:
    return Change(key, version, [(row,) for row in rows] if rows else None)


def versions(changes: list[Change]) -> dict[str, int | None]:
    return {one.key: one.version for one in changes}


def test_of_a_key_the_newest_stands_in_whatever_order_they_come() -> None:
    for order in itertools.permutations([change("a", 1, "x"), change("a", 2), change("a", 3, "z")]):
        (kept,) = newest(order, {})
        assert (kept.version, kept.rows) == (3, [("z",)])


def test_what_is_stored_stands_unless_something_newer_comes() -> None:
    changes = [change("a", 4, "old"), change("a", 5, "same"), change("b", 6, "new"), change("c", 1, "first")]
    kept = newest(changes, {"a": 5, "b": 5})
    assert versions(kept) == {"b": 6, "c": 1}
    assert [one.replaces for one in kept] == [True, False]


def test_a_change_without_a_version_is_the_newest_and_keeps_the_version() -> None:
    (kept,) = newest([change("a", 4, "x"), change("a", None)], {"a": 3})
    assert (kept.version, kept.rows) == (4, None)
    assert newest([change("a", None), change("a", 3, "late")], {"a": 3})[0].rows is None
    assert newest([change("a", None), change("a", 4, "back")], {"a": 3})[0].rows == [("back",)]
    assert newest([change("never", None), change("never", 0, "first")], {})[0].rows == [("first",)]


def test_batches_of_any_size_come_to_the_same() -> None:
    """As do replays: what is kept of one batch is what the next one finds."""
    chance = random.Random(3)
    changes = [change(chance.choice("abcde"), chance.randrange(30), "x") for _ in range(400)]
    highest = {key: max(one.version or 0 for one in changes if one.key == key) for key in "abcde"}
    for size in (1, 3, 50, 400):
        stored: dict[str, int] = {}
        for start in range(0, 2 * len(changes), size):
            stored |= {one.key: one.version or 0 for one in newest((changes * 2)[start : start + size], stored)}
        assert stored == highest


@pytest.mark.parametrize(
    ("table", "columns", "key", "says"),
    [
        ("apps", {"App": "text"}, "site", "'App' cannot be a name"),
        ("apps", {}, "site", "needs columns beside its key 'site'"),
        ("apps", {"site": "text"}, "site", "needs columns beside its key 'site', with other names"),
        ("apps", {"order": "text"}, "site", r'"order": .* a word of SQL: apps, site, order text'),
        ("apps", {"app": "text"}, "group", r'"group": .* a word of SQL: apps, group, app text'),
        ("apps", {"app": "text)"}, "site", r".* a word of SQL: apps, site, app text\)"),
        ("order", {"app": "text"}, "site", r'"order": .* a word of SQL: order, site, app text'),
        ("index", {"app": "text"}, "site", r'"index": .* a word of SQL: index'),
        ("group", {"app": "text"}, "site", r'"group": .* a word of SQL: group'),
        ("values", {"app": "text"}, "site", r'"values": .* a word of SQL: values'),
        ("view", {"app": "text"}, "site", "view view cannot be made"),  # it would hide view_offsets
        ("sqlite_apps", {"app": "text"}, "site", "view sqlite_apps cannot be made"),
    ],
)
def test_what_a_view_cannot_be_made_of_is_told_at_once(
    table: str, columns: dict[str, str], key: str, says: str
) -> None:
    with pytest.raises(LabkitError, match=f"(?s){says}"):
        SqliteView("view.db", table, columns, key=key)


def test_a_view_shows_its_table_and_where_it_is_and_no_password() -> None:
    in_file = SqliteView("/tmp/<a>/view.db", "apps", {"app": "text"}, generation=2)
    assert repr(in_file) == "SqliteView(apps_2 in /tmp/<a>/view.db)"
    for dsn, where in {
        "host=db port=5432 user=me password=secret dbname=shop": "host=db, port=5432, dbname=shop",
        "postgresql://me:secret@db/shop": "host=db, dbname=shop",
        "password=secret": "PostgreSQL",
        "password=secret nonsense": "a PostgreSQL",
    }.items():
        view = PostgresView(dsn, "apps", {"app": "text"})
        assert repr(view) == f"PostgresView(apps_1 in {where})"
