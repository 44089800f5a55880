"""The simple way, without Kafka: the same page, and what it loses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import pytest
from noticing import SECRET, Note, Page, Served, browse, running
from processes import wait_until

from labkit.patterns.notice_window import Bounds
from labkit.runtime.broker import free_ports
from labkit.services.clients import ask
from labkit.services.notifications import direct
from labkit.services.notifications.browser import Browser
from labkit.services.notifications.channels import Channels
from labkit.services.notifications.direct import BOUNDS, DirectNotices, DirectNotificationService


@contextmanager
def serving(port: int = 0) -> Iterator[Served]:
    with running(DirectNotificationService(port or free_ports()[0], SECRET)) as served:
        yield served


async def tell(url: str, channel: str, *ids: str) -> None:
    for one in ids:
        await asyncio.to_thread(DirectNotices(url), channel, Note(one))


def test_a_page_that_is_here_is_told_its_own() -> None:
    async def pages(session: aiohttp.ClientSession) -> None:
        one, other = Page(session, served.url), Page(session, served.url)
        for page in (one, other):
            await page.open()
            assert await page.listen() == "start over"
        await tell(served.url, one.channel, "1")
        await tell(served.url, other.channel, "2")
        assert [await one.ids(1), await other.ids(1)] == [["1"], ["2"]]
        assert one.position == ""

    with serving() as served:
        browse(pages)


def test_a_notice_is_lost_when_the_service_is_down_or_another_instance_is_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_ports()[0]

    async def pages(session: aiohttp.ClientSession) -> None:
        with serving() as there:
            with serving(port) as here:
                page = Page(session, here.url)
                await page.open()
                assert await page.listen() == "start over"
                await tell(there.url, page.channel, "to another instance")
                await tell(here.url, page.channel, "1")
                assert await page.ids(1) == ["1"]
                await asyncio.to_thread(here.stop.set)
                assert await page.closed() == aiohttp.WSCloseCode.GOING_AWAY
            await tell(here.url, page.channel, "while it is down")
            assert "while it is down" in caplog.text
            with serving(port) as here:
                await tell(here.url, page.channel, "while the page is away")
                assert await page.listen() == "start over"
                await tell(here.url, page.channel, "2")
                assert await page.ids(1) == ["2"]

    browse(pages)


def test_a_page_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BOUNDS", Bounds(waiting=10))

    async def pages(session: aiohttp.ClientSession) -> None:
        page = Page(session, served.url)
        await page.open()
        await page.listen()
        notice, told = {"id": "big", "notice": {"text": "x" * 10_000}}, 1
        while told:
            async with session.post(f"{served.url}/channels/{page.channel}/notices", json=notice) as answer:
                told = (await answer.json())["told"]
        await page.closed()
        assert await page.listen() == "start over"

    with serving() as served:
        browse(pages)


@pytest.mark.parametrize(
    "body",
    [b"", b"no JSON", b"[]", b'{"id": 1}', b'{"id": "1"}', b'{"id": "\xff", "notice": 1}', b"[" * 5000],
)
def test_what_is_no_notice_is_refused(body: bytes) -> None:
    with serving() as served:
        channel = Channels(SECRET).make(60).id
        assert ask(f"{served.url}/channels/{channel}/notices", "POST", body)[0] == 400


def test_a_channel_that_is_not_ours_and_a_notice_that_is_too_large() -> None:
    with serving() as served:
        large = {"id": "1", "notice": "x" * BOUNDS.largest}
        assert ask(f"{served.url}/channels/{Channels(SECRET).make(60).id}/notices", "POST", large)[0] == 413
        for channel in ("unknown", Channels(SECRET).make(0).id, Channels("another secret of some length").make(60).id):
            assert ask(f"{served.url}/channels/{channel}/notices", "POST", {"id": "1", "notice": {}})[0] == 403


@pytest.mark.parametrize(("error", "ended"), [(AssertionError(), ""), (ValueError("odd"), "ValueError: odd")])
def test_a_browser_connects_again_or_says_why_it_does_not(
    error: Exception, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first: aiohttp's own, when a service is killed between its answer and the first message."""
    connect, errors = aiohttp.ClientSession.ws_connect, [error]

    def first_an_error(*given: object, **named: object) -> object:
        if errors:
            raise errors.pop()
        return connect(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(aiohttp.ClientSession, "ws_connect", first_an_error)
    with serving() as served, Browser(served.url) as browser:
        wait_until(lambda: browser.connected.is_set() or browser.ended)
        assert browser.connected.is_set() == (not ended)
        assert ended in browser.ended
