"""The board: a live picture of a lab, the buttons that break it, and what its pods print."""

from __future__ import annotations

import html
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import ipywidgets
from IPython import display

from labkit.lab import picture
from labkit.lab.buttons import Button, Say, one_line, set_trait
from labkit.lab.canvas import render, render_small
from labkit.lab.deployment import Pod, PodState
from labkit.lab.faults import Action, sentence
from labkit.lab.metrics import History, clock
from labkit.lab.panels import Panel

if TYPE_CHECKING:
    import pandas as pd

_FRAME = 1 / 3
"""Seconds from frame to frame."""
_LONGEST_SNAPSHOT = 600.0
_NARROWEST = 20.0
"""Seconds a live picture shows at least."""
_SILENT = 5.0
"""Seconds without a sample after which the status line says so."""
_LOG_LINES = 200
_LINE_LENGTH = 2_000
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class PodLike(Protocol):
    """What a board needs of a pod. Faults may block, and raise when they cannot be done; all else answers at once."""

    @property
    def name(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def state(self) -> PodState: ...
    @property
    def restarts(self) -> int: ...
    def why_not(self, verb: str) -> str | None: ...
    def do(self, verb: str, options: Mapping[str, float], /) -> str: ...


class DeploymentLike(Protocol):
    """What a board needs of a deployment."""

    @property
    def name(self) -> str: ...
    @property
    def pods(self) -> Sequence[PodLike]: ...
    def scale(self, replicas: int, /) -> None: ...


class Board:
    """Shows itself at the end of a cell, and redraws in a thread of its own until `close()`.

    `status` says in one line what runs. `log` gives the newest lines of the pods, time and pod in front.
    `deployments` brings the buttons for their pods; it is asked at every frame and click, so that a deployment that
    replaces another is followed. `actions` are further buttons. `window` is the width of the picture in seconds, once
    the run is that old.
    """

    def __init__(
        self,
        history: History,
        panels: Sequence[Panel],
        status: Callable[[], str],
        deployments: Callable[[], Sequence[DeploymentLike]] | None = None,
        log: Callable[[], Sequence[str]] = list,
        actions: Sequence[Action] = (),
        *,
        window: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not panels:
            raise ValueError("a board needs at least one panel")
        self._history, self._panels, self._status, self._log = history, tuple(panels), status, log
        self._window, self._clock = window, clock
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        # Frames, clicks and finished actions come from different threads.
        self._lock = threading.RLock()
        self._drawn_version = -1
        self._drawn_at_rest = False
        self._newest: float | None = None
        self._failed_action = ""
        self.frames = 0
        """How many frames were drawn."""

        self._picture = ipywidgets.Image(format="png")
        self._picture.layout = ipywidgets.Layout(width="100%", max_width=f"{picture.WIDTH}px")
        self._says = ipywidgets.HTML()
        self._lines = ipywidgets.HTML()
        self._pods = None if deployments is None else _PodButtons(deployments, self._answered, self._lock)
        self._buttons = [Button(lambda a=action: a, self._answered) for action in actions]  # type: ignore[misc]
        rows: list[Any] = [self._picture, self._says]
        if self._pods is not None:
            rows.append(self._pods.widget)
        if self._buttons:
            rows.append(_row([button.widget for button in self._buttons]))
        rows.append(self._lines)
        self.widget = ipywidgets.VBox(rows, layout=ipywidgets.Layout(max_width=f"{picture.WIDTH + 24}px"))
        """The widget that is shown."""

    # -- what a notebook uses

    def table(self) -> pd.DataFrame:
        """The numbers of now: metric, label, now, highest."""
        return self._history.table()

    def snapshot(self, window: float | None = None) -> display.Image:
        """A picture that stays in the saved notebook: the last `window` seconds, by default the whole run.

        "Whole" ends at ten minutes: of a longer run it shows the last ten.
        """
        seen = self._history.snapshot()
        now = seen.samples[-1].time if seen.samples else self._clock()
        if window is None:
            first = seen.samples[0].time if seen.samples else now
            window = min(max(now - first, 10.0), _LONGEST_SNAPSHOT)
        caption = self._status()
        png = render_small(picture.compose(self._panels, seen.samples, seen.faults, now, window, caption))
        titles = ", ".join(panel.title for panel in self._panels)
        # Shown at the size of the live one; `alt` is for those who do not see it.
        image: display.Image = display.Image(  # type: ignore[no-untyped-call]
            data=png, format="png", width=picture.WIDTH, alt=f"{titles}. {caption}"
        )
        return image

    def close(self) -> None:
        """End the redrawing. What was drawn last stays on the page, its buttons disabled."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
        with self._lock:
            for button in self._all_buttons():
                button.close("This board is closed.")
            self._say("This board is closed: run the notebook again from its first cell for a live one.")

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def start(self) -> None:
        """Draw the first frame and begin to redraw. Displaying the board does this."""
        with self._lock:
            if self._thread is not None or self.closed:
                return
            self.redraw()
            self._thread = threading.Thread(target=self._redraw_until_closed, name="labkit-board", daemon=True)
            self._thread.start()

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        self.start()
        bundle: dict[str, Any] = dict(self.widget._repr_mimebundle_())
        bundle["text/plain"] = repr(self)
        return bundle

    def __repr__(self) -> str:
        titles = " · ".join(panel.title for panel in self._panels)
        return f"Board({titles}): a live picture. Run this cell to see it; board.table() has its numbers."

    # -- the redraw thread

    def _redraw_until_closed(self) -> None:
        while not self.closed:
            begun = time.monotonic()
            self.redraw()
            took = time.monotonic() - begun
            # On a slow machine fewer frames, not a busy core.
            self._wake.wait(max(_FRAME - took, 2 * took))
            self._wake.clear()

    def redraw(self) -> None:
        """Bring all parts up to date. It never raises: what went wrong is in the status line."""
        with self._lock:
            if self.closed:
                return
            parts: list[tuple[str, Callable[[], None]]] = [("log", self._redraw_log)]
            if self._pods is not None:
                parts.append(("pods", self._pods.refresh))
            parts += [(button.widget.description, button.refresh) for button in self._buttons]
            parts.append(("picture", self._redraw_picture))
            trouble = [self._failed_action] if self._failed_action else []
            for name, part in parts:
                try:
                    part()
                except Exception as error:
                    trouble.append(f"{name}: {one_line(error)}")
            try:
                status = self._status()
            except Exception as error:
                status = f"status: {one_line(error)}"
            if self._newest is not None and self._clock() - self._newest > _SILENT:
                since = clock(self._newest)
                trouble.append(f"no new figures since {since}")
            self._say(status, trouble)

    def _redraw_picture(self) -> None:
        now = self._clock()
        # A young run fills the picture too.
        window = min(self._window, max(_NARROWEST, now - (self._history.begun or now)))
        seen = self._history.snapshot(since=now - window - 5)
        self._newest = seen.samples[-1].time if seen.samples else self._newest
        # Nothing new, or nothing but the same figures for the whole width of the picture.
        visible = [fault for fault in seen.faults if fault.end is None or fault.end > now - window - 1]
        at_rest = seen.changed < now - window - 1 and not visible
        if seen.version == self._drawn_version or (at_rest and self._drawn_at_rest):
            return
        png = render(picture.compose(self._panels, seen.samples, seen.faults, now, window))
        self._drawn_version, self._drawn_at_rest = seen.version, at_rest
        self.frames += 1
        if png != self._picture.value:
            self._picture.value = png

    def _redraw_log(self) -> None:
        set_trait(self._lines, "value", _log_html(list(self._log())[-_LOG_LINES:]))

    def _say(self, status: str, trouble: Sequence[str] = ()) -> None:
        bad = "".join(f' <span style="color:{_BAD}">· {html.escape(each)}</span>' for each in trouble)
        text = f'<div role="status" style="{_STATUS_STYLE}">{html.escape(status)}{bad}</div>'
        set_trait(self._says, "value", text)

    # -- clicks

    def _answered(self, text: str, failed: bool = False) -> None:
        """Tell what failed; what was done is in the picture."""
        with self._lock:
            self._failed_action = text if failed else ""
        self.redraw()

    def _all_buttons(self) -> list[Button]:
        return [*self._buttons, *(self._pods.buttons if self._pods is not None else [])]


class _PodButtons:
    """A pod to choose, and what can be done to it."""

    def __init__(
        self,
        deployments: Callable[[], Sequence[DeploymentLike]],
        say: Say,
        lock: threading.RLock,
    ) -> None:
        self._deployments, self._lock = deployments, lock
        self._pods: dict[_Place, PodLike] = {}
        self._chosen: _Place = ("", 0)
        self._several = False
        self._choice = ipywidgets.ToggleButtons(
            options=[], style={"button_width": "auto"}, tooltips=[], layout=ipywidgets.Layout(width="auto")
        )
        self._choice.observe(self._choose, "value")
        on_pod = [Button(partial(self._on_pod, verb, about), say) for verb, about in Pod.verbs.items()]
        on_all = [Button(make, say) for make in (self._add, self._remove)]
        self.buttons = [*on_pod, *on_all]
        self.widget = ipywidgets.VBox(
            [
                _row([*(button.widget for button in on_all), self._choice]),  # what is clicked often stays in its place
                _row([button.widget for button in on_pod]),
            ]
        )

    def refresh(self) -> None:
        deployments = self._deployments()
        self._several = len(deployments) > 1
        self._pods = pods = {(one.name, pod.index): pod for one in deployments for pod in one.pods}
        options = [(_named(self._called(place), pod), place) for place, pod in pods.items()]
        if options != list(self._choice.options):
            chosen, mine = self._chosen, [place for place in pods if place[0] == self._chosen[0]]
            if chosen not in pods and (mine or chosen[0] not in [one.name for one in deployments]):
                chosen = next(iter(mine or pods), (deployments[0].name, 0))
            # New options reset the choice; the learner's stays, also while its deployment is replaced and has no pods.
            self._choice.tooltips = [_about(pod) for pod in pods.values()]
            self._choice.options = options
            self._choice.value = chosen if chosen in pods else None
            self._chosen = chosen
        for button in self.buttons:
            button.refresh()

    def _choose(self, change: dict[str, Any]) -> None:
        with self._lock:
            if change["new"] is not None:
                self._chosen = change["new"]
                for button in self.buttons:
                    button.refresh()

    def _called(self, place: _Place) -> str:
        return f"{place[0]}-{place[1]}" if self._several else f"pod {place[1]}"

    def _on_pod(self, verb: str, about: str) -> Action:
        """Do something to the chosen pod, if it makes sense now."""
        (name, index), called = self._chosen, self._called(self._chosen)

        def run() -> str:
            for pod in (pod for one in self._deployments() if one.name == name for pod in one.pods):
                if pod.index == index:
                    return pod.do(verb, {})
            raise LookupError(f"there is no {called} any more")

        pod = self._pods.get(self._chosen)
        why_not = f"There is no {called} now." if pod is None else sentence(pod.why_not(verb))
        return Action(f"{verb.capitalize()} {called}", about, run, lambda: why_not)

    def _add(self) -> Action:
        return self._scale("Add", 1, None)

    def _remove(self) -> Action:
        enough = "The last pod stays." if self._siblings() < 2 else None
        return self._scale("Remove", -1, enough)

    def _siblings(self) -> int:
        return sum(name == self._chosen[0] for name, _ in self._pods)

    def _scale(self, verb: str, by: int, why_not: str | None) -> Action:
        """Change the number of pods of the chosen one's deployment."""
        name, replicas = self._chosen[0], self._siblings() + by

        def run() -> None:
            for one in self._deployments():
                if one.name == name:
                    one.scale(replicas)

        what = f"a {name} pod" if self._several else "a pod"
        return Action(f"{verb} {what}", f"Scale to {replicas}.", run, lambda: why_not)


_Place: TypeAlias = tuple[str, int]
"""A pod by the name of its deployment and its index."""

# -- Text ------------------------------------------------------------------------------------------------------------

_BAD = "#B84F00"
# JupyterLab's own variables where there are some, so that the text fits a dark theme.
_STATUS_STYLE = (
    "margin:0 0 2px 42px;line-height:20px;min-height:20px;font-size:13px;color:var(--jp-ui-font-color1,#444)"
)
# Reversed, so that the pane stays at its newest line.
_LOG_STYLE = (
    "display:flex;flex-direction:column-reverse;height:100px;overflow:auto;margin-top:4px;padding:4px 8px;"
    "box-sizing:border-box;border:1px solid var(--jp-border-color2,#ddd);border-radius:3px;"
    "background:var(--jp-layout-color1,#fff)"
)
_PRE_STYLE = (
    "flex:none;margin:0 0 auto 0;overflow:visible;white-space:pre-wrap;overflow-wrap:anywhere;"
    "font-size:12px;line-height:16px;"
    "font-family:var(--jp-code-font-family,monospace);color:var(--jp-ui-font-color1,#222)"
)
_NAMED = re.compile(r"^((?:\d\d:\d\d:\d\d )?)([A-Za-z0-9][\w.-]*-\d+)(?=[\s:|│])")


def _log_html(lines: Sequence[str]) -> str:
    """The log pane. What pods print is anybody's text: control sequences go, all else is escaped."""
    shown = []
    for line in lines:
        text = _ANSI.sub("", line.rstrip("\n"))
        if len(text) > _LINE_LENGTH:
            text = f"{text[:_LINE_LENGTH]} … ({len(text) - _LINE_LENGTH:,} characters more)"
        shown.append(_NAMED.sub(r"\1<b>\2</b>", html.escape(text)))
    body = "\n".join(shown) or '<span style="opacity:.6">Here is what pods print, and their tracebacks.</span>'
    return f'<div role="log" style="{_LOG_STYLE}"><pre style="{_PRE_STYLE}">{body}</pre></div>'


def _named(called: str, pod: PodLike) -> str:
    state = pod.state
    return called if state is PodState.RUNNING else f"{called} · {state.value}"


def _about(pod: PodLike) -> str:
    times = {0: "never restarted", 1: "restarted once"}.get(pod.restarts, f"restarted {pod.restarts} times")
    return f"{pod.name}: {pod.state.value}, {times}"


def _row(widgets: Sequence[Any]) -> Any:
    layout = ipywidgets.Layout(margin="0 0 0 40px", flex_flow="row wrap", align_items="center")
    return ipywidgets.HBox(list(widgets), layout=layout)
