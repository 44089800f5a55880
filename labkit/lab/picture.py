"""The picture of a board: panels of a history, drawn as one PNG.

Two steps, both pure. `compose()` turns panels, samples and faults into a `Scene`: texts, lines and areas in pixels,
which a test can read. `render()` turns a scene into PNG bytes. A frame is drawn three times a second beside a kernel
that has other work, and matplotlib's axes cost several times what the picture does, most of it for setting the same
text again. So the scene is drawn without axes, and text is set once and kept as pixels.
"""

from __future__ import annotations

import io
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.text import Text as TextArtist
from matplotlib.transforms import Affine2D, IdentityTransform
from numpy.typing import NDArray
from PIL import Image

from labkit.lab.metrics import Fault, Sample

Floats: TypeAlias = NDArray[np.float64]
Series: TypeAlias = tuple[str, str]
"""A metric and a label."""

# Okabe–Ito: told apart by colour-blind eyes. Vermillion and the light orange are kept for faults.
BLUE, SKY, GREEN, PURPLE, ORANGE, BLACK = "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000"
LINE_COLOURS = (BLUE, SKY, GREEN, PURPLE, ORANGE, BLACK)
LAYER_COLOURS = (GREEN, ORANGE, PURPLE, SKY)
COUNTER_COLOURS = (BLUE, BLACK, PURPLE)
# The pale ones are too pale for letters on white.
_LETTERS = {SKY: "#2A86BD", ORANGE: "#A87000", PURPLE: "#A9527F", GREEN: "#00835F"}
_TITLE, _WORDS, _GREY, _TICK, _GRID, _FLOOR = "#1F2328", "#1F2328", "#8B8F98", "#5E6470", "#E7E8EC", "#C3C6CD"
_QUIET = "#B5BAC4"
_SHADE, _SHADE_LETTERS, _INSTANT, _INSTANT_LETTERS = "#FAF0DA", "#8A5A00", "#D55E00", "#B84F00"

# In pixels of the picture.
WIDTH, HEIGHT, CAPTION = 1180, 340, 34
_TOP, _BOTTOM, _LEFT, _CELL_GAP, _EDGE = 66, 34, 42, 22, 6
_TICK_SIZE, _LABEL_SIZE, _TITLE_SIZE, _WORDS_SIZE = 12.0, 12.0, 16.0, 14.0
_LABEL_PITCH, _FAULT_PITCH, _FAULT_ROWS = 15.0, 16.0, 4
_COLUMNS = 3

_SILENT = 4.0
"""Seconds without a sample after which a line is broken, and the figures of now are called old."""
_HIGHLIGHTED = 6
"""Lines a panel shows by name; of more, only the highest `_HIGHEST` are named and the rest are grey."""
_HIGHEST = 3


def count(value: float) -> str:
    """A count as people write it: 2,914."""
    return f"{value:,.0f}"


def brief(value: float) -> str:
    """A round count as a scale writes it: 400, 20k, 1.5M."""
    for size, suffix in ((1_000_000_000, "G"), (1_000_000, "M"), (10_000, "k")):
        if abs(value) >= size:
            scale = size if suffix != "k" else 1000
            return f"{value / scale:g}{suffix}"
    return f"{value:,.0f}"


class Now(Mapping[Series, float]):
    """The newest value of each series a panel may speak about."""

    def __init__(self, values: Mapping[Series, float]) -> None:
        self._values = values

    def __getitem__(self, series: Series) -> float:
        return self._values[series]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def of(self, metric: str) -> dict[str, float]:
        """Label → value of one metric, in natural order of the labels."""
        found = {label: value for (m, label), value in self._values.items() if m == metric}
        return {label: found[label] for label in sorted(found, key=natural)}

    def total(self, metric: str) -> float:
        return sum(self.of(metric).values())


def natural(label: str) -> tuple[object, ...]:
    """Sort key that puts "orders/10" after "orders/9"."""
    # Split by digits, every second part is a number: like is only ever compared with like.
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", label)))


def _everything(_metric: str, _label: str) -> bool:
    return True


def _plain_name(metric: str, label: str) -> str:
    return label or metric


