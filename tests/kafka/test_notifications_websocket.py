"""The service that tells notices to pages through WebSockets: channels, origins, bounds, and what may be away."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import psutil
import pytest
from consuming import fresh_topic, put
from noticing import BEGAN, Note, Page, browse, process_serving, send, serving
from processes import wait_until
from stores import raw

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.patterns import notifications as followed
from labkit.patterns.notice_window import Bounds
from labkit.runtime import shared_broker
from labkit.services.notifications import pages as paged
from labkit.services.notifications.channels import Channels
from labkit.services.notifications.pages import CloseCode


def test_a_page_is_told_its_own_and_comes_back_to_another_instance(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 2, Note)

    async def pages(session: aiohttp.ClientSession) -> None:
        one, other = Page(session, here.url), Page(session, here.url)
        for page in (one, other):
            await page.open()
            assert await page.listen() == "nothing missed"
        for number in range(3):
            await send(topic, one.channel, f"one {number}")
            await send(topic, other.channel, f"other {number}")
        assert await one.ids(3) == ["one 0", "one 1", "one 2"]
        assert await other.ids(3) == ["other 0", "other 1", "other 2"]
        await one.socket.close()
        await send(topic, one.channel, "one 3", "one 4")
        await there.has_read(8)
        assert await one.listen(there.url) == "missed"
        assert await one.ids(2) == ["one 3", "one 4"]
        await one.socket.close()
        assert await one.listen(there.url) == "nothing missed"
        one.position = BEGAN
        await one.socket.close()
        assert await one.listen(here.url) == "start over"
        await send(topic, one.channel, "one 5")
        assert await one.ids(1) == ["one 5"]

    with serving(topic) as here, serving(topic) as there:
        browse(pages)


def test_notices_of_any_size_come_whole(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)
    texts = ["", "é" * 10, "x" * 126, "x" * 1000, "x" * 65_536, "x" * 100_000, "the last"]

    async def pages(session: aiohttp.ClientSession) -> None:
        page = Page(session, served.url)
        await page.open()
        sent = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
        await asyncio.to_thread(put, topic, *sent, key=page.channel)
        await served.has_read(len(texts))
        assert await page.listen() == "missed"  # so they come together
        assert [(await page.hear())["notice"]["text"] for _ in texts] == texts

    with serving(topic, bounds=Bounds(largest=200_000)) as served:
        browse(pages)


def test_a_channel_that_is_unknown_forged_foreign_or_expired(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)

    async def pages(session: aiohttp.ClientSession) -> None:
        mine, foreign = Page(session, served.url), Page(session, served.url)
        told, theirs = await mine.open(), await foreign.open()
        over = Channels("a secret of some length").make(0)
        forged = Channels("another secret of some length").make(600)
        cases = [
            ("unknown", told["key"], CloseCode.NOT_YOURS),
            (told["channel"][:-1] + "?", told["key"], CloseCode.NOT_YOURS),
            (forged.id, forged.key, CloseCode.NOT_YOURS),
            (theirs["channel"], told["key"], CloseCode.NOT_YOURS),
            (theirs["channel"], "", CloseCode.NOT_YOURS),
            (over.id, over.key, CloseCode.EXPIRED),
        ]
        for channel, key, code in cases:
            await mine.connect()
            await mine.socket.send_json({"channel": channel, "key": key, "position": told["position"]})
            assert await mine.closed() == code, channel
        assert await mine.listen() == "nothing missed"

    with serving(topic) as served:
        browse(pages)


def test_a_channel_expires_while_a_page_listens(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "BEAT", 0.1)
    topic = fresh_topic(cluster, 1, Note)

    async def pages(session: aiohttp.ClientSession) -> None:
        page = Page(session, served.url)
        await page.open()
        assert await page.listen() == "nothing missed"
        later = SimpleNamespace(time=lambda: time.time() + 601, monotonic=time.monotonic)
        monkeypatch.setattr(paged, "time", later)
        assert await page.closed() == CloseCode.EXPIRED

    with serving(topic, lifetime=600.0) as served:
        browse(pages)


def test_what_a_page_may_not_say_closes_its_connection_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = fresh_topic(cluster, 1, Note)

    async def pages(session: aiohttp.ClientSession) -> None:
        good, bad = Page(session, served.url), Page(session, served.url)
        await good.open()
        await good.listen()
        await bad.open()
        for said in ("", "no JSON", "[]", '{"channel": 1}', "[" * 5000, '{"channel": "\\ud800", "key": ""}'):
            await bad.connect()
            await bad.socket.send_str(said)
            assert await bad.closed() in (CloseCode.BAD_MESSAGE, CloseCode.NOT_YOURS), said
        await bad.connect()
        await bad.socket.send_bytes(b"\xff\x00")
        assert await bad.closed() == CloseCode.BAD_MESSAGE
        await bad.connect()
        await bad.socket.send_str("x" * 10_000)
        assert await bad.closed() == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        assert await bad.listen() == "nothing missed"
        with suppress(ConnectionError):  # it is closed meanwhile
            for _ in range(100):
                await bad.socket.send_str("{}")
        assert await bad.closed() == CloseCode.TOO_MANY
        monkeypatch.setattr(paged, "HELLO", 0.1)
        await bad.connect()  # and says nothing
        assert await bad.closed() == CloseCode.BAD_MESSAGE
        await send(topic, good.channel, 1)
        assert await good.ids(1) == ["1"]

    with serving(topic) as served:
        browse(pages)


def test_nothing_follows_the_good_bye(cluster: Cluster) -> None:
    """By hand: a client's library hears nothing more itself once it has heard that."""
    topic = fresh_topic(cluster, 1, Note)
    unmasked = bytes(4)  # a mask that changes nothing

    async def pages(session: aiohttp.ClientSession) -> None:
        page = Page(session, served.url)
        told = await page.open()
        line, page_line = await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2]))
        hello = json.dumps({name: told[name] for name in ("channel", "key", "position")}).ljust(126).encode()
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
        key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
        asked = f"GET /notifications HTTP/1.1\r\nHost: here\r\nOrigin: {served.url}\r\n{upgrade}\r\n{key}\r\n\r\n"
        page_line.write(asked.encode())
        page_line.write(b"\x81\xfe" + len(hello).to_bytes(2, "big") + unmasked + hello)
        heard = await line.readuntil(b"nothing missed")
        page_line.write(b"\x81\x82" + unmasked + b"{}")  # a second word
        heard = await line.readuntil(CloseCode.TOO_MANY.to_bytes(2, "big"))
        await line.readexactly(heard[-3] - 2)  # the rest of the good-bye: why
        await send(topic, page.channel, "too late")
        await served.has_read(1)
        assert await line.read() == b""
        page_line.close()

    with serving(topic) as served:
        browse(pages)


