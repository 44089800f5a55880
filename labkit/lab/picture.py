"""The picture of a board: panels of a history, laid out side by side.

`compose()` turns panels, samples and faults into a scene, which a test can read; the canvas makes a PNG of it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from labkit.lab.canvas import (
    SMALLEST,
    Area,
    Floats,
    Line,
    Mark,
    Scene,
    Style,
    Text,
    shorten,
    text_width,
)
from labkit.lab.metrics import Fault, Sample
from labkit.lab.panels import GREEN, GREY, NAMED, ORANGE, PURPLE, SKY, Panel, Plot

Points: TypeAlias = tuple[Floats, Floats]
"""Times and values."""
Series: TypeAlias = Mapping[tuple[str, str], Points]
"""By metric and label."""

# The pale ones are too pale for letters on white.
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
"""Seconds without a sample after which a line is broken, and the figures of now are called old."""
_HIGHEST = 3
"""Lines that are named where there are too many to name them all."""


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
    if not panels:
        raise ValueError("a picture needs at least one panel")
    if window <= 0:
        raise ValueError(f"window must be above 0 seconds, not {window}")
    lines = _caption_lines(caption, WIDTH - 2 * _LEFT) if caption else []
    floor = CAPTION + _CAPTION_PITCH * (len(lines) - 1) if lines else 0
    rows = math.ceil(len(panels) / ABREAST)
    abreast = math.ceil(len(panels) / rows)
    scene = Scene(WIDTH, rows * HEIGHT + floor)
    cell = (WIDTH - _EDGE - _CELL_GAP * (abreast - 1)) / abreast
    series = _series(samples, now - window)
    newest = max((times[-1] for times, _ in series.values()), default=None)
    for i, panel in enumerate(panels):
        row, column = divmod(i, abreast)
        left = column * (cell + _CELL_GAP)
        frame = _Frame(scene, now, window, left + _LEFT, left + cell, floor + (rows - 1 - row) * HEIGHT)
        _draw_panel(frame, panel, series, faults, newest, writes_faults=i == 0)
    for number, line in enumerate(lines):
        y = floor - CAPTION / 2 - number * _CAPTION_PITCH
        scene.marks.append(Text(_LEFT, y, line, _WORDS_SIZE, _TICK, "caption"))
    return scene


def _caption_lines(caption: str, room: float) -> list[str]:
    """The caption, broken between its parts where a line is full at the scale at which letters are widest; a part that
    is too long for a line is cut."""
    lines: list[str] = []
    for part in caption.split(" · "):
        part = shorten(part, _WORDS_SIZE, 0.9 * room)
        longer = f"{lines[-1]} · {part}" if lines else part
        if lines and text_width(longer, _WORDS_SIZE, False, SMALLEST) <= room * SMALLEST:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


# -- One panel -------------------------------------------------------------------------------------------------------


@dataclass
class _Frame:
    """Where one panel stands, and its way from seconds and values to pixels."""

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
    stems: Sequence[float] = ()
    """Where dashed lines stand."""

    def __post_init__(self) -> None:
        self.bottom, self.ceiling = self.floor + _BOTTOM, self.floor + HEIGHT
        self.top = self.data_top = self.ceiling - _TOP
        self.start = self.now - self.window

    def add(self, *marks: Mark) -> None:
        self.scene.marks.extend(marks)

    def x(self, times: Floats | float) -> Any:
        return self.left + (np.asarray(times) - self.start) / self.window * (self.right - self.left)

    def y(self, values: Floats | float) -> Any:
        return self.bottom + np.asarray(values) / self.highest * (self.data_top - self.bottom)

    def one_x(self, time: float) -> float:
        return float(self.x(min(max(time, self.start), self.now)))

    def one_y(self, value: float) -> float:
        return float(self.y(value))


@dataclass(frozen=True)
class _Curve:
    name: str
    """Empty: one of those that are too many to be named."""
    times: Floats
    values: Floats
    colour: str
    width: float
    style: Style = "solid"


@dataclass(frozen=True)
class _Layer:
    name: str
    times: Floats
    low: Floats
    high: Floats
    colour: str


def _draw_panel(
    frame: _Frame, panel: Panel, series: Series, faults: Sequence[Fault], newest: float | None, writes_faults: bool
) -> None:
    curves = [curve for plot in panel.plots for curve in _curves(plot, plot.among(series), frame.start)]
    layers = [layer for plot in panel.plots for layer in _layers(plot, plot.among(series), frame.start)]

    # The names at the line ends decide how much of the cell is left for the lines.
    names = [curve.name for curve in curves] + [layer.name for layer in layers] + _unnamed(curves)
    widest = max((text_width(name, _LABEL_SIZE, True) for name in names), default=0.0)
    # In steps, so that the plot keeps its place while names come and go.
    margin = min(max(32.0, 8.0 * math.ceil((widest + 12) / 8.0)), 0.34 * (frame.cell_right - frame.left))
    frame.right = frame.cell_right - margin

    marks = _fault_marks(frame, faults, writes_faults)
    heights = [curve.values for curve in curves] + [layer.high for layer in layers]
    highest = float(np.nanmax(np.concatenate([np.zeros(1), *heights])))
    frame.highest = max(highest * 1.04, 5.0)

    _furniture(frame, panel, _ticks(highest))
    now = {one: float(values[-1]) for one, (_, values) in series.items()}
    _words(frame, panel.wordings(now), newest)
    for layer in layers:
        for part in _unbroken(layer.times):
            xs, low, high = frame.x(layer.times[part]), frame.y(layer.low[part]), frame.y(layer.high[part])
            frame.add(Area(xs, low, high, layer.colour, 0.85))
    # Named lines last: they lie on the grey ones.
    for curve in sorted(curves, key=lambda c: bool(c.name)):
        frame.add(Line(frame.x(curve.times), frame.y(curve.values), curve.colour, curve.width, curve.style))
    frame.add(*marks)
    _label_ends(frame, curves, layers)


def _curves(plot: Plot, mine: Mapping[str, Points], start: float) -> list[_Curve]:
    curves: list[_Curve] = []
    if plot.how == "goal" and mine:
        times = _times(mine)
        total = np.sum([np.interp(times, *points, left=0.0) for points in mine.values()], axis=0)
        curves.append(_Curve(plot.metric, *_broken(times, total, start), plot.colours[0], 1.6, "dotted"))
    if plot.how == "line":
        by_height = sorted(mine, key=lambda label: -float(np.max(mine[label][1])))
        named = by_height if len(mine) <= NAMED else by_height[:_HIGHEST]
        for i, (label, points) in enumerate(mine.items()):
            line = _broken(*points, start)
            if label in named:
                curves.append(_Curve(plot.name(label), *line, plot.colours[i % len(plot.colours)], 2.2))
            else:
                curves.append(_Curve("", *line, _QUIET, 1.0))
    if plot.how == "gain":
        for label, (times, values) in mine.items():
            # Counters begin again at 0 with a new process: only rises are news.
            gained = np.concatenate(([0.0], np.cumsum(np.maximum(np.diff(values), 0.0))))
            gained -= gained[max(int(np.searchsorted(times, start)) - 1, 0)]
            if values[-1] > 0:
                curves.append(_Curve(plot.name(label), *_broken(times, gained, start), plot.colours[0], 2.0))
    return curves


def _layers(plot: Plot, mine: Mapping[str, Points], start: float) -> list[_Layer]:
    mine = {label: points for label, points in mine.items() if points[1].any()}
    if plot.how != "area" or not mine:
        return []
    times = _inside(_times(mine), start)
    low = np.zeros_like(times)
    layers = []
    for i, (label, points) in enumerate(mine.items()):
        high = low + np.interp(times, *points, left=0.0, right=0.0)
        layers.append(_Layer(plot.name(label), times, low, high, plot.colours[i % len(plot.colours)]))
        low = high
    return layers if len(times) else []


def _words(frame: _Frame, wordings: Sequence[str], newest: float | None) -> None:
    room, colour = frame.cell_right - frame.left, _INK
    if newest is None:
        wordings, colour = ["no figures yet"], GREY
    elif frame.now - newest > _SILENT:
        wordings, colour = [f"{frame.now - newest:.0f} s old: {wording}" for wording in wordings], GREY
    fitting = [wording for wording in wordings if text_width(wording, _WORDS_SIZE, False) <= room]
    text = fitting[0] if fitting else shorten(wordings[-1], _WORDS_SIZE, room)
    frame.add(Text(frame.left, frame.ceiling - 42, text, _WORDS_SIZE, colour, "words"))


def _furniture(frame: _Frame, panel: Panel, ticks: Sequence[float]) -> None:
    """What stays from frame to frame: title, unit, grid and scales."""
    frame.add(Text(frame.left, frame.ceiling - 20, panel.title, _TITLE_SIZE, _INK, "title", bold=True))
    frame.add(Text(frame.cell_right, frame.ceiling - 20, panel.unit, _TICK_SIZE, GREY, "unit", align="right"))
    for value in ticks:
        y = round(frame.one_y(value)) + 0.5
        if y > frame.top + 1:
            break
        frame.add(_rule(frame.left, y, frame.right, y, _FLOOR if value == 0 else _GRID, 1.0))
        frame.add(Text(frame.left - 7, y, _brief(value), _TICK_SIZE, _TICK, "tick", align="right"))
    for ago, text in _time_ticks(frame.window):
        x = frame.right - ago / frame.window * (frame.right - frame.left)
        frame.add(Text(x, frame.bottom - 16, text, _TICK_SIZE, _TICK, "tick", align="center"))


def _time_ticks(window: float) -> list[tuple[float, str]]:
    """(seconds ago, text) of the time scale: "60 s ago", "40", "20", "now"."""
    steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)
    step = next((s for s in steps if window / s <= 3.5), 86400)
    size, unit = (60, "min") if step >= 60 else (1, "s")
    agos = [step * i for i in range(int(window / step + 1e-9), 0, -1)]
    texts = [f"{ago / size:g}" for ago in agos]
    if texts:
        texts[0] += f" {unit} ago"
    return [*zip([float(a) for a in agos], texts, strict=True), (0.0, "now")]


def _ticks(highest: float) -> list[float]:
    """Whole, round numbers from 0 up to the highest value or beyond, six at most."""
    highest = max(highest, 5.0)  # one record behind is no mountain
    magnitude = 10 ** math.floor(math.log10(max(highest / 5, 1.0)))
    step = next(m * magnitude for m in (1, 2, 5, 10) if highest / (m * magnitude) <= 5)
    return [float(step * i) for i in range(int(highest / step) + 2)]


def _brief(value: float) -> str:
    """A round number as a scale writes it: 400, 20k, 1.5M."""
    for size, least, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if value >= least:
            return f"{value / size:g}{suffix}"
    return f"{value:,.0f}"


def _rule(x0: float, y0: float, x1: float, y1: float, colour: str, width: float, style: Style = "solid") -> Line:
    """A straight line."""
    return Line(np.array((x0, x1)), np.array((y0, y1)), colour, width, style)


# -- Faults ----------------------------------------------------------------------------------------------------------


def _fault_marks(frame: _Frame, faults: Sequence[Fault], writes: bool) -> list[Mark]:
    """Shade the windows, rule the instants; on the panel that writes them, texts in rows above the lines.

    Their rows are taken from the top of the plot (`data_top`), so that a text lies on no line. A dashed line ends
    at its own text: it crosses none.
    """
    seen = [f for f in faults if f.start <= frame.now and (f.end is None or f.end >= frame.start)]
    seen.sort(key=lambda f: f.start)
    for fault in seen:
        if not fault.instant:
            x0, x1 = frame.one_x(fault.start), frame.one_x(frame.now if fault.end is None else fault.end)
            xs = np.array((x0, max(x1, x0 + 2)))  # a short window is still to be seen
            frame.add(Area(xs, np.full(2, frame.bottom), np.full(2, frame.top), _SHADE))
    frame.stems = [frame.one_x(fault.start) for fault in seen if fault.instant]

    def stem(x: float, top: float) -> Line:
        return _rule(x, frame.bottom, x, top, _INSTANT, 1.6, "dashed")

    if not writes:
        return [stem(x, frame.top) for x in frame.stems]
    placed: list[_FaultLabel] = []
    bare = [frame.one_x(fault.start) for fault in seen if not _place(frame, fault, placed) and fault.instant]
    rows = 1 + max((label.row for label in placed), default=-1)
    frame.data_top = frame.top - (rows * _FAULT_PITCH + 4 if rows else 0)
    marks: list[Mark] = [stem(x, frame.data_top) for x in bare]
    for label in placed:
        y = frame.top - (label.row + 0.5) * _FAULT_PITCH
        if label.instant:
            marks.append(stem(label.x, y + 6))
        colour = _INSTANT_LETTERS if label.instant else _SHADE_LETTERS
        if label.before:
            marks.append(Text(label.x - 5, y, label.written, _LABEL_SIZE, colour, "fault", align="right"))
        else:
            marks.append(Text(label.x + 5, y, label.written, _LABEL_SIZE, colour, "fault"))
    return marks


@dataclass
class _FaultLabel:
    text: str
    x: float
    instant: bool
    standing: bool
    before: bool
    """Whether the text stands to the left of its line."""
    row: int = 0
    times: int = 1

    @property
    def written(self) -> str:
        text = f"{self.text} ×{self.times}" if self.times > 1 else self.text
        return f"{text} …" if self.standing else text

    @property
    def box(self) -> tuple[float, float]:
        """Left and right, with room for a count that may come."""
        width = text_width(f"{self.text} ×88", _LABEL_SIZE, False)
        return (self.x - 5 - width, self.x - 5) if self.before else (self.x + 5, self.x + 5 + width)

    def clashes(self, other: _FaultLabel) -> bool:
        """Whether two texts meet, or the dashed line of the upper one goes through the lower one."""
        if self.row == other.row:
            return self.box[0] < other.box[1] + 4 and other.box[0] < self.box[1] + 4
        upper, lower = (self, other) if self.row < other.row else (other, self)
        left, right = lower.box
        return upper.instant and left - 2 < upper.x < right + 2


def _place(frame: _Frame, fault: Fault, placed: list[_FaultLabel]) -> bool:
    """Give a fault's text the highest row where it lies on no other text, and no dashed line goes through one.

    False where there is no such row, and where the same text stands already: the fault's line stays bare.
    """
    x = frame.one_x(fault.start)
    to_the_left, to_the_right = x - 5 - frame.left, frame.right - x - 5
    before = to_the_left > to_the_right < text_width(fault.text + " …", _LABEL_SIZE, False)
    room = to_the_left if before else to_the_right
    text = shorten(fault.text, _LABEL_SIZE, room - text_width(" …", _LABEL_SIZE, False))
    label = _FaultLabel(text, x, fault.instant, fault.end is None, before)
    for other in placed:
        same = (other.text, other.instant, other.standing) == (text, label.instant, label.standing)
        if same and x <= other.box[1] + 24:
            other.times += 1
            return False
    for label.row in range(_FAULT_ROWS):
        if not any(label.clashes(other) for other in placed):
            placed.append(label)
            return True
    return False


# -- Labels at the ends of lines -------------------------------------------------------------------------------------


@dataclass
class _EndLabel:
    text: str
    colour: str
    y: float
    """Height of the line's end; labels are written as near as they can."""