@dataclass(frozen=True)
class Panel:
    """One panel, as data.

    `metrics` are what it draws. Kind "lines" draws a line for each series; "stack" lays them on each other as areas;
    "progress" draws what is done as a line towards `target`, a dotted one. `counters` (stack) are cumulative metrics,
    drawn as lines of what came on top since the left edge of the picture: an old total would flatten the news.
    `keep` picks series, `name` names them at the end of their line. `words` says the figures of now, the longest
    wording first: the first that fits is shown; without it, each name with its value.
    """

    title: str
    unit: str
    kind: Literal["lines", "stack", "progress"]
    metrics: tuple[str, ...]
    words: Callable[[Now], Sequence[str]] | None = None
    counters: tuple[str, ...] = ()
    target: str | None = None
    keep: Callable[[str, str], bool] = _everything
    name: Callable[[str, str], str] = _plain_name


# -- The panels of every lab -----------------------------------------------------------------------------------------


def lag_panel(topics: Iterable[str] | None = None) -> Panel:
    """Records behind, a line for each partition, of all topics or of those named.

    The metric "blocked" (label as of "lag", 1 while a lane of the partition is blocked) adds who is blocked.
    """
    wanted = None if topics is None else frozenset(topics)
    one_topic = wanted is not None and len(wanted) == 1

    def short(label: str, alone: bool) -> str:
        topic, _, partition = label.rpartition("/")
        return f"p{partition}" if alone else f"{topic} p{partition}"

    def words(now: Now) -> Sequence[str]:
        lags = now.of("lag")
        if not lags:
            return ["no partition yet"]
        alone = len({label.rpartition("/")[0] for label in lags}) == 1
        blocked = now.of("blocked")
        stuck = [short(label, alone) for label, value in blocked.items() if value]
        state = f" · {', '.join(stuck)} blocked" if stuck else " · nothing blocked" if blocked else ""
        worst = max(lags, key=lambda label: lags[label])
        behind = count(sum(lags.values()))
        each = " · ".join(f"{short(label, alone)} {count(value)}" for label, value in lags.items())
        total = f"{behind} in all · highest {short(worst, alone)} {count(lags[worst])}"
        few = [each + state, each] if len(lags) <= _HIGHLIGHTED else []
        return [*few, total + state, total, f"{behind} in all"]

    def keep(_metric: str, label: str) -> bool:
        return wanted is None or label.rpartition("/")[0] in wanted

    def name(_metric: str, label: str) -> str:
        return short(label, one_topic)

    return Panel("Lag", "records behind", "lines", ("lag",), words, keep=keep, name=name)


def retries_panel(deployments: Iterable[str] | None = None, topics: Iterable[str] | None = None) -> Panel:
    """Records waiting in a back-off as areas; redelivered records and failed attempts as lines of what came on top."""
    wanted = {
        "waiting": None if deployments is None else frozenset(deployments),
        "failed": None if deployments is None else frozenset(deployments),
        "redelivered": None if topics is None else frozenset(topics),
    }

    def words(now: Now) -> Sequence[str]:
        waiting = f"{count(now.total('waiting'))} waiting"
        redelivered, failed = count(now.total("redelivered")), count(now.total("failed"))
        return [
            f"{waiting} · {redelivered} redelivered · {failed} failed in all",
            f"{waiting} · {redelivered} redelivered · {failed} failed",
            f"{waiting} · {failed} failed",
            waiting,
        ]

    def keep(metric: str, label: str) -> bool:
        names = wanted.get(metric)
        return names is None or label in names

    def name(metric: str, label: str) -> str:
        several = metric == "waiting" and wanted["waiting"] is not None and len(wanted["waiting"]) > 1
        return label if several else metric

    counters = ("redelivered", "failed")
    return Panel("Retries", "records", "stack", ("waiting",), words, counters, keep=keep, name=name)


def completed_panel(label: str | None = None, topics: Iterable[str] | None = None) -> Panel:
    """Distinct ids that took effect, towards the dotted line of what was sent."""
    wanted = None if topics is None else frozenset(topics)

    def words(now: Now) -> Sequence[str]:
        done = count(now.total("completed"))
        return [f"{done} of {count(now.total('sent'))}"] if now.of("sent") else [done]

    def keep(metric: str, of: str) -> bool:
        if metric == "sent":
            return wanted is None or of in wanted
        return label is None or of == label

    def name(metric: str, of: str) -> str:
        return of if metric == "completed" and label is None and of else metric

    return Panel("Completed", "records", "progress", ("completed",), words, target="sent", keep=keep, name=name)


