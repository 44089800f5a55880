"""The picture of a board: panels of a history, laid out side by side.

`compose()` turns panels, samples and faults into a scene, which a test can read; the canvas makes a PNG of it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeAlias

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from labkit.lab.board.canvas import Area, Floats, Line, Mark, Scene, Style, Text, shorten, text_width
from labkit.lab.board.panels import GREEN, GREY, NAMED, ORANGE, PURPLE, SKY, Panel, Plot
from labkit.lab.history import Fault, Sample

Points: TypeAlias = tuple[Floats, Floats]
"""Times and values."""

# Pale colours cannot be read as text on white.
_LETTERS = {SKY: "#2A86BD", ORANGE: "#A87000", PURPLE: "#A9527F", GREEN: "#00835F"}
_INK, _TICK, _GRID, _FLOOR, _QUIET = "#1F2328", "#5E6470", "#E7E8EC", "#C3C6CD", "#B5BAC4"
_SHADE, _SHADE_LETTERS, _INSTANT, _INSTANT_LETTERS = "#FAF0DA", "#8A5A00", "#D55E00", "#B84F00"

# In pixels of the picture.
WIDTH, HEIGHT, CAPTION = 1180, 340, 34
ABREAST = 4  # panels in a row; of more there are more rows
_TOP, _BOTTOM, _LEFT, _CELL_GAP, _EDGE = 66, 34, 42, 22, 6
_TICK_SIZE, _LABEL_SIZE, _TITLE_SIZE, _WORDS_SIZE = 12.0, 12.0, 16.0, 14.0
_LABEL_PITCH, _FAULT_PITCH, _FAULT_ROWS, _CAPTION_PITCH = 15.0, 16.0, 4, 20

_SILENT = 4.0
"""Seconds without a sample after which a line has a gap, and the figures are called old."""
_HIGHEST = 3
"""How many lines are named if there are too many to name all."""
_ROUND = [1, 2, 5, 10]
"""Steps of a scale."""
_COUNT_ROOM = 26.0
"""Room beside the text of a fault for a count: " ×88"."""


def compose(
    panels: Sequence[Panel],
    samples: Sequence[Sample],
    faults: Sequence[Fault],
    now: float,
    window: float = 60.0,
    caption: str = "",
) -> Scene:
    """The last `window` seconds before `now` (Unix seconds): panels in rows of up to `ABREAST`, and a caption below.

    Samples are in the order of time. Texts of faults are on the first panel only.
    """
    if window <= 0:
        raise ValueError(f"window must be above 0 seconds, not {window}")
    lines = _caption_lines(caption)
    floor = CAPTION + _CAPTION_PITCH * (len(lines) - 1) if lines else 0
    rows = math.ceil(len(panels) / ABREAST)
    abreast = math.ceil(len(panels) / rows)
    scene = Scene(WIDTH, rows * HEIGHT + floor)
    cell = (WIDTH - _EDGE - _CELL_GAP * (abreast - 1)) / abreast
    series = _series(samples, now - window)
    visible = [fault for fault in faults if fault.start <= now and (fault.end is None or fault.end >= now - window)]
    visible.sort(key=lambda fault: fault.start)
    for i, panel in enumerate(panels):
        row, column = divmod(i, abreast)
        left = column * (cell + _CELL_GAP)
        frame = _Frame(scene, now, window, left + _LEFT, left + cell, floor + (rows - 1 - row) * HEIGHT)
        _draw_panel(frame, panel, series, visible, writes_faults=i == 0)
    for number, line in enumerate(lines):
        y = floor - CAPTION / 2 - number * _CAPTION_PITCH
        scene.marks.append(Text(_LEFT, y, line, _WORDS_SIZE, _TICK, "caption"))
    return scene


def _caption_lines(caption: str) -> list[str]:
    """The caption, broken between its parts where a line is full; a part that is too long for a line is cut."""
    room = 0.95 * (WIDTH - 2 * _LEFT)  # in a small picture letters are wider in proportion
    lines: list[str] = []
    for part in caption.split(" · ") if caption else ():
        longer = f"{lines[-1]} · {part}" if lines else part
        if lines and text_width(longer, _WORDS_SIZE) <= room:
            lines[-1] = longer
        else:
            lines.append(shorten(part, _WORDS_SIZE, room))
    return lines


# -- One panel -------------------------------------------------------------------------------------------------------


@dataclass
class _Frame:
    """Where one panel stands, and how seconds and values become pixels."""

    scene: Scene
    now: float
    window: float
    left: float
    cell_right: float
    floor: float
    right: float = 0.0
    """Of the lines; their names stand between it and `cell_right`."""
    data_top: float = 0.0
    """Of the lines; texts of faults stand between it and `top`."""
    highest: float = 1.0

    def __post_init__(self) -> None:
        self.bottom, self.ceiling = self.floor + _BOTTOM, self.floor + HEIGHT
        self.top = self.data_top = self.ceiling - _TOP

    def add(self, *marks: Mark) -> None:
        self.scene.marks.extend(marks)

    def x(self, times: Floats | float) -> Any:
        ago = np.clip(self.now - np.asarray(times), 0, self.window)
        return self.right - ago / self.window * (self.right - self.left)

    def y(self, values: Floats | float) -> Any:
        return self.bottom + np.asarray(values) / self.highest * (self.data_top - self.bottom)


@dataclass(frozen=True)
class _Curve:
    """A line, or an area that stands on `low`."""

    name: str
    """Empty: this line has no name, because there are too many."""
    times: Floats
    values: Floats
    colour: str
    width: float = 2.2
    style: Style = "solid"
    low: Floats | None = None

    @property
    def end(self) -> float:
        """The height at which its name belongs."""
        return float(self.values[-1] if self.low is None else (self.low[-1] + self.values[-1]) / 2)


def _draw_panel(
    frame: _Frame,
    panel: Panel,
    series: Mapping[tuple[str, str], Points],
    faults: Sequence[Fault],
    writes_faults: bool,
) -> None:
    curves = [curve for plot in panel.plots for curve in _curves(plot, plot.among(series))]
    unnamed = sum(not curve.name for curve in curves)
    more = f"{unnamed} more" if unnamed else ""

    # The names at the line ends decide how much of the cell is left for the lines.
    widest = max(text_width(name, _LABEL_SIZE, True) for name in [more, *(curve.name for curve in curves)])
    # In steps, so that the plot does not move when names come and go.
    margin = min(max(32.0, 8.0 * math.ceil((widest + 12) / 8.0)), 0.34 * (frame.cell_right - frame.left))
    frame.right = frame.cell_right - margin

    _draw_faults(frame, faults, writes_faults)
    highest = max((float(curve.values.max()) for curve in curves), default=0.0)
    highest = max(highest, 5.0)  # one record of lag should not look like many
    frame.highest = highest * 1.04
    _furniture(frame, panel, highest)
    _words(frame, panel, series)
    # Areas first, then grey lines, and the named ones on top.
    for curve in sorted(curves, key=lambda curve: (curve.low is None, bool(curve.name))):
        _draw_curve(frame, curve)
    _label_ends(frame, curves, more)


def _draw_curve(frame: _Frame, curve: _Curve) -> None:
    """A line or an area, broken where nothing was measured."""
    gaps = np.flatnonzero(np.diff(curve.times) > _SILENT) + 1
    low = np.zeros_like(curve.times) if curve.low is None else curve.low
    stretches = zip(*(np.split(points, gaps) for points in (curve.times, low, curve.values)), strict=True)
    for times, low, high in stretches:
        if curve.low is None:
            frame.add(Line(frame.x(times), frame.y(high), curve.colour, curve.width, curve.style))
        else:
            frame.add(Area(frame.x(times), frame.y(low), frame.y(high), curve.colour, 0.85))


def _curves(plot: Plot, mine: Mapping[str, Points]) -> list[_Curve]:
    if not mine or plot.how == "word":
        return []
    colours = dict(zip(mine, cycle(plot.colours), strict=False))
    if plot.how == "gain":
        # With a new process a counter begins again at 0: only its rises count.
        rises = {label: np.maximum(np.diff(values, prepend=values[0]), 0) for label, (_, values) in mine.items()}
        counted = [label for label, (_, values) in mine.items() if values[-1] > 0]
        return [_Curve(plot.name(one), mine[one][0], np.cumsum(rises[one]), plot.colours[0]) for one in counted]
    if plot.how == "line":
        highest = sorted(mine, key=lambda label: -float(mine[label][1].max()))
        named = highest if len(mine) <= NAMED else highest[:_HIGHEST]
        return [
            _Curve(plot.name(label), *points, colours[label]) if label in named else _Curve("", *points, _QUIET, 1.0)
            for label, points in mine.items()
        ]
    times = np.unique(np.concatenate([times for times, _ in mine.values()]))
    gone = 0.0 if plot.how == "area" else None
    each = [np.interp(times, *points, left=0.0, right=gone) for points in mine.values()]
    tops = np.cumsum(each, axis=0)
    if plot.how == "goal":
        return [_Curve(plot.metric, times, tops[-1], plot.colours[0], 1.6, "dotted")]
    areas = zip(mine, each, tops, strict=True)
    return [
        _Curve(plot.name(label), times, top, colours[label], low=top - height)
        for label, height, top in areas
        if height.any()
    ]


def _words(frame: _Frame, panel: Panel, series: Mapping[tuple[str, str], Points]) -> None:
    """The figures of now, in the longest wording that fits."""
    wordings = panel.wordings({one: float(values[-1]) for one, (_, values) in series.items()})
    age = frame.now - max((times[-1] for times, _ in series.values()), default=frame.now)
    room, colour = frame.cell_right - frame.left, _INK
    if not series:
        wordings, colour = ["no figures yet"], GREY
    elif age > _SILENT:
        wordings, colour = [f"{age:.0f} s old: {wording}" for wording in wordings], GREY
    fitting = [wording for wording in wordings if text_width(wording, _WORDS_SIZE) <= room]
    text = fitting[0] if fitting else shorten(wordings[-1], _WORDS_SIZE, room)
    frame.add(Text(frame.left, frame.ceiling - 42, text, _WORDS_SIZE, colour, "words"))


def _furniture(frame: _Frame, panel: Panel, highest: float) -> None:
    """Title, unit, grid and scales."""
    frame.add(Text(frame.left, frame.ceiling - 20, panel.title, _TITLE_SIZE, _INK, "title", bold=True))
    frame.add(Text(frame.cell_right, frame.ceiling - 20, panel.unit, _TICK_SIZE, GREY, "unit", align="right"))
    for value in _ticks(highest):
        y = round(float(frame.y(value))) + 0.5
        if y <= frame.data_top + 1:
            frame.add(_rule(frame.left, y, frame.right, y, _FLOOR if value == 0 else _GRID, 1.0))
            frame.add(Text(frame.left - 7, y, _brief(value), _TICK_SIZE, _TICK, "tick", align="right"))
    for ago, text in _time_ticks(frame.window):
        x = float(frame.x(frame.now - ago))
        frame.add(Text(x, frame.bottom - 16, text, _TICK_SIZE, _TICK, "tick", align="center"))


def _ticks(highest: float) -> list[float]:
    """Whole, round numbers from 0 up to the highest value or beyond."""
    return [float(tick) for tick in MaxNLocator(5, steps=_ROUND, integer=True).tick_values(0, highest)]


def _brief(value: float) -> str:
    """A round number as a scale writes it: 400, 2,500, 20k, 1.5M."""
    return f"{value:,.0f}" if value < 10_000 else EngFormatter(sep="", usetex=False)(value)


def _time_ticks(window: float) -> list[tuple[float, str]]:
    """(seconds ago, text) of the time scale: "now", "20", "40", "60 s ago"."""
    size, unit = (60, "min") if window >= 120 else (1, "s")
    _, *agos = (ago for ago in MaxNLocator(3, steps=_ROUND).tick_values(0, window / size) if ago <= window / size)
    return [(0.0, "now"), *((ago * size, f"{ago:g} {unit} ago" if ago == agos[-1] else f"{ago:g}") for ago in agos)]


def _rule(x0: float, y0: float, x1: float, y1: float, colour: str, width: float, style: Style = "solid") -> Line:
    return Line(np.array((x0, x1)), np.array((y0, y1)), colour, width, style)


# -- Faults ----------------------------------------------------------------------------------------------------------


@dataclass
class _FaultText:
    text: str
    left: float
    row: int
    instant: bool
    times: int = 1

    @property
    def right(self) -> float:
        return self.left + text_width(self.text, _LABEL_SIZE) + _COUNT_ROOM


def _draw_faults(frame: _Frame, faults: Sequence[Fault], writes: bool) -> None:
    """Shade the windows, rule the instants; on the panel that writes them, texts in rows above the lines.

    Their rows are taken from the top of the plot (`data_top`), so that no text lies on a line. A text without room is
    left out; if it equals the text that is in its way, it is counted there.
    """
    for fault in sorted(faults, key=lambda fault: fault.instant):
        x = float(frame.x(fault.start))
        if fault.instant:
            frame.add(_rule(x, frame.bottom, x, frame.top, _INSTANT, 1.6, "dashed"))
        else:
            end = max(float(frame.x(frame.now if fault.end is None else fault.end)), x + 2)  # a short one shows, too
            frame.add(Area(np.array((x, end)), np.full(2, frame.bottom), np.full(2, frame.top), _SHADE))
    placed: list[_FaultText] = []
    for fault in faults if writes else ():
        standing = " …" if fault.end is None else ""
        text = shorten(fault.text, _LABEL_SIZE, frame.cell_right - frame.left - _COUNT_ROOM) + standing
        x, width = float(frame.x(fault.start)), text_width(text, _LABEL_SIZE) + _COUNT_ROOM
        left = x + 5 if x + 5 + width <= frame.cell_right else max(x - 5 - width, frame.left)
        same = next((one for one in placed if one.text == text and one.right > left), None)
        row = next(
            (row for row in range(_FAULT_ROWS) if all(one.right < left for one in placed if one.row == row)), None
        )
        if same is not None:
            same.times += 1
        elif row is not None:
            placed.append(_FaultText(text, left, row, fault.instant))
    if placed:
        frame.data_top = frame.top - (1 + max(one.row for one in placed)) * _FAULT_PITCH - 4
    for one in placed:
        y = frame.top - (one.row + 0.5) * _FAULT_PITCH
        written = f"{one.text} ×{one.times}" if one.times > 1 else one.text
        # No dashed line goes through it.
        span = np.array((one.left, one.left + text_width(written, _LABEL_SIZE)))
        frame.add(Area(span, np.full(2, y - 8), np.full(2, y + 8), "#FFFFFF" if one.instant else _SHADE))
        colour = _INSTANT_LETTERS if one.instant else _SHADE_LETTERS
        frame.add(Text(one.left, y, written, _LABEL_SIZE, colour, "fault"))


# -- Names at the ends of lines --------------------------------------------------------------------------------------


def _label_ends(frame: _Frame, curves: Sequence[_Curve], more: str) -> None:
    """The names of lines, as near to their ends as possible; above them, how many lines have no name."""
    ends = sorted((float(frame.y(curve.end)), curve.name, curve.colour) for curve in curves if curve.name)
    if more:
        ends.append((ends[-1][0] + _LABEL_PITCH, more, GREY))
    where = spread([end for end, _, _ in ends], _LABEL_PITCH, frame.bottom + 1, frame.data_top - 4)
    for (end, name, colour), y in zip(ends, where, strict=True):
        if abs(y - end) > 5:
            frame.add(_rule(frame.right + 1, end, frame.right + 6, y, colour, 0.8))
        text = shorten(name, _LABEL_SIZE, frame.cell_right - frame.right - 9, bold=True)
        frame.add(Text(frame.right + 8, y, text, _LABEL_SIZE, _LETTERS.get(colour, colour), "label", bold=True))


def spread(wanted: Sequence[float], pitch: float, low: float, high: float) -> list[float]:
    """Positions at least `pitch` apart, in the given (rising) order, near to the wanted ones.

    They stay within low…high where there is room for all of them; else they begin at `low`.
    """
    if not wanted:
        return []
    steps = pitch * np.arange(len(wanted))
    # The mean of two solutions: pushed up by those below, and pushed down by those above.
    loose = np.array(wanted) - steps
    pushed_up, pushed_down = np.maximum.accumulate(loose), np.minimum.accumulate(loose[::-1])[::-1]
    middle = (pushed_up + pushed_down) / 2 + steps
    where: list[float] = np.maximum(np.minimum(middle, high - steps[::-1]), low + steps).tolist()
    return where


# -- Series ----------------------------------------------------------------------------------------------------------


def _series(samples: Sequence[Sample], start: float) -> dict[tuple[str, str], Points]:
    """Times and values of each series in the picture; a line that crosses the left edge begins there."""
    first = bisect_left(samples, start - _SILENT, key=lambda sample: sample.time)
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for sample in samples[first:]:
        times, values = found.setdefault((sample.metric, sample.label), ([], []))
        times.append(sample.time)
        values.append(sample.value)
    return {
        one: _cut(np.array(times), np.array(values, float), start)
        for one, (times, values) in found.items()
        if times[-1] >= start
    }


def _cut(times: Floats, values: Floats, start: float) -> Points:
    outside = int(np.searchsorted(times, start))
    inside = times[outside:]
    if outside and inside[0] - times[outside - 1] <= _SILENT:  # the edge is in no gap
        inside = np.concatenate(([start], inside))
    return inside, np.interp(inside, times, values)