def _label_ends(frame: _Frame, curves: Sequence[_Curve], layers: Sequence[_Layer]) -> None:
    ends: list[_EndLabel] = []
    for curve in curves:
        known = curve.values[~np.isnan(curve.values)]
        if curve.name and len(known):
            ends.append(_EndLabel(curve.name, curve.colour, frame.one_y(float(known[-1]))))
    for layer in layers:
        spot = _room_inside(frame, layer)
        if spot is not None:
            ink = "#2B2100" if layer.colour in (ORANGE, SKY) else "#FFFFFF"
            frame.add(Text(*spot, layer.name, _LABEL_SIZE, ink, "label", bold=True, align="center"))
        else:
            ends.append(_EndLabel(layer.name, layer.colour, frame.one_y(float(layer.low[-1] + layer.high[-1]) / 2)))
    ends.sort(key=lambda end: end.y)
    room = frame.cell_right - frame.right - 9
    where = spread([end.y for end in ends], _LABEL_PITCH, frame.bottom + 1, frame.top - 4)
    for end, y in zip(ends, where, strict=True):
        if abs(y - end.y) > 5:
            frame.add(_rule(frame.right + 1, end.y, frame.right + 6, y, end.colour, 0.8))
        text = shorten(end.text, _LABEL_SIZE, room, bold=True)
        ink = _LETTERS.get(end.colour, end.colour)
        frame.add(Text(frame.right + 8, y, text, _LABEL_SIZE, ink, "label", bold=True))
    for more in _unnamed(curves):
        # Above the names, or below when they reach the top.
        above = (where[-1] if where else frame.bottom) + _LABEL_PITCH
        y = above if above <= frame.top else max(where[0] - _LABEL_PITCH, frame.bottom)
        frame.add(Text(frame.right + 8, y, more, _LABEL_SIZE, GREY, "label"))


