"""The picture: what is written on it, where, and how long it takes."""

from __future__ import annotations

import io
import itertools
import math

import pytest
from PIL import Image

from labkit.kafka.errors import LabkitError
from labkit.lab.board import canvas, picture
from labkit.lab.board.panels import (
    Panel,
    blocked_panel,
    completed_panel,
    lag_panel,
    panel,
    retries_panel,
    set_aside_panel,
)
from labkit.lab.history import Fault, Sample

T = 1_800_000_000.0
PANELS = [
    lag_panel(["orders"]),
    retries_panel(["shop"], ["orders"]),
    completed_panel("charged", ["orders"]),
]


def draw(panels: list[Panel], samples: list[Sample], faults: list[Fault], now: float, window: float = 60) -> bytes:
    return canvas.render(picture.compose(panels, samples, faults, now, window))


def texts(scene: canvas.Scene, *roles: str) -> list[canvas.Text]:
    """The texts, of the given roles or all."""
    found = [mark for mark in scene.marks if isinstance(mark, canvas.Text)]
    return [text for text in found if not roles or text.role in roles]


def box(text: canvas.Text) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of what is drawn; y is the middle of the letters' height."""
    width = canvas.text_width(text.text, text.size, text.bold)
    left = text.x - {"left": 0.0, "center": width / 2, "right": width}[text.align]
    return left, text.y - text.size / 2, left + width, text.y + text.size / 2


def run(partitions: int = 2, seconds: float = 60, high: float = 400, until: float = 0) -> list[Sample]:
    """A run in which lag rises and falls; `until` seconds before T it ends."""
    samples = []
    for tick in range(int(seconds * 4) + 1):
        t = T - until - seconds + tick / 4
        for p in range(partitions):
            samples.append(Sample(t, "lag", f"orders/{p}", round(high * abs(math.sin(tick / 60 + p)))))
            samples.append(Sample(t, "blocked", f"orders/{p}", 0))
        samples += [
            Sample(t, "waiting", "shop", 20 if 80 < tick < 160 else 0),
            Sample(t, "redelivered", "orders", 100 if tick < 120 else 137),
            Sample(t, "failed", "shop", 0),
            Sample(t, "completed", "charged", tick * 10),
            Sample(t, "sent", "orders", 3000),
        ]
    return samples


def crash(ago: float, pod: int = 1) -> Fault:
    return Fault(T - ago, T - ago, "kill", f"shop-{pod}", f"kill pod {pod}")


def window(ago: float, end: float | None, text: str) -> Fault:
    return Fault(T - ago, None if end is None else T - end, "fail", "provider", text)


