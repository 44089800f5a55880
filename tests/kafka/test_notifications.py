"""Notices reach the one page that they concern: positions, three outcomes, and bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import NewPartitions  # type: ignore[attr-defined]
from consuming import fresh_topic, make_anew, put, trim
from noticing import BEGAN, Note, notes
from processes import wait_until
from stores import raw, transaction

from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.errors import RecordsDeleted, Unavailable
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.patterns import notifications as followed
from labkit.patterns.notice_window import Bounds
from labkit.patterns.notifications import Notifications, Outcome, Subscription


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
    monkeypatch.setattr(followed, "LOOK", 600)  # for the broker this page is ahead too
    topic = fresh_topic(cluster, 1, Note)
    with Notifications(topic) as here:
        begin = here.position()
        page = Listener(here, "a", begin.replace("0:0", "0:2"))  # another instance has told it two
        assert page.outcome is Outcome.NOTHING_MISSED
        put(topic, *notes(1, 2, 3), key="a")
        page.wait(3)


def test_a_page_that_has_seen_what_kafka_lost_starts_over(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "LOOK", 0.1)
    topic = fresh_topic(cluster, 1, Note)
    put(topic, *notes(1, 2, 3), key="a")
    with Notifications(topic) as here:
        lost = Listener(here, "a", here.position().replace("0:3", "0:9"))
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
        assert [record.value for record in reader.read_to_end()] == [3]
    with Reader(topic, starts={0: 2}) as late, pytest.raises(RecordsDeleted, match=topic.short):
        late.read_to_end()


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


def test_a_notice_that_raises_stops_nobody(cluster: Cluster) -> None:
    class Computed(msgspec.Struct):
        text: str = ""

        @property
        def id(self) -> str:
            if self.text == "checked":
                raise RuntimeError("no id")
            return self.text

    class Checked(Note, frozen=True):
        def __post_init__(self) -> None:
            if self.text == "checked":
                raise RuntimeError("no notice")

    for value in (Computed, Checked):
        topic = fresh_topic(cluster, 1, value)
        with Notifications(topic) as here:
            page = Listener(here, "a", here.position())
            put(topic, {"id": "1", "text": "checked"}, {"id": "2", "text": "2"}, key="a")
            page.wait(2)
            assert here.ignored == 1


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