def _unnamed(curves: Sequence[_Curve]) -> list[str]:
    """How many lines have no name, in words, if any."""
    return [f"{many} more"] if (many := sum(not curve.name for curve in curves)) else []


def _room_inside(frame: _Frame, layer: _Layer) -> tuple[float, float] | None:
    """Where an area is thickest over the width of its name, free of gaps and dashed lines; None if nowhere."""
    xs, low, high = frame.x(layer.times), frame.y(layer.low), frame.y(layer.high)
    half = text_width(layer.name, _LABEL_SIZE, True) / 2 + 3
    best, place = _LABEL_SIZE + 4, None
    for part in _unbroken(layer.times):
        for x in np.arange(xs[part][0] + half, xs[part][-1] - half, 6.0):
            near = slice(*(int(i) for i in np.searchsorted(xs, (x - half, x + half))))
            if near.start == near.stop or any(abs(stem - x) < half for stem in frame.stems):
                continue
            floor, roof = float(low[near].max()), float(high[near].min())
            if roof - floor > best:
                best, place = roof - floor, (float(x), (floor + roof) / 2)
    return place


def spread(wanted: Sequence[float], pitch: float, low: float, high: float) -> list[float]:
    """Positions at least `pitch` apart, in the given (rising) order, as near to the wanted ones as that allows.

    They stay within low…high where there is room for all of them; else they begin at `low`.
    """
    groups: list[tuple[float, int]] = []  # (middle, how many)
    for position in wanted:
        groups.append((position, 1))
        while True:
            middle, size = groups[-1]
            half = (size - 1) * pitch / 2
            groups[-1] = middle, size = max(min(middle, high - half), low + half), size
            if len(groups) == 1:
                break
            below, below_size = groups[-2]
            if middle - half - (below + (below_size - 1) * pitch / 2) >= pitch - 1e-9:
                break
            merged = (below * below_size + middle * size) / (below_size + size)
            groups[-2:] = [(merged, below_size + size)]
    return [middle + (i - (size - 1) / 2) * pitch for middle, size in groups for i in range(size)]


