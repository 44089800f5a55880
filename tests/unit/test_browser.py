"""The browser without a screen, at a service that closes its connections."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from labkit.services import contacts
from labkit.services.notifications import Browser
from labkit.services.notifications.browser import FINAL


@contextmanager
def service(*codes: int) -> Iterator[str]:
    """Closes one connection with each of these codes, and says so before, as the real one does. The next one stays."""
    left, ready, loop = list(codes), threading.Event(), asyncio.new_event_loop()
    ports: list[int] = []

    async def open_channel(request: web.Request) -> web.Response:
        return web.json_response({"channel": "c", "key": "k", "position": "p"}, status=201)

    async def connect(request: web.Request) -> web.WebSocketResponse:
        page = web.WebSocketResponse()
        await page.prepare(request)
        await page.receive()
        if left:
            code = left.pop(0)
            await page.send_json({"code": code, "reason": "a test"})
            await page.close(code=code)
        else:
            await page.send_json({"outcome": "nothing missed", "position": "q"})
            await page.receive()
        return page

    async def serve() -> None:
        app = web.Application()
        app.add_routes([web.post("/channels", open_channel), web.get("/notifications", connect)])
        runner = web.AppRunner(app, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
        ready.set()
        await stop.wait()
        await runner.cleanup()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


def test_a_page_that_is_told_to_come_back_later_or_made_a_mistake_does_so() -> None:
    with service(4503, 4400, 4429) as url, Browser(url) as browser:
        assert browser.connected.wait(20), browser.ended
        assert (browser.outcomes, browser.position, browser.ended) == (["nothing missed"], "q", "")


@pytest.mark.parametrize("code", [4403, 4410])
def test_a_page_whose_channel_is_over_does_not_come_back(code: int) -> None:
    with service(code) as url, Browser(url) as browser:
        browser._thread.join(20)
        assert browser.ended == f"closed with {code}: another attempt would not do better"


def test_the_page_of_contacts_takes_the_same_codes_for_an_end() -> None:
    page = (Path(contacts.__path__[0]) / "page" / "page.js").read_text()
    codes = re.search(r"OPEN_ANOTHER = new Set\(\[([\d, ]+)\]\)", page)
    assert codes is not None
    assert {int(code) for code in codes[1].split(",")} == set(FINAL)