def test_a_page_of_another_origin_gets_nothing(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)

    async def pages(session: aiohttp.ClientSession) -> None:
        port = served.service.port
        for origin in (None, "null", "http://evil.example", f"http://evil.example:{port}", f"https://127.0.0.1:{port}"):
            headers = {} if origin is None else {"Origin": origin, "Host": origin.partition("//")[2] or "evil.example"}
            async with session.post(f"{served.url}/channels", headers=headers) as answer:
                assert answer.status == 403
                assert "Access-Control-Allow-Origin" not in answer.headers
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"{served.url}/notifications", headers=headers)
            assert refused.value.status == 403
        own, other = (served.url, f"http://localhost:{port}"), ("https://lab.example.org", "http://127.0.0.1:1")
        for origin in (*own, *other, "http://localhost:1"):
            async with session.post(f"{served.url}/channels", headers={"Origin": origin}) as answer:
                assert answer.status == 201
                assert answer.headers.getall("Access-Control-Allow-Origin") == [origin]
                assert answer.headers["Vary"] == "Origin"

    with serving(topic, origins=("https://lab.example.org/user/x/lab", "http://127.0.0.1:1")) as served:
        browse(pages)


def test_connections_and_new_channels_are_limited(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)

    async def pages(session: aiohttp.ClientSession) -> None:
        first, second = Page(session, served.url), Page(session, served.url)
        await first.open()
        await second.open()
        statuses = set()
        while 429 not in statuses:  # one more each second
            async with session.post(f"{served.url}/channels", headers={"Origin": served.url}) as answer:
                statuses.add(answer.status)
                assert answer.headers["Access-Control-Allow-Origin"] == served.url  # else a page sees no status
        assert statuses <= {201, 429}
        await first.listen()
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await second.listen()
        assert refused.value.status == 503
        await first.socket.close()
        while True:
            with suppress(aiohttp.WSServerHandshakeError):  # the other side is not done yet
                assert await second.listen() == "nothing missed"
                break

    with serving(topic, connections=1, openings=2.0) as served:
        browse(pages)


@pytest.mark.long
def test_more_pages_than_a_shell_allows_files(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)

    async def pages(session: aiohttp.ClientSession) -> None:
        others = [Page(session, url) for _ in range(200)]
        for page in others:
            await asyncio.wait_for(page.connect(), 20)
        page = Page(session, url)
        await page.open()
        assert await page.listen() == "nothing missed"

    with process_serving(topic, files=150) as (url, _):
        browse(pages)


def test_a_page_that_never_reads_is_dropped_and_served_again(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)
    text = "x" * 10_000

    async def pages(session: aiohttp.ClientSession) -> None:
        lazy, busy = Page(session, served.url), Page(session, served.url)
        await lazy.open()
        await busy.open()
        await lazy.listen()
        await busy.listen()
        for number in itertools.count():
            await asyncio.to_thread(put, topic, *[{"id": "big", "text": text}] * 20, key=lazy.channel)
            await send(topic, busy.channel, number)
            assert await busy.ids(1) == [str(number)]
            if served.figure("dropped"):
                break
        assert (await lazy.hear())["id"] == "big"  # what had left before
        await lazy.closed()
        assert await lazy.listen() in ("missed", "start over")
        await send(topic, lazy.channel, "after")
        while (await lazy.hear())["id"] != "after":
            pass

    with serving(topic, bounds=Bounds(waiting=50, window=1000)) as served:
        browse(pages)