# -- Scene: what is drawn, in pixels, origin at the bottom left ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    x: float
    y: float
    text: str
    size: float
    colour: str
    role: str
    """What it is for: "title", "unit", "words", "tick", "label", "fault", "caption"."""
    bold: bool = False
    align: Literal["left", "center", "right"] = "left"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, bottom, right, top of what is drawn; y is the middle of the letters' height."""
        width = text_width(self.text, self.size, self.bold)
        left = self.x - {"left": 0.0, "center": width / 2, "right": width}[self.align]
        return left, self.y - self.size / 2, left + width, self.y + self.size / 2


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    xs: Floats
    ys: Floats
    colour: str
    width: float = 1.0
    style: Literal["solid", "dashed", "dotted"] = "solid"


@dataclass(frozen=True, slots=True)
class Rule:
    """A straight line."""

    x0: float
    y0: float
    x1: float
    y1: float
    colour: str
    width: float = 1.0
    style: Literal["solid", "dashed", "dotted"] = "solid"


@dataclass(frozen=True, slots=True, eq=False)
class Area:
    """What lies between two lines."""

    xs: Floats
    low: Floats
    high: Floats
    colour: str
    alpha: float = 1.0


@dataclass(frozen=True, slots=True)
class Shade:
    """A rectangle."""

    x0: float
    y0: float
    x1: float
    y1: float
    colour: str


Mark: TypeAlias = Text | Line | Rule | Area | Shade


@dataclass
class Scene:
    """The marks, each painted over those before it."""

    width: int
    height: int
    marks: list[Mark] = field(default_factory=list)

    def texts(self, *roles: str) -> list[Text]:
        """The texts, of the given roles or all."""
        found = [mark for mark in self.marks if isinstance(mark, Text)]
        return [text for text in found if not roles or text.role in roles]


# -- Public: draw and snapshot ---------------------------------------------------------------------------------------


def draw(
    panels: Sequence[Panel],
    samples: Sequence[Sample],
    faults: Sequence[Fault],
    now: float,
    window: float = 60.0,
) -> bytes:
    """A PNG of the last `window` seconds before `now` (Unix seconds). Samples are in the order of time."""
    return render(compose(panels, samples, faults, now, window))


def static(
    panels: Sequence[Panel],
    samples: Sequence[Sample],
    faults: Sequence[Fault],
    now: float,
    window: float = 60.0,
    caption: str = "",
) -> bytes:
    """A PNG to be kept in a notebook: sharper than a frame, and of at most 40 kB. `caption` is written below."""
    scene = compose(panels, samples, faults, now, window, caption)
    png = b""
    for scale, colours in ((1.5, 64), (1.0, 64), (1.0, 24), (0.75, 16)):
        out = io.BytesIO()
        pixels = Image.fromarray(_pixels(scene, scale)).convert("RGB")
        pixels.quantize(colours, dither=Image.Dither.NONE).save(out, "png", optimize=True)
        png = out.getvalue()
        if len(png) <= 30_000:  # 40 kB as base64
            break
    return png


def compose(
    panels: Sequence[Panel],
    samples: Sequence[Sample],
    faults: Sequence[Fault],
    now: float,
    window: float = 60.0,
    caption: str = "",
) -> Scene:
    """Lay the panels out: three at most in a row, fault texts on the first panel of each row only."""
    if not panels:
        raise ValueError("a picture needs at least one panel")
    if window <= 0:
        raise ValueError(f"window must be above 0 seconds, not {window}")
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    below = CAPTION if caption else 0
    scene = Scene(WIDTH, HEIGHT * rows + below)
    cell = (WIDTH - _EDGE - _CELL_GAP * (columns - 1)) / columns
    series = _series(samples, now - window)
    newest = max((times[-1] for times, _ in series.values()), default=None)
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        left = column * (cell + _CELL_GAP)
        frame = _Frame(scene, now, window, left, left + cell, below + HEIGHT * (rows - 1 - row), newest, column == 0)
        _draw_panel(frame, panel, series, faults)
    if caption:
        text = _shorten(caption, 14.0, WIDTH - 2 * _LEFT)
        scene.marks.append(Text(_LEFT, CAPTION / 2, text, 14.0, _TICK, "caption"))
    return scene


