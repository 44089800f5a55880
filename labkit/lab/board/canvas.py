"""The canvas: texts, lines and areas in pixels, and how they become a PNG.

A frame is drawn three times a second in a kernel that has other work, and matplotlib's axes and texts would take
several times as long. So lines and areas go straight to its renderer, and Pillow writes the texts on top.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, floor
from typing import Any, Literal, TypeAlias

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Floats: TypeAlias = NDArray[np.float64]
Style: TypeAlias = Literal["solid", "dashed", "dotted"]


# -- Scene: what is drawn, in pixels, origin at the bottom left ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    x: float
    y: float
    text: str
    size: float
    colour: str
    role: str
    """Its role, for tests: "title", "unit", "words", "tick", "label", "fault", "caption"."""
    bold: bool = False
    align: Literal["left", "center", "right"] = "left"


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    xs: Floats
    ys: Floats
    colour: str
    width: float = 1.0
    style: Style = "solid"


@dataclass(frozen=True, slots=True, eq=False)
class Area:
    """The area between two lines."""

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


def render(scene: Scene) -> bytes:
    """The scene as PNG bytes, quickly."""
    out = io.BytesIO()
    # Compression level 1 takes a third of the time for a few kB more; a frame lasts a third of a second.
    _image(scene, 1.0).save(out, "png", compress_level=1)
    return out.getvalue()


def render_small(scene: Scene, most: int = 30_000) -> bytes:
    """The scene as PNG bytes, as sharp as `most` bytes allow; by default for a saved notebook (40 kB as base64)."""
    png = b""
    for scale, colours in ((1.5, 64), (1.0, 64), (1.0, 24), (0.75, 16)):
        out = io.BytesIO()
        _image(scene, scale).quantize(colours, dither=Image.Dither.NONE).save(out, "png", optimize=True)
        png = out.getvalue()
        if len(png) <= most:
            break
    return png


# -- Pixels ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _font(size: float, bold: bool) -> ImageFont.FreeTypeFont:
    # It comes with matplotlib. A learner's style sheet or rcParams must not change the board.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def text_width(text: str, size: float, bold: bool = False) -> float:
    return _font(size, bold).getlength(text)


def shorten(text: str, size: float, room: float, bold: bool = False) -> str:
    """The text, cut with a "…" where there is no room for it."""
    if text_width(text, size, bold) <= room:
        return text
    while text and text_width(text + "…", size, bold) > room:
        text = text[:-1]
    return text.rstrip() + "…"


_Renderer: Any = RendererAgg  # its methods carry no types
_DASHES = {"solid": None, "dashed": (2.2, 1.8), "dotted": (1.0, 1.6)}
_ANCHORS = {"left": "ls", "center": "ms", "right": "rs"}
_MIDDLE = 0.36
"""Of a letter's size: from the middle of its height down to the baseline."""


def _image(scene: Scene, scale: float) -> Image.Image:
    """Paint the marks in their order, texts on top. At 72 dots an inch a point is a pixel, times the scale."""
    width, height = round(scene.width * scale), round(scene.height * scale)
    renderer = _Renderer(width, height, 72 * scale)
    zoom = Affine2D().scale(scale)
    paper = Area(np.array((0, scene.width)), np.zeros(2), np.full(2, scene.height), "white")
    for mark in (paper, *scene.marks):
        brush = renderer.new_gc()
        if isinstance(mark, Line):
            dashes = _DASHES[mark.style]
            brush.set_foreground(mark.colour)
            brush.set_linewidth(mark.width)
            brush.set_dashes(0, dashes and [mark.width * length for length in dashes])
            brush.set_capstyle("butt" if dashes else "round")
            renderer.draw_path(brush, Path(np.column_stack((mark.xs, mark.ys))), zoom)
        elif isinstance(mark, Area):
            brush.set_linewidth(0)
            brush.set_alpha(mark.alpha)
            xs, ys = np.concatenate((mark.xs, mark.xs[::-1])), np.concatenate((mark.high, mark.low[::-1]))
            renderer.draw_path(brush, Path(np.column_stack((xs, ys))), zoom, to_rgb(mark.colour))
    image = Image.fromarray(np.asarray(renderer.buffer_rgba())).convert("RGB")
    for mark in scene.marks:
        if isinstance(mark, Text):
            x, y = mark.x * scale, (scene.height - mark.y + _MIDDLE * mark.size) * scale
            stamp, left, top = _stamp(mark.text, mark.size * scale, mark.bold, _ANCHORS[mark.align])
            image.paste(mark.colour, (round(x) + left, round(y) + top), stamp)
    return image


@lru_cache(maxsize=2048)
def _stamp(text: str, size: float, bold: bool, anchor: str) -> tuple[Image.Image, int, int]:
    """Where a text has ink, and how far right and below its anchor that begins. Most texts are those of the frame
    before, and setting them took a third of a frame's time."""
    font = _font(size, bold)
    left, top, right, bottom = font.getbbox(text, anchor=anchor)
    left, top = floor(left), floor(top)
    stamp = Image.new("L", (max(1, ceil(right) - left), max(1, ceil(bottom) - top)))  # a text may be empty
    ImageDraw.Draw(stamp).text((-left, -top), text, 255, font, anchor)
    return stamp, left, top
