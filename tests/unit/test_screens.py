"""What became of imports, by the screens of their pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from labkit.kafka.errors import LabkitError
from labkit.services.contacts import on_screens, screens


@dataclass(eq=False)
class Page:
    channel: str
    screen: list[Any] = field(default_factory=list)

    def hears(self, request: str, *stages: str) -> None:
        self.screen += [SimpleNamespace(notice={"request": request, "stage": stage}) for stage in stages]

    def shown(self, stage: str, request: str) -> list[Any]:
        return [one for one in self.screen if one.notice == {"request": request, "stage": stage}]

    def wait(self, condition: Any, what: str, timeout: float) -> None:
        if not condition():
            raise LabkitError(what)


def test_each_import_is_counted_on_its_page_and_a_stray_one_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screens, "stored", lambda dsn, request: [dsn] * 3)
    mine, other, silent = Page("mine"), Page("other"), Page("silent")
    mine.hears("mine/1", "accepted", "consumed", "consumed", "processed", "failed row", "completed")
    mine.hears("mine/2", "accepted")
    other.hears("other/1", "accepted", "completed")
    other.hears("mine/1", "consumed")
    pages: dict[str, Any] = {"mine/1": mine, "mine/2": mine, "other/1": other, "silent/1": silent}
    assert on_screens(pages, "dsn") == {
        "mine/1": (3, 1, 2, 1, 1),
        "mine/2": (3, 1, 0, 0, 0),
        "other/1": (3, 1, 0, 0, 1),
        "mine/1 on the page of other": (3, 0, 1, 0, 0),
    }