def render(scene: Scene, scale: float = 1.0) -> bytes:
    """The scene as PNG bytes."""
    out = io.BytesIO()
    # Level 1: a third of the time for a few kB more, and a frame lives for a third of a second.
    Image.fromarray(_pixels(scene, scale)).convert("RGB").save(out, "png", compress_level=1)
    return out.getvalue()


# -- One panel -------------------------------------------------------------------------------------------------------


class _Frame:
    """Where one panel stands, and its way from seconds and values to pixels."""

    def __init__(
        self,
        scene: Scene,
        now: float,
        window: float,
        left: float,
        right: float,
        bottom: float,
        newest: float | None,
        writes_faults: bool,
    ) -> None:
        self.scene, self.now, self.window, self.newest = scene, now, window, newest
        self.writes_faults = writes_faults
        self.left, self.cell_right = left + _LEFT, right
        self.right = right
        self.bottom, self.top, self.ceiling = bottom + _BOTTOM, bottom + HEIGHT - _TOP, bottom + HEIGHT
        self.data_top = self.top
        self.highest = 1.0
        self.stems: list[float] = []

    @property
    def start(self) -> float:
        return self.now - self.window

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
    times: Floats
    values: Floats
    colour: str
    width: float = 2.2
    style: Literal["solid", "dashed", "dotted"] = "solid"
    named: bool = True


@dataclass(frozen=True)
class _Layer:
    name: str
    times: Floats
    low: Floats
    high: Floats
    colour: str


def _draw_panel(
    frame: _Frame, panel: Panel, series: Mapping[Series, tuple[Floats, Floats]], faults: Sequence[Fault]
) -> None:
    kept = {s: points for s, points in series.items() if panel.keep(*s)}
    curves, layers = _curves(panel, kept, frame), _layers(panel, kept, frame)

    # The labels at the line ends decide how much of the cell is left for the lines.
    names = [curve.name for curve in curves if curve.named] + [layer.name for layer in layers]
    widest = max((text_width(name, _LABEL_SIZE, True) for name in names), default=0.0)
    # In steps, so that the plot keeps its place while names come and go.
    margin = min(max(32.0, 8.0 * math.ceil((widest + 12) / 8.0)), 0.34 * (frame.cell_right - frame.left))
    frame.right = frame.cell_right - margin

    marks = _fault_marks(frame, faults)
    highest = max(
        [0.0]
        + [float(np.nanmax(c.values)) for c in curves if len(c.values) and not np.isnan(c.values).all()]
        + [float(layer.high.max()) for layer in layers if len(layer.high)]
    )
    ticks = _ticks(highest)
    frame.highest = max(highest * 1.04, 5.0)

    _furniture(frame, panel, ticks)
    _words(frame, panel, kept)
    for layer in layers:
        for part in _unbroken(layer.times):
            xs, low, high = frame.x(layer.times[part]), frame.y(layer.low[part]), frame.y(layer.high[part])
            frame.scene.marks.append(Area(xs, low, high, layer.colour, 0.85))
    # Named lines last: they lie on the grey ones.
    for curve in sorted(curves, key=lambda c: c.named):
        xs, ys = frame.x(curve.times), frame.y(curve.values)
        frame.scene.marks.append(Line(xs, ys, curve.colour, curve.width, curve.style))
    frame.scene.marks.extend(marks)
    _label_ends(frame, curves, layers)


