"""The board: a live picture of a lab, the buttons that break it, and what its pods print."""

from __future__ import annotations

import html
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets
from IPython import display

from labkit.lab.board import picture
from labkit.lab.board.buttons import Button, Say, one_line
from labkit.lab.board.canvas import render, render_small
from labkit.lab.board.panels import Panel
from labkit.lab.faults.target import Action
from labkit.lab.history import History, clock
from labkit.lab.pods.deployment import Deployment
from labkit.lab.pods.pod import Pod, PodState

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
        deployments: Callable[[], Sequence[Deployment]] | None = None,
        log: Callable[[], Sequence[str]] = list,
        actions: Sequence[Action] = (),
        *,
        window: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._history, self._panels, self._status, self._log = history, tuple(panels), status, log
        self._window, self._clock = window, clock
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        # Frames, clicks and finished actions come from different threads.
        self._lock = threading.RLock()
        self._drawn_version, self._drawn_at_rest = -1, False
        self._newest: float | None = None
        self._failed_action = ""
        self.frames = 0
        """The number of frames drawn so far."""

        self._picture = ipywidgets.Image(format="png")
        self._picture.layout = ipywidgets.Layout(width="100%", max_width=f"{picture.WIDTH}px")
        self._says = ipywidgets.HTML()
        self._lines = ipywidgets.HTML()
        self._pods = None if deployments is None else _PodButtons(deployments, self._answered, self._lock)
        self._buttons = [Button(lambda a=action: a, self._answered) for action in actions]  # type: ignore[misc]
        rows = [self._picture, self._says, *([] if self._pods is None else [self._pods.widget])]
        rows += [_row(self._buttons), self._lines]
        self.widget = ipywidgets.VBox(rows, layout=ipywidgets.Layout(max_width=f"{picture.WIDTH + 24}px"))
        """The widget that is shown."""

    # -- what a notebook uses

    def table(self) -> pd.DataFrame:
        """The present figures: metric, label, now, highest."""
        return self._history.table()

    def snapshot(self) -> display.Image:
        """A picture that stays in the saved notebook: the whole run, or the last ten minutes of a longer one."""
        seen = self._history.snapshot()
        now = seen.samples[-1].time if seen.samples else self._clock()
        window = min(max(now - (self._history.begun or now), 10.0), _LONGEST_SNAPSHOT)
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
        return {**self.widget._repr_mimebundle_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        titles = " · ".join(panel.title for panel in self._panels)
        return f"Board({titles}): a live picture. Run this cell to see it; board.table() has its numbers."

    # -- the redraw thread

    def _redraw_until_closed(self) -> None:
        took = 0.0
        while not self._closed.wait(max(_FRAME - took, 4 * took)):  # a slow machine draws fewer frames
            begun = time.monotonic()
            self.redraw()
            took = time.monotonic() - begun

    def redraw(self) -> None:
        """Bring all parts up to date. It never raises: what went wrong is in the status line."""
        with self._lock:
            if self.closed:
                return
            trouble = [self._failed_action] if self._failed_action else []
            parts = {"log": self._redraw_log, "buttons": self._refresh_buttons, "picture": self._redraw_picture}
            for name, part in parts.items():
                try:
                    part()
                except Exception as error:
                    trouble.append(f"{name}: {one_line(error)}")
            try:
                status = self._status()
            except Exception as error:
                status = f"status: {one_line(error)}"
            if self._newest is not None and self._clock() - self._newest > _SILENT:
                trouble.append(f"no new figures since {clock(self._newest)}")
            self._say(status, trouble)

    def _redraw_picture(self) -> None:
        now = self._clock()
        # A young run fills the picture too.
        window = min(self._window, max(_NARROWEST, now - (self._history.begun or now)))
        seen = self._history.snapshot(since=now - window - 5)
        self._newest = seen.samples[-1].time if seen.samples else self._newest
        # Nothing is new, or all figures have been the same for the whole width of the picture.
        visible = [fault for fault in seen.faults if fault.end is None or fault.end > now - window - 1]
        at_rest = seen.changed < now - window - 1 and not visible
        if seen.version == self._drawn_version or (at_rest and self._drawn_at_rest):
            return
        self._picture.value = render(picture.compose(self._panels, seen.samples, seen.faults, now, window))
        self._drawn_version, self._drawn_at_rest = seen.version, at_rest
        self.frames += 1

    def _redraw_log(self) -> None:
        self._lines.value = _log_html(list(self._log())[-_LOG_LINES:])

    def _refresh_buttons(self) -> None:
        if self._pods is not None:
            self._pods.refresh()
        for button in self._buttons:
            button.refresh()

    def _say(self, status: str, trouble: Sequence[str] = ()) -> None:
        bad = "".join(f' <span style="color:{_BAD}">· {html.escape(each)}</span>' for each in trouble)
        self._says.value = f'<div role="status" style="{_STATUS_STYLE}">{html.escape(status)}{bad}</div>'

    # -- clicks

    def _answered(self, text: str, failed: bool) -> None:
        """Show what failed. What was done is in the picture."""
        with self._lock:
            self._failed_action = text if failed else ""
        self.redraw()

    def _all_buttons(self) -> list[Button]:
        return [*self._buttons, *(self._pods.buttons if self._pods is not None else [])]


class _PodButtons:
    """A pod to choose, what can be done to it, and how many there are of its deployment."""

    def __init__(self, deployments: Callable[[], Sequence[Deployment]], say: Say, lock: threading.RLock) -> None:
        self._deployments, self._lock = deployments, lock
        self._chosen = f"{deployments()[0].name}-0"
        self._choice = ipywidgets.ToggleButtons(
            options=[], style={"button_width": "auto"}, tooltips=[], layout=ipywidgets.Layout(width="auto")
        )
        self._choice.observe(self._choose, "value")
        on_pod = [Button(partial(self._on_pod, verb), say) for verb in Pod.verbs]
        on_all = [
            Button(partial(self._scale, verb, by), say) for verb, by in (("Add a pod to", 1), ("Remove a pod of", -1))
        ]
        self.buttons = [*on_pod, *on_all]
        # Buttons that are clicked often stay in their place.
        self.widget = ipywidgets.VBox([_row(on_all, self._choice), _row(on_pod)])

    def refresh(self) -> None:
        pods, chosen = self._pods(), self._chosen
        options = [(_named(pod), name) for name, pod in pods.items()]
        if options != list(self._choice.options):
            # New options reset the choice: restore it, also while its deployment is being replaced and has no pods.
            if chosen not in pods and (first := f"{self._owner().name}-0") in pods:
                chosen = first
            self._choice.options = options
            self._choice.value = chosen if chosen in pods else None
            self._chosen = chosen
        self._choice.tooltips = [repr(pod) for pod in pods.values()]
        for button in self.buttons:
            button.refresh()

    def _choose(self, change: dict[str, Any]) -> None:
        with self._lock:
            if change["new"] is not None:
                self._chosen = change["new"]
                for button in self.buttons:
                    button.refresh()

    def _pods(self) -> dict[str, Pod]:
        return {pod.name: pod for one in self._deployments() for pod in one.pods}

    def _owner(self) -> Deployment:
        """The deployment of the chosen pod."""
        return next(one for one in self._deployments() if one.name == self._chosen.rpartition("-")[0])

    def _on_pod(self, verb: str) -> Action:
        if (pod := self._pods().get(self._chosen)) is not None:
            return pod.action(verb)
        gone = f"There is no {self._chosen} now."
        return Action(f"{verb.capitalize()} {self._chosen}", gone, lambda: None, lambda: gone)

    def _scale(self, verb: str, by: int) -> Action:
        owner = self._owner()
        replicas = len(owner.pods) + by
        enough = "The last pod stays." if replicas < 1 else None
        return Action(f"{verb} {owner.name}", f"Scale to {replicas}.", partial(owner.scale, replicas), lambda: enough)


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
    """The log pane. Pods may print anything: control sequences are removed, all else is escaped."""
    shown = []
    for line in lines:
        text = _ANSI.sub("", line.rstrip("\n"))
        if len(text) > _LINE_LENGTH:
            text = f"{text[:_LINE_LENGTH]} … ({len(text) - _LINE_LENGTH:,} characters more)"
        shown.append(_NAMED.sub(r"\1<b>\2</b>", html.escape(text)))
    body = "\n".join(shown) or '<span style="opacity:.6">Output and tracebacks of pods appear here.</span>'
    return f'<div role="log" style="{_LOG_STYLE}"><pre style="{_PRE_STYLE}">{body}</pre></div>'


def _named(pod: Pod) -> str:
    state = pod.state
    return pod.name if state is PodState.RUNNING else f"{pod.name} · {state.value}"


def _row(buttons: Sequence[Button], *more: Any) -> Any:
    layout = ipywidgets.Layout(margin="0 0 0 40px", flex_flow="row wrap", align_items="center")
    return ipywidgets.HBox([*(button.widget for button in buttons), *more], layout=layout)
