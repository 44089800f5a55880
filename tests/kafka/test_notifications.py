"""Notices reach the one page that they concern: positions, three outcomes, bounds, and the WebSocket service."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from confluent_kafka.admin import NewPartitions  # type: ignore[attr-defined]
from consuming import fresh_topic, make_anew, put, trim
from noticing import Note, Page, browse, process_serving, serving
from processes import wait_until
from stores import raw, transaction

from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.errors import RecordsDeleted, Unavailable
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.patterns import notifications as followed
from labkit.patterns.notice_window import Bounds
from labkit.patterns.notifications import Notifications, Outcome, Subscription
from labkit.services.notifications import pages as paged
from labkit.services.notifications.channels import Channels
from labkit.services.notifications.pages import CloseCode

BEGAN = "topic.1.0:0"  # the position of a page of another topic


def notes(*ids: object) -> list[dict[str, str]]:
    return [{"id": str(one)} for one in ids]


class Listener:
    """A page as the pattern sees it."""

    def __init__(self, notifications: Notifications[Note], channel: str, position: str) -> None:
        self.outcome: Outcome | None = None
        self.ids: list[str] = []
        self.position = ""
        self.subscription: Subscription = notifications.open(channel, position, lambda: None)
        self.look()

    def look(self) -> None:
        for told in self.subscription.take(10**6):
            self.position = told.position
            if told.outcome is not None:
                self.outcome = told.outcome
            else:
                self.ids.append(told.id)

    def wait(self, *ids: object) -> None:
        """Wait until these are all it was told."""
        expected = [*map(str, ids)]
        wait_until(lambda: self.look() or len(self.ids) >= len(expected), what=f"{expected}")
        assert self.ids == expected

    def wait_for(self, outcome: Outcome) -> None:
        wait_until(lambda: self.look() or self.outcome is outcome, what=outcome.value)


def test_who_comes_back_hears_one_of_three_things(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 2, Note)
    with Notifications(topic) as here:
        page = Listener(here, "a", here.position())
        assert page.outcome is Outcome.NOTHING_MISSED
        put(topic, *notes(1, 2), key="a")
        page.wait(1, 2)
        after_2 = page.position
        put(topic, *notes(3, 4), key="a")
        put(topic, *notes("of another"), key="b")
        page.wait(1, 2, 3, 4)
    with Notifications(topic) as there, Notifications(topic, Bounds(window=4)) as small:  # as after a restart
        missed, nothing = Listener(there, "a", after_2), Listener(there, "a", page.position)
        assert missed.outcome is Outcome.MISSED
        assert missed.ids == ["3", "4"]
        assert nothing.outcome is Outcome.NOTHING_MISSED
        assert nothing.ids == []
        for unknown in ("", BEGAN, "nonsense"):
            over = Listener(there, "a", unknown)
            assert over.outcome is Outcome.START_OVER
            assert over.ids == []
        assert Listener(small, "a", after_2).ids == ["3", "4"]
        put(topic, *notes(5, 6, 7), key="a")
        missed.wait(3, 4, 5, 6, 7)
        nothing.wait(5, 6, 7)
        over.wait(5, 6, 7)
        wait_until(lambda: Listener(small, "a", after_2).outcome is Outcome.START_OVER)
        assert Listener(small, "a", over.position).outcome is Outcome.NOTHING_MISSED


def test_an_instance_that_is_behind_tells_nothing_twice(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "LOOK", 0.1)
    topic = fresh_topic(cluster, 1, Note)
    with Notifications(topic) as here:
        begin = here.position()
        page = Listener(here, "a", begin.replace("0:0", "0:2"))  # another instance has told it two
        assert page.outcome is Outcome.NOTHING_MISSED
        put(topic, *notes(1, 2, 3), key="a")
        page.wait(3)
        lost = Listener(here, "a", begin.replace("0:0", "0:9"))  # of what Kafka has lost since
        assert lost.outcome is Outcome.NOTHING_MISSED
        lost.wait_for(Outcome.START_OVER)
        put(topic, *notes(4), key="a")
        lost.wait(4)


def test_the_topic_is_trimmed_while_a_page_is_away(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)
    with Notifications(topic) as here:
        page = Listener(here, "a", here.position())
        put(topic, *notes(0, 1, 2, 3, 4), key="a")
        wait_until(lambda: here.position().endswith(":5"))
        after_1 = here.position().replace(":5", ":2")
        trim(topic, 4)
        assert Listener(here, "a", after_1).ids == ["2", "3", "4"]  # this one has them in memory
        page.wait(0, 1, 2, 3, 4)
    with Notifications(topic) as there:
        over = Listener(there, "a", after_1)
        assert over.outcome is Outcome.START_OVER
        assert Listener(there, "a", after_1.replace(":2", ":4")).ids == ["4"]
        put(topic, *notes(5), key="a")
        over.wait(5)
    trim(topic, 6)
    with Notifications(topic) as empty:
        assert Listener(empty, "a", after_1.replace(":2", ":6")).outcome is Outcome.NOTHING_MISSED
        assert Listener(empty, "a", after_1.replace(":2", ":5")).outcome is Outcome.START_OVER


def test_who_reads_from_an_offset_hears_that_it_was_deleted(cluster: Cluster) -> None:
    topic = fresh_topic(cluster)
    put(topic, 0, 1, 2, 3)
    trim(topic, 3)
    with Reader(topic, starts={0: 3}) as reader:
        assert [record.value for record in reader.rest()] == [3]
    with Reader(topic, starts={0: 2}) as late, pytest.raises(RecordsDeleted, match=topic.short):
        late.rest()


def more_partitions(topic: Topic[Any]) -> None:
    for future in admin(topic.cluster).create_partitions([NewPartitions(topic.name, 2)]).values():
        future.result(10)


@pytest.mark.parametrize("change", [make_anew, more_partitions])
def test_whoever_listens_starts_over_in_another_topic(
    cluster: Cluster, change: Callable[[Topic[Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed, "LOOK", 0.1)
    topic = fresh_topic(cluster, 1, Note)
    put(topic, *notes(1), key="a")
    with Notifications(topic) as here:
        page = Listener(here, "a", here.position())
        before = page.position
        change(topic)
        page.wait_for(Outcome.START_OVER)
        assert page.position != before
        put(topic, *notes(2), key="a")
        page.wait(2)
        assert Listener(here, "a", before).outcome is Outcome.START_OVER


def test_a_topic_that_is_not_there_is_waited_for(cluster: Cluster) -> None:
    topic = Topic(cluster, f"{fresh_topic(cluster).name}-missing", 1, Note)
    here = Notifications(topic)
    wait_until(lambda: "does not exist" in here._trouble)
    with pytest.raises(Unavailable, match="does not exist"):
        here.wait_ready(0.1)
    with pytest.raises(Unavailable):
        here.open("a", "", lambda: None)
    topic.create()
    with here:
        assert Listener(here, "a", here.position()).outcome is Outcome.NOTHING_MISSED


def test_what_is_no_notice_is_passed_over_and_counted(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)
    with Notifications(topic, Bounds(largest=100)) as here:
        page = Listener(here, "a", here.position())
        good = b'{"id": "good"}'
        wrong = [(None, good), (b"\xff", good), (b"a", None), (b"a", b"no JSON"), (b"a", b'{"text": "no id"}')]
        wrong += [(b"a", b'{"id": "\xff"}'), (b"a", b'{"id": "1", "text": "%b"}' % (b"x" * 100))]
        raw(topic, *wrong, (b"a", b'{"id": "good", "unknown": "\xff"}'))
        page.wait("good")
        assert here.ignored == len(wrong)


def test_notices_of_a_transaction_are_told_when_it_is_committed(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)
    with Notifications(topic) as here:
        page = Listener(here, "a", here.position())
        transaction(topic, ("a", {"id": "aborted"}), end="abort")
        transaction(topic, ("a", {"id": "committed"}))
        page.wait("committed")
        after = page.position
    with Notifications(topic) as there:  # markers lie behind the last notice, and are no notices
        assert Listener(there, "a", after).outcome is Outcome.NOTHING_MISSED


def test_who_does_not_take_is_dropped_at_a_bound_and_served_again(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)
    with Notifications(topic, Bounds(waiting=10)) as here:
        lazy, busy = (Listener(here, "a", here.position()) for _ in range(2))
        put(topic, *notes(*range(10)), key="a")
        busy.wait(*range(10))
        assert not lazy.subscription.dropped
        put(topic, *notes(10), key="a")
        busy.wait(*range(11))
        wait_until(lambda: lazy.subscription.dropped)
        lazy.look()
        assert lazy.ids == []
        assert here.subscribers == 1
        assert Listener(here, "a", lazy.position).outcome is Outcome.START_OVER  # more than may wait
        assert Listener(here, "a", busy.position).outcome is Outcome.NOTHING_MISSED


def test_of_many_subscribers_of_a_channel_the_oldest_leaves(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)
    with Notifications(topic, Bounds(subscribers=2)) as here:
        first, second, third = (Listener(here, "a", here.position()) for _ in range(3))
        put(topic, *notes(1), key="a")
        second.wait(1)
        third.wait(1)
        assert first.subscription.dropped
        for one in (first, second, third):
            here.leave(one.subscription)
        assert here.subscribers == 0


def test_a_quiet_channel_keeps_its_place_in_the_window(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 1, Note)
    with Notifications(topic, Bounds(window=10)) as here:
        page = Listener(here, "a", here.position())
        put(topic, *notes(*range(100)), key="of others")
        wait_until(lambda: here.position().endswith(":100"))
        assert Listener(here, "a", page.position).outcome is Outcome.START_OVER
        beat = page.subscription.beat()
        assert beat is not None
        assert Listener(here, "a", beat.position).outcome is Outcome.NOTHING_MISSED


# -- The WebSocket service ---------------------------------------------------------------------------------------------


async def send(topic: Topic[Any], channel: str, *ids: object) -> None:
    await asyncio.to_thread(put, topic, *notes(*ids), key=channel)


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
def test_100_000_notices_to_a_page_that_never_reads_while_others_are_measured(cluster: Cluster) -> None:
    import psutil

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
        flood = asyncio.create_task(asyncio.to_thread(raw, topic, *records, partition=-1))
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