def _curves(panel: Panel, kept: Mapping[Series, tuple[Floats, Floats]], frame: _Frame) -> list[_Curve]:
    curves: list[_Curve] = []
    if panel.kind == "progress":
        if panel.target is not None:
            targets = [points for (metric, _), points in kept.items() if metric == panel.target]
            if targets:
                times, values = _sum(targets)
                curves.append(_Curve(panel.target, *_broken(times, values, frame.start), _GREY, 1.6, "dotted"))
        colours: tuple[str, ...] = (GREEN, BLUE, PURPLE, SKY)
    else:
        colours = LINE_COLOURS
    if panel.kind != "stack":
        mine = _of(kept, panel.metrics)
        crowd = len(mine) > _HIGHLIGHTED
        by_height = sorted(mine, key=lambda s: -float(kept[s][1].max()))
        named = set(by_height[:_HIGHEST] if crowd else mine)
        for i, s in enumerate(mine):
            colour = colours[i % len(colours)] if s in named else _QUIET
            times, values = _broken(*kept[s], frame.start)
            name = panel.name(*s)
            curves.append(_Curve(name, times, values, colour, 2.2 if s in named else 1.0, named=s in named))
    for i, metric in enumerate(panel.counters):
        for s in _of(kept, (metric,)):
            times, values = kept[s]
            # Counters begin again at 0 with a new process: only rises are news.
            gained = np.concatenate(([0.0], np.cumsum(np.maximum(np.diff(values), 0.0))))
            inside = int(np.searchsorted(times, frame.start))
            gained = gained - gained[min(max(inside - 1, 0), len(gained) - 1)]
            if gained[-1] > 0:
                colour = COUNTER_COLOURS[i % len(COUNTER_COLOURS)]
                curves.append(_Curve(panel.name(*s), *_broken(times, gained, frame.start), colour, 2.0))
    return curves


def _layers(panel: Panel, kept: Mapping[Series, tuple[Floats, Floats]], frame: _Frame) -> list[_Layer]:
    if panel.kind != "stack":
        return []
    mine = [s for s in _of(kept, panel.metrics) if kept[s][1].any()]
    if not mine:
        return []
    times = np.unique(np.concatenate([kept[s][0] for s in mine]))
    before = times[times < frame.start]
    times = times[times >= frame.start]
    if len(before) and len(times) and times[0] - before[-1] <= _SILENT:
        times = np.concatenate(([frame.start], times))
    if not len(times):
        return []
    low = np.zeros_like(times)
    layers = []
    for i, s in enumerate(mine):
        high = low + np.interp(times, *kept[s], left=0.0, right=0.0)
        colour = LAYER_COLOURS[i % len(LAYER_COLOURS)]
        layers.append(_Layer(panel.name(*s), times, low, high, colour))
        low = high
    return layers


def _words(frame: _Frame, panel: Panel, kept: Mapping[Series, tuple[Floats, Floats]]) -> None:
    newest = Now({s: float(values[-1]) for s, (_, values) in kept.items()})
    if panel.words is None:
        wordings = [" · ".join(f"{panel.name(*s)} {count(newest[s])}" for s in _of(kept, panel.metrics))]
    else:
        wordings = list(panel.words(newest))
    room = frame.cell_right - frame.left
    colour = _WORDS
    if frame.newest is None:
        wordings, colour = ["no figures yet"], _GREY
    elif frame.now - frame.newest > _SILENT:
        old = f"{frame.now - frame.newest:.0f} s old: "
        wordings, colour = [old + wording for wording in wordings], _GREY
    fitting = [w for w in wordings if text_width(w, _WORDS_SIZE, False) <= room]
    text = fitting[0] if fitting else _shorten(wordings[-1] if wordings else "", _WORDS_SIZE, room)
    frame.scene.marks.append(Text(frame.left, frame.ceiling - 42, text, _WORDS_SIZE, colour, "words"))


def _furniture(frame: _Frame, panel: Panel, ticks: Sequence[float]) -> None:
    """What stays from frame to frame: title, unit, grid and scales."""
    marks = frame.scene.marks
    marks.append(Text(frame.left, frame.ceiling - 20, panel.title, _TITLE_SIZE, _TITLE, "title", bold=True))
    marks.append(Text(frame.cell_right, frame.ceiling - 20, panel.unit, _TICK_SIZE, _GREY, "unit", align="right"))
    for value in ticks:
        y = round(frame.one_y(value)) + 0.5
        if y > frame.top + 1:
            break
        marks.append(Rule(frame.left, y, frame.right, y, _FLOOR if value == 0 else _GRID, 1.0))
        marks.append(Text(frame.left - 7, y, brief(value), _TICK_SIZE, _TICK, "tick", align="right"))
    for ago, text in _time_ticks(frame.window):
        x = frame.right - ago / frame.window * (frame.right - frame.left)
        marks.append(Text(x, frame.bottom - 16, text, _TICK_SIZE, _TICK, "tick", align="center"))


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


