"""The window of notices and the positions of pages, without Kafka."""

from __future__ import annotations

import pytest

from labkit.patterns.notice_window import Bounds, Entry, Position, Window

PLENTY = Bounds()


def window(starts: dict[int, int], *channels: str, bounds: Bounds = PLENTY) -> Window:
    """Notices of partition 0, one for each of these channels."""
    made = Window("topic", starts, bounds)
    for offset, channel in enumerate(channels, starts[0]):
        made.add(channel, Entry(0, offset, f"notice {offset}", b"0123456789"))
        made.ends[0] = offset + 1
    return made


def missed(of: Window, channel: str, position: str) -> list[int] | None:
    parsed = Position.parse(position)
    assert parsed is not None
    found = of.since(channel, parsed)
    return None if found is None else [one.offset for one in found]


def test_a_page_is_told_what_it_missed_of_its_channel() -> None:
    made = window({0: 5, 1: 0}, "a", "b", "a", "a", "b")
    assert missed(made, "a", "topic.2.0:5") == [5, 7, 8]
    assert missed(made, "a", "topic.2.0:8") == [8]
    assert missed(made, "a", "topic.2.0:9") == []
    assert missed(made, "b", "topic.2.0:7,1:0") == [9]
    assert missed(made, "c", "topic.2.0:5,1:0") == []
    assert missed(made, "a", "topic.2.0:1000") == []  # another instance has read further


@pytest.mark.parametrize(
    "position",
    [
        "another.2.0:9",  # topic
        "topic.3.0:9",  # number of partitions
        "topic.2.0:4",  # before the window
        "topic.2.0:9,2:0",  # no such partition
        "topic.2.1:0",  # the channel lies elsewhere
    ],
)
def test_what_cannot_be_known_is_told_as_such(position: str) -> None:
    assert missed(window({0: 5, 1: 0}, "a", "b", "a", "a", "b"), "a", position) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "t",
        "t.2",
        "t.2.",
        "t.2.0",
        "t.2.0:x",
        "t.2.0:-1",
        "t.2.0:1,",
        "t.2.0:9999999999999999999",
        "t.2.0:٣",
        "t.2.0:1\n",
    ],
)
def test_what_is_no_position(text: str) -> None:
    assert Position.parse(text) is None


def test_a_position_is_read_as_it_was_written() -> None:
    made = window({0: 5, 1: 3}, "a")
    assert Position.parse(str(made.position())) == made.position()
    assert str(made.position({1: 9})) == "topic.2.0:6,1:9"  # a page that has seen more than this window
    for topic_id in ("o/rTywtOSOyPlWuJ0IGN+g", "MOipOR-4QFakCyNpuXYEaA", "_" * 22):  # as clients write them
        position = Window(topic_id, {0: 0}, PLENTY).position()
        assert Position.parse(str(position)) == position


@pytest.mark.parametrize("bounds", [Bounds(window=3), Bounds(window_bytes=39)])
def test_the_oldest_leave_and_who_was_there_starts_over(bounds: Bounds) -> None:
    made = window({0: 0}, *"abcda", bounds=bounds)
    assert (len(made), made.size) == (3, 30)
    assert missed(made, "a", "topic.1.0:1") is None
    assert missed(made, "a", "topic.1.0:2") == [4]
    assert missed(made, "b", "topic.1.0:2") == []
    assert set(made._channels) == {"c", "d", "a"}  # nothing is kept of a channel without notices