def test_an_instance_that_is_killed_and_one_that_ends(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 2, Note)

    async def pages(session: aiohttp.ClientSession) -> None:
        with process_serving(topic) as (url, process):
            page = Page(session, url)
            await page.open()
            assert await page.listen() == "nothing missed"
            await send(topic, page.channel, 1)
            assert await page.ids(1) == ["1"]
            process.kill()
            await page.closed()
        await send(topic, page.channel, 2, 3)
        await there.has_read(3)
        assert await page.listen(there.url) == "missed"
        assert await page.ids(2) == ["2", "3"]
        there.stop.set()
        assert await page.closed() == aiohttp.WSCloseCode.GOING_AWAY

    with serving(topic) as there:
        browse(pages)


@pytest.mark.long
def test_a_page_that_is_gone_without_a_word_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was written for it: no end of the connection ever comes, and its system still holds it open."""
    monkeypatch.setattr(paged, "DEAD", 1)
    topic = fresh_topic(cluster, 1, Note)

    def connections() -> int:
        found = psutil.Process().net_connections("tcp")
        return sum(one.laddr.port == served.service.port and one.status == "ESTABLISHED" for one in found)

    async def pages(session: aiohttp.ClientSession) -> None:
        page = Page(session, served.url)
        await page.open()
        await page.listen()
        assert page.socket._conn is not None
        transport = page.socket._conn.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(put, topic, *[{"id": "big", "text": "x" * 10_000}] * 90, key=page.channel)
        await asyncio.to_thread(wait_until, lambda: served.figure("open") == 0, what="its subscription's end")
        await asyncio.to_thread(wait_until, lambda: connections() == 0, what="its connection's end")
        transport.resume_reading()
        await page.closed()

    with serving(topic) as served:
        browse(pages)


@pytest.mark.long  # notebook 02 kills it
def test_the_broker_is_killed_and_back(own_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "LOOK", 0.1)

    def is_back() -> bool:
        with suppress(LabkitError):
            return bool(lease.cluster.describe(1.0))
        return False

    async def pages(session: aiohttp.ClientSession) -> None:
        page, other = Page(session, served.url), Page(session, served.url)
        began = (await page.open())["position"]
        assert await page.listen() == "nothing missed"
        await send(topic, page.channel, 1)
        assert await page.ids(1) == ["1"]
        broker = shared_broker.status()
        assert broker is not None
        os.kill(broker.pid, signal.SIGKILL)
        await other.open()  # what was read is here
        assert await other.listen() == "nothing missed"
        await page.socket.close()
        page.position = began
        assert await page.listen() == "missed"
        assert await page.ids(1) == ["1"]
        await asyncio.to_thread(wait_until, is_back, 30, "the broker")
        await send(topic, page.channel, 2, 3)
        await send(topic, other.channel, 4)
        assert await page.ids(2) == ["2", "3"]  # and nobody starts over
        assert await other.ids(1) == ["4"]

    with shared_broker.shared_broker() as lease:
        topic = fresh_topic(lease.cluster, 2, Note)
        with serving(topic) as served:
            browse(pages)


@pytest.mark.long
def test_100_000_notices_to_a_page_that_never_reads_while_others_are_measured(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 4, Note)
    delays: list[float] = []

    async def pages(session: aiohttp.ClientSession) -> None:
        pages = [Page(session, served) for _ in range(20)]
        lazy, others = pages[0], pages[1:]
        for page in pages:
            await page.open()
            await page.listen()
        before = psutil.Process(process.pid).memory_info().rss
        records = [(lazy.channel.encode(), b'{"id": "%d"}' % number) for number in range(100_000)]

        def write() -> None:
            for start in range(0, len(records), 1000):
                raw(topic, *records[start : start + 1000], partition=-1)

        flood = asyncio.create_task(asyncio.to_thread(write))
        while not flood.done():
            for page in others:
                since = time.perf_counter()
                await send(topic, page.channel, "x")
                assert await page.ids(1) == ["x"]
                delays.append(time.perf_counter() - since)
        await flood
        grown = psutil.Process(process.pid).memory_info().rss - before
        assert grown < 150_000_000  # the window's bound
        await lazy.closed()
        outcome = await lazy.listen()
        assert outcome in ("missed", "start over")

    with process_serving(topic) as (served, process):
        browse(pages)
    delays.sort()
    print(f"{len(delays)} notices, p50 {delays[len(delays) // 2] * 1000:.1f} ms, longest {delays[-1] * 1000:.1f} ms")