# -- Faults ----------------------------------------------------------------------------------------------------------


def _fault_marks(frame: _Frame, faults: Sequence[Fault]) -> list[Mark]:
    """Shade the windows, rule the instants; on the panel that writes them, texts in rows above the lines.

    Their rows are taken from the top of the plot (`data_top`), so that a text lies on no line. A dashed line ends
    at its own text: it crosses none.
    """
    seen = [f for f in faults if f.start <= frame.now and (f.end is None or f.end >= frame.start)]
    seen.sort(key=lambda f: f.start)
    for fault in seen:
        if not fault.instant:
            end = frame.now if fault.end is None else fault.end
            x0, x1 = frame.one_x(fault.start), frame.one_x(end)
            # A short window is still to be seen.
            frame.scene.marks.append(Shade(x0, frame.bottom, max(x1, x0 + 2), frame.top, _SHADE))
    frame.stems = [frame.one_x(fault.start) for fault in seen if fault.instant]
    if not frame.writes_faults:
        return [Rule(x, frame.bottom, x, frame.top, _INSTANT, 1.6, "dashed") for x in frame.stems]

    placed: list[_FaultLabel] = []
    bare: list[float] = []
    for fault in seen:
        bare += _place(frame, fault, placed)
    rows = 1 + max((label.row for label in placed), default=-1)
    frame.data_top = frame.top - (rows * _FAULT_PITCH + 4 if rows else 0)
    marks: list[Mark] = [Rule(x, frame.bottom, x, frame.data_top, _INSTANT, 1.6, "dashed") for x in bare]
    for label in placed:
        y = frame.top - (label.row + 0.5) * _FAULT_PITCH
        if label.instant:
            marks.append(Rule(label.x, frame.bottom, label.x, y + 6, _INSTANT, 1.6, "dashed"))
        colour = _INSTANT_LETTERS if label.instant else _SHADE_LETTERS
        x = label.x - 5 if label.before else label.x + 5
        align: Literal["left", "right"] = "right" if label.before else "left"
        marks.append(Text(x, y, label.written, _LABEL_SIZE, colour, "fault", align=align))
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

    def under(self, x: float) -> bool:
        left, right = self.box
        return left - 2 < x < right + 2


def _place(frame: _Frame, fault: Fault, placed: list[_FaultLabel]) -> list[float]:
    """Give a fault's text the highest row where it lies on no other text, and no dashed line goes through one.

    Where there is no such row, and where the same text stands already, the fault's line stays bare: it is returned.
    """
    x = frame.one_x(fault.start)
    text = _shorten(fault.text, _LABEL_SIZE, frame.right - frame.left - 60)
    before = x + 5 + text_width(text + " …", _LABEL_SIZE, False) > frame.right
    label = _FaultLabel(text, x, fault.instant, fault.end is None, before)
    bare = [x] if fault.instant else []
    for other in placed:
        same = (other.text, other.instant, other.standing) == (text, label.instant, label.standing)
        if same and x <= other.box[1] + 24:
            other.times += 1
            return bare
    left, right = label.box
    for label.row in range(_FAULT_ROWS):
        free = True
        for other in placed:
            if other.row == label.row and left < other.box[1] + 4 and other.box[0] < right + 4:
                free = False  # two texts
            if other.row > label.row and label.instant and other.under(x):
                free = False  # this line through that text
            if other.row < label.row and other.instant and label.under(other.x):
                free = False  # that line through this text
        if free:
            placed.append(label)
            return []
    return bare


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
        known = np.flatnonzero(~np.isnan(curve.values))
        if curve.named and len(known):
            ends.append(_EndLabel(curve.name, curve.colour, frame.one_y(float(curve.values[known[-1]]))))
    quiet = [c for c in curves if not c.named]
    for layer in layers:
        spot = _room_inside(frame, layer)
        if spot is not None:
            ink = "#2B2100" if layer.colour in (ORANGE, SKY) else "#FFFFFF"
            x, y = spot
            label = Text(x, y, layer.name, _LABEL_SIZE, ink, "label", bold=True, align="center")
            frame.scene.marks.append(label)
        else:
            y = frame.one_y(float(layer.low[-1] + layer.high[-1]) / 2)
            ends.append(_EndLabel(layer.name, layer.colour, y))
    ends.sort(key=lambda end: end.y)
    room = frame.cell_right - frame.right - 9
    where = spread([end.y for end in ends], _LABEL_PITCH, frame.bottom + 1, frame.top - 4)
    for end, y in zip(ends, where, strict=True):
        if abs(y - end.y) > 5:
            frame.scene.marks.append(Rule(frame.right + 1, end.y, frame.right + 6, y, end.colour, 0.8))
        ink = _LETTERS.get(end.colour, end.colour)
        text = _shorten(end.text, _LABEL_SIZE, room, bold=True)
        frame.scene.marks.append(Text(frame.right + 8, y, text, _LABEL_SIZE, ink, "label", bold=True))
    if quiet:
        # Above the names, or below when they reach the top.
        text = f"{len(quiet)} more"
        above = (where[-1] if where else frame.bottom) + _LABEL_PITCH
        y = above if above <= frame.top else max(where[0] - _LABEL_PITCH, frame.bottom)
        frame.scene.marks.append(Text(frame.right + 8, y, text, _LABEL_SIZE, _GREY, "label"))


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


