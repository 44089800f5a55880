"""What became of imports, in the database and on the screens of their pages: what a verdict compares."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from labkit.kafka.errors import LabkitError
from labkit.services.contacts.importer import stored
from labkit.services.notifications.browser import Browser

STAGES = ("accepted", "consumed", "failed row", "completed")  # of these a page hears however an import is shared


def on_screens(pages: Mapping[str, Browser], dsn: str, timeout: float = 10.0) -> dict[str, tuple[int, ...]]:
    """Of each import on a screen: how many contacts are stored, then how many notices of each of `STAGES` are shown.

    `pages` has the page of each request. A request that is on the screen of another page is in the answer under a name
    of its own. All pages together get `timeout` seconds to show the end of their imports; then they are taken
    as they are.
    """
    found, until = {}, time.monotonic() + timeout
    for page in {*pages.values()}:
        own = [request for request, its in pages.items() if its is page]
        with suppress(LabkitError):
            left = max(0.0, until - time.monotonic())
            page.wait(lambda: all(page.shown("completed", one) for one in own), "its imports", left)  # noqa: B023
        for request in {one.notice["request"] for one in page.screen}:
            stray = "" if request in own else f" on the page of {page.channel}"
            shown = (len(page.shown(stage, request)) for stage in STAGES)
            found[request + stray] = (len(stored(dsn, request)), *shown)
    return found
