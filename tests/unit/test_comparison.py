"""Comparing what should be there with what is."""

from __future__ import annotations

import pytest

from labkit.lab.audit import AuditFailed
from labkit.lab.comparison import compare


def test_the_same_is_valid_whatever_the_order() -> None:
    same = compare("view", {"a": [1], "b": [2]}, {"b": [2], "a": [1]})
    assert same.ok
    assert same.check() == "view: 2 expected · 2 found · missing 0 · unexpected 0 · different 0"


def test_every_difference_is_named() -> None:
    found = compare("view", {"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 4, "d": 5})
    with pytest.raises(AuditFailed) as failed:
        found.check()
    assert str(failed.value).splitlines() == [
        "invalid: view: 3 expected · 3 found · missing 1 · unexpected 1 · different 1",
        "  missing: a",
        "  unexpected: d",
        "  different: c",
    ]
    assert "D55E00" in found._repr_html_()


def test_of_many_the_first_are_named() -> None:
    found = compare("<view>", {f"id-{number:02}": 1 for number in range(30)}, {})
    assert found.verdict().endswith("id-09 and 20 more")
    assert "&lt;view&gt;" in found._repr_html_()