def _series(samples: Sequence[Sample], start: float) -> dict[Series, tuple[Floats, Floats]]:
    """Times and values of each series, from a little before the picture's left edge on."""
    first = bisect_left(samples, start - _SILENT, key=lambda sample: sample.time)
    points: dict[Series, tuple[list[float], list[float]]] = {}
    for sample in samples[first:]:
        times, values = points.setdefault((sample.metric, sample.label), ([], []))
        times.append(sample.time)
        values.append(sample.value)
    return {s: (np.array(times, float), np.array(values, float)) for s, (times, values) in points.items()}


def _of(kept: Iterable[Series], metrics: Sequence[str]) -> list[Series]:
    mine = [s for s in kept if s[0] in metrics]
    return sorted(mine, key=lambda s: (metrics.index(s[0]), natural(s[1])))


def _sum(points: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    if len(points) == 1:
        return points[0]
    times = np.unique(np.concatenate([t for t, _ in points]))
    total = np.zeros_like(times)
    for each_times, values in points:
        total += np.interp(times, each_times, values, left=0.0)
    return times, total


def _broken(times: Floats, values: Floats, start: float) -> tuple[Floats, Floats]:
    """Cut a line at the picture's left edge, and break it where nothing was measured."""
    if len(times) > 1 and times[0] < start < times[-1]:
        edge = float(np.interp(start, times, values))
        inside = times > start
        # Do not invent the edge inside a gap.
        after = times[inside][0]
        before = times[~inside][-1]
        times, values = times[inside], values[inside]
        if after - before <= _SILENT:
            times, values = np.concatenate(([start], times)), np.concatenate(([edge], values))
    else:
        inside = times >= start
        times, values = times[inside], values[inside]
    gaps = np.flatnonzero(np.diff(times) > _SILENT) + 1
    return np.insert(times, gaps, times[gaps]), np.insert(values, gaps, np.nan)


def _unbroken(times: Floats) -> list[slice]:
    """The stretches of time without a gap."""
    gaps = (np.flatnonzero(np.diff(times) > _SILENT) + 1).tolist()
    return [slice(begin, end) for begin, end in zip([0, *gaps], [*gaps, len(times)], strict=True)]


# -- Pixels ----------------------------------------------------------------------------------------------------------

# Everything is said to matplotlib in full (font, mathtext, colours): a learner's style sheet or rcParams, and a "$" in
# a fault's text, must not change the board.
_Renderer: Any = RendererAgg  # its methods carry no types
_FONT = "DejaVu Sans"  # comes with matplotlib
# matplotlib's font objects are shared, and the learner's own plots are drawn by another thread.
_lock = threading.RLock()


@lru_cache(maxsize=64)
def _font(size: float, bold: bool) -> FontProperties:
    return FontProperties(family=_FONT, size=size, weight="bold" if bold else "normal")


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool) -> float:
    """Width in pixels of a text as it is drawn."""
    with _lock:
        width, _, _ = _Renderer(1, 1, 72).get_text_width_height_descent(text, _font(size, bold), False)
    return float(width)