MANY = [crash(50 - 3 * i, i % 4) for i in range(9)] + [
    window(42, 22, "provider down 20 s"),
    window(20, None, "freeze pod 2"),
    window(12, 11, "slow down pod 0"),
    crash(1, 3),
]
RUNS = {
    "nothing": ([], []),
    "faults only": ([], MANY),
    "one partition": (run(1), [crash(30)]),
    "two partitions": (run(2), [window(42, 22, "provider down 20 s"), crash(30)]),
    "a long text": (run(2), [window(30, 22, "the provider of payments is down 20 s")]),
    "sixteen partitions": (run(16), MANY),
    "all zero": (run(4, high=0), [window(20, None, "freeze pod 1")]),
    "large": (run(6, high=250_000), MANY),
    "one sample each": (run(2, seconds=0), []),
    "old": (run(2, until=20), [crash(5)]),
    "before the picture": (run(2, until=300), [crash(400)]),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_makes_a_png_of_the_same_size(name: str) -> None:
    image = Image.open(io.BytesIO(draw(PANELS, *RUNS[name], T)))
    assert (image.format, image.size) == ("PNG", (picture.WIDTH, picture.HEIGHT))


@pytest.mark.parametrize("abreast", [3, 4])
@pytest.mark.parametrize("name", RUNS)
def test_no_text_lies_on_another_or_outside(name: str, abreast: int) -> None:
    scene = picture.compose([*PANELS, PANELS[0]][:abreast], *RUNS[name], T)
    for text in texts(scene):
        left, bottom, right, top = box(text)
        assert left >= 0, text
        assert bottom >= 0, text
        assert right <= scene.width, text
        assert top <= scene.height, text
    for a, b in itertools.combinations(texts(scene), 2):
        (a_left, a_low, a_right, a_high), (b_left, b_low, b_right, b_high) = box(a), box(b)
        apart = a_right <= b_left or b_right <= a_left or a_high <= b_low or b_high <= a_low
        assert apart, f"{a.text!r} lies on {b.text!r}"


@pytest.mark.parametrize("name", RUNS)
def test_no_line_goes_through_the_text_of_a_fault(name: str) -> None:
    marks = picture.compose(PANELS, *RUNS[name], T).marks
    for number, text in enumerate(marks):
        if isinstance(text, canvas.Text) and text.role == "fault":
            ground = marks[number - 1]
            assert isinstance(ground, canvas.Area)
            left, bottom, right, top = box(text)
            assert (ground.xs[0], ground.low[0]) <= (left, bottom)
            assert (ground.xs[1], ground.high[0]) >= (right, top)
            for line in (mark for mark in marks[number:] if isinstance(mark, canvas.Line)):
                beside = line.xs.max() < left or line.xs.min() > right
                assert beside or line.ys.max() < bottom or line.ys.min() > top, text.text


def test_windows_of_faults_are_shaded_and_instants_ruled_on_every_panel() -> None:
    scene = picture.compose(PANELS, run(), [window(40, 25, "provider down"), window(10, None, "freeze"), crash(50)], T)
    areas = [
        m
        for m in scene.marks
        if isinstance(m, canvas.Area) and m.high[0] - m.low[0] > 20 and m.colour == picture._SHADE
    ]
    stems = [m for m in scene.marks if isinstance(m, canvas.Line) and m.style == "dashed"]
    oldest, newest = ([t.x for t in texts(scene, "tick") if t.text == text] for text in ("60 s ago", "now"))
    assert len(areas) == 6
    assert len(stems) == 3
    for number, (left, right) in enumerate(zip(oldest, newest, strict=True)):
        (over, standing), stem = areas[2 * number : 2 * number + 2], stems[number]
        ends = [60 - (x - left) / (right - left) * 60 for x in (*over.xs, *standing.xs, *stem.xs)]
        assert ends == pytest.approx([40, 25, 10, 0, 50, 50], abs=1e-6), "seconds ago"
        for area in (over, standing):
            assert set(area.low) == {min(stem.ys)}  # the floor of the plot
            assert set(area.high) == {max(stem.ys)}  # its top


def test_lines_stay_below_the_texts_of_faults() -> None:
    scene = picture.compose(PANELS[:1], *RUNS["large"], T)
    lowest = min(box(text)[1] for text in texts(scene, "fault"))
    lines = curves(scene)
    assert lines
    assert max(float(line.ys.max()) for line in lines) <= lowest


def curves(scene: canvas.Scene) -> list[canvas.Line]:
    """The lines that are neither grid nor fault."""
    return [m for m in scene.marks if isinstance(m, canvas.Line) and len(m.xs) > 2]


def words(scene: canvas.Scene) -> list[str]:
    return [text.text for text in texts(scene, "words")]


def labels(scene: canvas.Scene) -> set[str]:
    return {text.text for text in texts(scene, "label")}


def test_the_figures_of_now_are_in_words() -> None:
    samples = run(2)
    scene = picture.compose(PANELS, samples, [], T)
    lag = {s.label: s.value for s in samples if s.metric == "lag"}
    assert words(scene) == [
        f"p0 {lag['orders/0']:.0f} · p1 {lag['orders/1']:.0f} · nothing blocked",
        "0 waiting · 137 redelivered · 0 failed in all",
        "2,400 of 3,000",
    ]
    assert [text.text for text in texts(scene, "title")] == ["Lag", "Retries", "Completed"]
    assert [text.text for text in texts(scene, "unit")] == ["records behind", "records", "records"]
    ticks = [text.text for text in texts(scene, "tick")]
    assert ticks.count("60 s ago") == ticks.count("now") == 3


def test_who_is_blocked_is_said() -> None:
    samples = [*run(2), Sample(T, "blocked", "orders/1", 1)]
    assert words(picture.compose(PANELS[:1], samples, [], T))[0].endswith("· p1 blocked")


def test_lines_are_named_at_their_ends() -> None:
    assert labels(picture.compose(PANELS, *RUNS["two partitions"], T)) == {
        "p0", "p1", "waiting", "redelivered", "completed", "sent"
    }  # fmt: skip


def test_of_many_partitions_the_highest_three_are_named() -> None:
    scene = picture.compose(PANELS, run(16), [], T)
    named = labels(scene)
    assert "13 more" in named
    assert len([name for name in named if name[0] == "p"]) == 3
    assert "highest" in words(scene)[0]


def test_no_figures_and_old_figures_are_called_so() -> None:
    assert words(picture.compose(PANELS, [], [], T)) == ["no figures yet"] * 3
    assert all(w.startswith("20 s old: ") for w in words(picture.compose(PANELS, run(until=20), [], T)))


def test_nothing_is_drawn_where_nothing_was_measured() -> None:
    samples = [s for s in run(1) if not T - 40 < s.time < T - 20]
    scene = picture.compose(PANELS[:1], samples, [], T)
    before, after = curves(scene)
    now, ago = (next(text.x for text in texts(scene, "tick") if text.text == what) for what in ("now", "60 s ago"))
    assert [(now - x) / (now - ago) * 60 for x in (before.xs[-1], after.xs[0])] == pytest.approx([40, 20])


def test_a_counter_shows_what_came_on_top_not_its_total() -> None:
    scene = picture.compose(PANELS[1:2], run(), [], T)
    ticks = [text.text for text in texts(scene, "tick")]
    assert "30" in ticks
    assert "100" not in ticks


def test_a_counter_that_begins_again_never_falls() -> None:
    samples = [Sample(T - 20 + i, "redelivered", "orders", 50 + i if i < 10 else i - 10) for i in range(21)]
    scene = picture.compose(PANELS[1:2], samples, [], T)
    (line,) = curves(scene)
    assert (line.ys[1:] >= line.ys[:-1]).all()


def test_scales_begin_at_0_and_have_whole_round_steps() -> None:
    for highest in (5, 7, 42, 388, 2_914, 99_999, 250_000, 1_234_567):
        ticks = picture._ticks(highest)
        assert ticks[0] == 0
        assert len(ticks) <= 7
        assert all(tick == int(tick) for tick in ticks)
        assert ticks[-1] >= highest
    assert [picture._brief(v) for v in (0, 400, 2_500, 20_000, 150_000, 1_500_000)] == [
        "0", "400", "2,500", "20k", "150k", "1.5M"
    ]  # fmt: skip


def test_the_time_scale_fits_the_window() -> None:
    assert picture._time_ticks(60) == [(0, "now"), (20, "20"), (40, "40"), (60, "60 s ago")]
    assert [text for _, text in picture._time_ticks(600)] == ["now", "5", "10 min ago"]
    assert [text for _, text in picture._time_ticks(10)] == ["now", "5", "10 s ago"]


@pytest.mark.parametrize("wanted", [[], [5], [0, 0, 0, 0], [0, 1, 50, 99, 100], [100] * 4, [0, 8, 16, 30, 31]])
def test_labels_are_spread_in_order_and_near(wanted: list[float]) -> None:
    where = picture.spread(wanted, 10, 0, 100)
    assert all(b - a >= 10 - 1e-6 for a, b in itertools.pairwise(where))
    assert all(-1e-6 <= y <= 100 + 1e-6 for y in where)
    assert len(where) == len(wanted)


def test_areas_lie_on_each_other() -> None:
    tiers = ["after 1 s", "after 10 s"]
    samples = [Sample(T - 20 + i, "waiting", tier, 10) for i in range(21) for tier in tiers]
    scene = picture.compose([retries_panel(tiers, [])], samples, [], T)
    low, high = (mark for mark in scene.marks if isinstance(mark, canvas.Area))
    assert (low.high == high.low).all()
    assert (high.high > high.low).all()
    assert labels(scene) == set(tiers)
    assert words(scene) == ["20 waiting"]


def test_partitions_of_several_topics_are_told_apart() -> None:
    samples = [Sample(T - 1 + i, "lag", f"{label}", 9) for i in range(2) for label in ("a/10", "a/9", "b/0", "c/0")]
    scene = picture.compose([lag_panel(["a", "b"])], samples, [], T)
    assert words(scene) == ["a p9: 9 · a p10: 9 · b p0: 9"]


def test_texts_are_drawn_as_they_are() -> None:
    fault = window(30, 20, r"charge $5 \alpha^2 <b> {x}")
    assert draw(PANELS, run(), [fault], T)
    assert texts(picture.compose(PANELS[:1], run(), [fault], T), "fault")[0].text == fault.text


def test_a_style_of_the_learner_changes_nothing() -> None:
    import matplotlib

    before = draw(PANELS, run(), MANY, T)
    style = {"text.color": "red", "font.family": "serif", "lines.marker": "o", "figure.facecolor": "black"}
    with matplotlib.rc_context({**style, "lines.linestyle": ":", "figure.constrained_layout.use": True}):
        assert draw(PANELS, run(), MANY, T) == before


def test_drawing_is_pure() -> None:
    assert draw(PANELS, *RUNS["large"], T) == draw(PANELS, *RUNS["large"], T)


@pytest.mark.parametrize("name", RUNS)
def test_a_static_picture_is_small(name: str) -> None:
    caption = "shop: 2 of 2 pods running · Kafka up"
    png = canvas.render_small(picture.compose(PANELS, *RUNS[name], T, caption=caption))
    assert len(png) <= 30_000
    assert Image.open(io.BytesIO(png)).format == "PNG"


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        draw(PANELS, [], [], T, window=0)


def test_more_panels_than_fit_abreast_are_in_rows() -> None:
    scene = picture.compose([PANELS[0]] * 7, *RUNS["two partitions"], T)
    titles = texts(scene, "title")
    assert scene.height == 2 * picture.HEIGHT
    assert [len([one for one in titles if one.y == y]) for y in sorted({one.y for one in titles}, reverse=True)] == [
        4,
        3,
    ]


def test_a_long_caption_goes_on_in_the_next_line() -> None:
    caption = " · ".join(
        f"{name}: 2 of 2 pods running (pod 0 restarted once)" for name in ("writer", "reader", "table")
    )
    scene = picture.compose(PANELS, *RUNS["two partitions"], T, caption=caption)
    lines = texts(scene, "caption")
    assert " · ".join(line.text for line in lines) == caption
    assert len(lines) > 1
    small = 0.75  # the scale at which letters are widest
    for line in lines:
        assert line.x + canvas.text_width(line.text, line.size * small) / small <= picture.WIDTH, line.text
    long = texts(picture.compose(PANELS, *RUNS["two partitions"], T, caption="restarted " * 40), "caption")
    assert [line.text[-1] for line in long] == ["…"]
    assert long[0].x + canvas.text_width(long[0].text, long[0].size * small) / small <= picture.WIDTH
    bottom = min(box(line)[1] for line in lines)
    ticks = min(box(text)[1] for text in texts(scene, "tick"))
    assert 0 <= bottom < max(box(line)[3] for line in lines) <= ticks


def told(shown: Panel, values: dict[tuple[str, str], float]) -> str:
    return words(picture.compose([shown], [Sample(T, *series, value) for series, value in values.items()], [], T))[0]


def test_a_panel_of_one_metric_names_its_owners_and_their_figures() -> None:
    waits = panel("Clients wait", "p99 ms", unit="ms", of=["few", "many"])
    samples = [Sample(T - 1 + tick / 4, "p99 ms", label, 3.25) for tick in range(5) for label in ("few", "other")]
    assert labels(picture.compose([waits], samples, [], T)) == {"few"}
    every = panel("Clients wait", "p99 ms", unit="ms")
    assert labels(picture.compose([every], samples, [], T)) == {"few", "other"}
    assert told(waits, {("p99 ms", "few"): 3.25, ("p99 ms", "many"): 1234.5}) == "few 3.2 · many 1,234"
    assert told(panel("Lag", "behind", of="shop"), {("behind", "shop"): 7}) == "behind 7"
    assert told(waits, {("p50 ms", "few"): 3.25}) == "nothing yet"


def test_a_panel_of_functions_says_their_figures() -> None:
    charged = panel("Charged", lambda: 12, unit="renewals")
    assert {series: read() for series, read in charged.readers.items()} == {("charged", "charged"): 12}
    assert told(charged, {("charged", "charged"): 1200}) == "1,200 renewals"
    rates = panel("Rates", {"sites/s": lambda: 1, "apps": lambda: 2.5})
    assert {series: read() for series, read in rates.readers.items()} == {
        ("rates", "sites/s"): 1,
        ("rates", "apps"): 2.5,
    }
    assert told(rates, {("rates", "sites/s"): 1, ("rates", "apps"): 2.5}) == "apps 2.5 · sites/s 1"


def test_what_is_no_panel_is_refused_by_its_title() -> None:
    for what, of in ((7, ()), ({}, ()), ({"a": 1}, ()), (None, ()), (lambda: 1, "shop")):
        with pytest.raises(LabkitError, match="panel 'Charged' shows a function"):
            panel("Charged", what, of=of)  # type: ignore[arg-type]


def test_words_lose_their_last_figures_where_there_is_no_room() -> None:
    values = {("late", f"a client with a long name {number}"): number for number in range(40)}
    shown = told(panel("Late", "late"), values)
    assert shown.startswith("a client with a long name 0: 0 · a client with a long name 1: 1 · ")
    assert all(
        part in "".join(f"{label}: {value}" for (_, label), value in values.items()) for part in shown.split(" · ")
    )


def test_what_retries_wait_for_is_in_words() -> None:
    aside = set_aside_panel("shop", {"in 1 s": lambda: 3, "in 9 s": lambda: 0}, lambda: 5)
    assert (
        told(aside, {series: read() or 0 for series, read in aside.readers.items()}) == "in 1 s: 3 · in 9 s: 0 · 5 dead"
    )
    blocked = blocked_panel("shop", lambda: 2, lambda: 3.5)
    assert (
        told(blocked, {series: read() or 0 for series, read in blocked.readers.items()}) == "2 blocked · longest 3.5 s"
    )
