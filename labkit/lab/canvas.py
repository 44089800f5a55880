"""The canvas: texts, lines and areas in pixels, and how they become a PNG.

A frame is drawn three times a second beside a kernel that has other work, and matplotlib's axes cost several times what
the picture does, most of it for setting the same text again. So a scene is drawn without axes, and text is set once and
kept as pixels.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Mapping
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

Floats: TypeAlias = NDArray[np.float64]
Style: TypeAlias = Literal["solid", "dashed", "dotted"]

SMALLEST = 0.75  # scale of a picture that must not have many bytes

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
    style: Style = "solid"


@dataclass(frozen=True, slots=True, eq=False)
class Area:
    """What lies between two lines."""

    xs: Floats
    low: Floats
    high: Floats
    colour: str
    alpha: float = 1.0


Mark: TypeAlias = Text | Line | Area


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


def render(scene: Scene) -> bytes:
    """The scene as PNG bytes, quickly."""
    out = io.BytesIO()
    # Level 1: a third of the time for a few kB more, and a frame lives for a third of a second.
    Image.fromarray(_pixels(scene, 1.0)).convert("RGB").save(out, "png", compress_level=1)
    return out.getvalue()


def render_small(scene: Scene, most: int = 30_000) -> bytes:
    """The scene as PNG bytes, as sharp as `most` bytes allow; by default those of a picture that is kept in a notebook,
    40 kB as base64."""
    png = b""
    for scale, colours in ((1.5, 64), (1.0, 64), (1.0, 24), (SMALLEST, 16)):
        out = io.BytesIO()
        pixels = Image.fromarray(_pixels(scene, scale)).convert("RGB")
        pixels.quantize(colours, dither=Image.Dither.NONE).save(out, "png", optimize=True)
        png = out.getvalue()
        if len(png) <= most:
            break
    return png


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
def text_width(text: str, size: float, bold: bool, scale: float = 1.0) -> float:
    """Width in pixels of a text as it is drawn at this scale: small letters are wider than a share of large ones."""
    with _lock:
        width, _, _ = _Renderer(1, 1, 72 * scale).get_text_width_height_descent(text, _font(size, bold), False)
    return float(width)


def shorten(text: str, size: float, room: float, bold: bool = False) -> str:
    """The text, cut with a "…" where there is no room for it."""
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
    width = math.ceil(text_width(text, size, bold, scale)) + 2 * _PADDING
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


def _shape(mark: Line | Area, scale: float) -> Artist:
    artist: Artist
    if isinstance(mark, Line):
        artist = Line2D(
            mark.xs,
            mark.ys,
            color=mark.colour,
            linewidth=mark.width,
            linestyle=_DASHES[mark.style],
            marker="none",
            antialiased=True,
            solid_capstyle="round",
            solid_joinstyle="round",
            dash_capstyle="butt",
        )
    else:
        xs, ys = np.concatenate((mark.xs, mark.xs[::-1])), np.concatenate((mark.high, mark.low[::-1]))
        corners = np.column_stack((xs, ys))
        artist = Polygon(corners, closed=True, facecolor=mark.colour, edgecolor="none", alpha=mark.alpha)
    artist.set_transform(Affine2D().scale(scale))
    return artist