def _shorten(text: str, size: float, room: float, bold: bool = False) -> str:
    if text_width(text, size, bold) <= room:
        return text
    while text and text_width(text + "…", size, bold) > room:
        text = text[:-1]
    return text.rstrip() + "…"


def _pixels(scene: Scene, scale: float) -> NDArray[np.uint8]:
    """Paint the marks in their order. At 72 dots an inch a point is a pixel, times the scale."""
    with _lock:
        figure, canvas = _canvas(scene.width * scale, scene.height * scale, scale, "white")
        for order, mark in enumerate(scene.marks):
            artist = _Letters(mark, scale) if isinstance(mark, Text) else _shape(mark, scale)
            artist.set_zorder(order)
            figure.add_artist(artist)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())


class _Letters(Artist):
    """A text, drawn from pixels that are kept: setting type is most of the work of a frame, and the same each time."""

    def __init__(self, text: Text, scale: float) -> None:
        super().__init__()
        self._text, self._scale = text, scale

    def draw(self, renderer: Any) -> None:
        text, scale = self._text, self._scale
        pixels = _typeset(text.text, text.size, text.colour, text.bold, scale)
        left = text.box[0] * scale - _PADDING
        bottom = text.y * scale - pixels.shape[0] // 2
        brush = renderer.new_gc()
        renderer.draw_image(brush, round(left), round(bottom), pixels)
        brush.restore()


_PADDING = 2


@lru_cache(maxsize=1024)
def _typeset(text: str, size: float, colour: str, bold: bool, scale: float) -> NDArray[np.uint8]:
    """The pixels of a text, the middle of its letters' height in the middle, bottom row first."""
    width = math.ceil(text_width(text, size, bold) * scale) + 2 * _PADDING
    height = 2 * math.ceil(size * scale)
    figure, canvas = _canvas(width, height, scale, "none")
    artist = TextArtist(
        _PADDING,
        height / 2,
        text,
        color=colour,
        fontproperties=_font(size, bold),
        verticalalignment="center_baseline",
        parse_math=False,
        usetex=False,
    )
    artist.set_transform(IdentityTransform())
    figure.add_artist(artist)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[::-1])


def _canvas(width: float, height: float, scale: float, colour: str) -> tuple[Figure, Any]:
    dpi = 72 * scale
    figure = Figure((width / dpi, height / dpi), dpi, facecolor=colour, edgecolor="none")
    figure.set_layout_engine("none")
    return figure, FigureCanvasAgg(figure)


_DASHES: Mapping[str, Any] = {"solid": "solid", "dashed": (0, (2.2, 1.8)), "dotted": (0, (1.0, 1.6))}


def _shape(mark: Line | Rule | Area | Shade, scale: float) -> Artist:
    artist: Artist
    match mark:
        case Line():
            artist = _stroke(mark.xs, mark.ys, mark)
        case Rule():
            artist = _stroke([mark.x0, mark.x1], [mark.y0, mark.y1], mark)
        case Area():
            xs, ys = np.concatenate((mark.xs, mark.xs[::-1])), np.concatenate((mark.high, mark.low[::-1]))
            artist = _filled(np.column_stack((xs, ys)), mark.colour, mark.alpha)
        case Shade():
            corners = ((mark.x0, mark.y0), (mark.x1, mark.y0), (mark.x1, mark.y1), (mark.x0, mark.y1))
            artist = _filled(np.array(corners), mark.colour, 1.0)
    artist.set_transform(Affine2D().scale(scale))
    return artist


def _filled(corners: Floats, colour: str, alpha: float) -> Polygon:
    return Polygon(corners, closed=True, facecolor=colour, edgecolor="none", alpha=alpha)


def _stroke(xs: Any, ys: Any, mark: Line | Rule) -> Line2D:
    return Line2D(
        xs,
        ys,
        color=mark.colour,
        linewidth=mark.width,
        linestyle=_DASHES[mark.style],
        marker="none",
        antialiased=True,
        solid_capstyle="round" if isinstance(mark, Line) else "butt",
        solid_joinstyle="round",
        dash_capstyle="butt",
    )