# -- Series ----------------------------------------------------------------------------------------------------------


def _series(samples: Sequence[Sample], start: float) -> Series:
    """Times and values of each series, from a little before the picture's left edge on."""
    first = bisect_left(samples, start - _SILENT, key=lambda sample: sample.time)
    points: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for sample in samples[first:]:
        times, values = points.setdefault((sample.metric, sample.label), ([], []))
        times.append(sample.time)
        values.append(sample.value)
    return {s: (np.array(times, float), np.array(values, float)) for s, (times, values) in points.items()}


def _times(several: Mapping[str, Points]) -> Floats:
    """All moments at which any of them was measured."""
    return np.unique(np.concatenate([times for times, _ in several.values()]))


def _inside(times: Floats, start: float) -> Floats:
    """The moments inside the picture, and its left edge where a line crosses it; not the edge inside a gap."""
    before, inside = times[times < start], times[times >= start]
    crossed = len(before) and len(inside) and inside[0] - before[-1] <= _SILENT
    return np.concatenate(([start], inside)) if crossed else inside


def _gaps(times: Floats) -> NDArray[np.intp]:
    """Where something was measured again after a silence."""
    return np.flatnonzero(np.diff(times) > _SILENT) + 1


def _broken(times: Floats, values: Floats, start: float) -> Points:
    """Cut a line at the picture's left edge, and break it where nothing was measured."""
    inside = _inside(times, start)
    gaps = _gaps(inside)
    return np.insert(inside, gaps, inside[gaps]), np.insert(np.interp(inside, times, values), gaps, np.nan)


def _unbroken(times: Floats) -> list[slice]:
    """The stretches of time without a gap."""
    gaps = _gaps(times).tolist()
    return [slice(begin, end) for begin, end in zip([0, *gaps], [*gaps, len(times)], strict=True)]
