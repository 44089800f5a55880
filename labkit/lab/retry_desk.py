"""The desk of who looks after retries: what is blocked and by what, and the dead letters; every button has a method."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets

from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import lag
from labkit.kafka.topics import short_name
from labkit.lab.deployment import Deployment
from labkit.lab.metrics import clock
from labkit.lab.panels import Panel, blocked_panel, lag_panel, set_aside_panel
from labkit.patterns.blocked_lanes import Blocked, BlockedLanes
from labkit.patterns.dead_letters import DeadLetter, DeadLetters
from labkit.patterns.retries import RetryingConsumer

if TYPE_CHECKING:
    import pandas as pd

    from labkit.lab.lab import Lab

REFRESH = 0.4  # seconds between two looks
SHOWN = 200  # dead letters in the list
CHARACTERS = 1000  # of a value that are shown


class RetryDesk:
    """Sees and commands the retries of one deployment, as the command line does from another machine.

    `lanes` are its blocked lanes, `letters` its dead letters; `panels` go on a board. It ends with the lab.
    Raises LabkitError for a deployment without retries.
    """

    _stays_in_the_notebook = "a handler raises; what becomes of its record is decided by the policy"

    def __init__(self, lab: Lab, deployment: Deployment) -> None:
        if not isinstance(deployment.runnable, RetryingConsumer):
            raise LabkitError(f"{deployment.name} has no retries: deploy a RetryingConsumer(…, retry=…)")
        self._lab, self.name = lab, deployment.name
        self.consumer = deployment.runnable
        self.topic = self.consumer.mains[0]
        self.lanes = BlockedLanes(self.topic, self.consumer.group)
        self.letters = DeadLetters(self.topic, self.consumer.group)
        delays = self.consumer.policy(self.topic).topics
        _, *own = self.consumer.own_topics(self.topic)
        self._retry_topics = {topic.name: f"in {delay:g} s" for topic, delay in zip(own, delays, strict=True)}
        for topic in self.consumer.co_partitioned[self.topic.name][1 + len(own) :]:  # of an earlier policy
            self._retry_topics[topic.name] = f"in {topic.name.rpartition('-')[2]}, before"
        self._depths: dict[str, int] = {}
        self._looked = 0.0
        self._closed = threading.Event()
        lab.at_end(self.close)
        self.unblock = _Unblock(self)
        """The widget of blocked lanes."""
        self.review = _Review(self)
        """The widget of dead letters."""
        threading.Thread(target=self._refresh, name=f"desk {self.name}", daemon=True).start()

    def blocked_for(self) -> float:
        """Seconds that the longest blocked lane has been blocked."""
        return max((time.time() - one.since for one in self.lanes.values()), default=0.0)

    def wait_blocked(self, timeout: float = 30.0) -> Blocked:
        """Wait until something is blocked; that which has been longest. Raises TimeoutError."""
        until = time.monotonic() + timeout
        while not (found := list(self.lanes.values())):
            if time.monotonic() > until:
                raise TimeoutError(f"nothing of {self.name} is blocked after {timeout:g} s")
            time.sleep(0.02)  # between two looks into memory
        return found[0]

    @property
    def panels(self) -> list[Panel]:
        """For a board: lag; how long lanes have been blocked; what waits in each retry topic, and the dead letters."""
        retries = {label: partial(self._depth, name) for name, label in self._retry_topics.items()}
        return [
            lag_panel([self.topic.short]),
            blocked_panel(self.name, lambda: len(self.lanes), self.blocked_for),
            set_aside_panel(self.name, retries, lambda: len(self.letters)),
        ]

    def table(self) -> pd.DataFrame:
        """The dead letters as a table: place, key, value, attempts, error, and when it came and was replayed (UTC)."""
        import pandas as pd

        rows = [
            (short_name(one.place), one.key, one.value, one.attempts, one.error, one.at, one.replayed)
            for one in self.letters.values()
        ]
        frame = pd.DataFrame(rows, columns=["place", "key", "value", "attempts", "error", "time", "replayed"])
        for column in ("time", "replayed"):
            frame[column] = pd.to_datetime(frame[column].astype("float64"), unit="s").dt.round("ms")
        return frame

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self.lanes.close()
        self.letters.close()

    def __repr__(self) -> str:
        try:
            return f"Retries of {self.name}: {len(self.lanes):,} blocked · {len(self.letters):,} dead letters"
        except LabkitError as error:  # the end of a cell is no place to fail
            return f"Retries of {self.name}: {error}"

    def _repr_html_(self) -> str:
        return f"<span>{html.escape(repr(self))}</span>"

    def _depth(self, name: str) -> float:
        if time.monotonic() - self._looked > 0.1:  # all of them at once
            found = lag(self._lab.cluster, self.consumer.group, list(self._retry_topics))
            self._depths = {}
            for (topic, _), count in found.items():
                self._depths[topic] = self._depths.get(topic, 0) + count
            self._looked = time.monotonic()
        return self._depths.get(name, 0)

    def _refresh(self) -> None:
        while not self._closed.wait(REFRESH):
            for widget in (self.unblock, self.review):
                try:
                    widget.refresh()
                except LabkitError as error:
                    widget.say(str(error))


class _Desk:
    """A list, what is chosen of it, and buttons. Actions run in threads: a click holds nothing up."""

    def __init__(self, title: str) -> None:
        self._title = ipywidgets.HTML(f"<b>{html.escape(title)}</b>")
        self._says = ipywidgets.HTML()
        self._shows = ipywidgets.HTML()

    def button(self, label: str, tooltip: str, action: Callable[[], str]) -> Any:
        made = ipywidgets.Button(description=label, tooltip=tooltip, layout=ipywidgets.Layout(width="auto"))

        def run() -> None:
            try:
                self.say(action())
            except LabkitError as error:
                self.say(str(error))
            finally:
                made.disabled = False

        def clicked(_: object) -> None:
            made.disabled = True
            threading.Thread(target=run, name=label, daemon=True).start()

        made.on_click(clicked)
        return made

    def say(self, text: str) -> None:
        """One line below the buttons."""
        _set(self._says, f'<div role="status">{html.escape(text)}</div>')


class _Unblock(_Desk):
    """Blocked lanes, and the commands about them."""

    def __init__(self, desk: RetryDesk) -> None:
        super().__init__(f"What {desk.name} cannot get past")
        self._desk = desk
        self._choice = ipywidgets.Select(options=[], rows=4, layout=ipywidgets.Layout(width="auto"))
        buttons = [
            self.button("Skip this record", "Once, only this one; it leaves a trace.", self._skip),
            self.button("Skip all that fails", "From now on, until you resume.", self._skip_all),
            self.button("Resume", "The next failure blocks again.", self._resume),
        ]
        self.widget = ipywidgets.VBox(
            [self._title, self._choice, ipywidgets.HBox(buttons), self._says],
            layout=ipywidgets.Layout(max_width="900px"),
        )

    def refresh(self) -> None:
        """Show what is blocked now."""
        options = [(_line(one), place) for place, one in self._desk.lanes.items()]
        if options != list(self._choice.options):
            before = self._choice.value
            self._choice.options = options
            if any(place == before for _, place in options):
                self._choice.value = before
        many = f"{len(options):,} blocked" if options else "nothing"
        _set(self._title, f"<b>What {html.escape(self._desk.name)} cannot get past: {many}</b>")

    def _skip(self) -> str:
        if self._choice.value is None:
            return "Nothing is blocked."
        one = self._desk.lanes.skip(self._choice.value)
        return f"Skipped {short_name(one.place)}: it left a trace."

    def _skip_all(self) -> str:
        return f"Skipped {self._desk.lanes.skip_all()}; whatever fails is skipped until you resume."

    def _resume(self) -> str:
        self._desk.lanes.resume()
        return "The next failure blocks again."

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join(map(_line, self._desk.lanes.values())) or "Nothing is blocked."


class _Review(_Desk):
    """Dead letters: look at them, put them back, or remove them."""

    def __init__(self, desk: RetryDesk) -> None:
        super().__init__(f"Dead letters of {desk.name}")
        self._desk = desk
        self._choice = ipywidgets.SelectMultiple(options=[], rows=6, layout=ipywidgets.Layout(width="auto"))
        self._choice.observe(lambda _: self._show(), "value")
        self._sure = ipywidgets.Checkbox(description="I am sure", indent=False, layout=ipywidgets.Layout(width="auto"))
        buttons = [
            self.button("Replay selected", "Put them back where their retries start.", self._replay),
            self.button("Replay all", "Each leaves the queue once it is handled.", self._replay_all),
            self.button("Purge selected", "Remove for good; tick the box first.", self._purge),
        ]
        self.widget = ipywidgets.VBox(
            [self._title, self._choice, self._shows, ipywidgets.HBox([*buttons, self._sure]), self._says],
            layout=ipywidgets.Layout(max_width="900px"),
        )

    def refresh(self) -> None:
        """Show what is in the queue now."""
        found = list(self._desk.letters.items())[:SHOWN]
        options = [(_letter_line(letter), place) for place, letter in found]
        if options != list(self._choice.options):
            before = self._choice.value
            self._choice.options = options
            self._choice.value = tuple(place for place in before if place in dict(found))
        _set(self._title, f"<b>Dead letters of {html.escape(self._desk.name)}: {len(self._desk.letters):,}</b>")

    def _show(self) -> None:
        letters = [self._desk.letters.get(place) for place in self._choice.value]
        _set(self._shows, "".join(_letter_html(one) for one in letters[:3] if one is not None))

    def _replay(self) -> str:
        if not self._choice.value:
            return "Select dead letters first."
        return f"{self._desk.letters.replay(*self._choice.value)} put back; each leaves once it is handled."

    def _replay_all(self) -> str:
        return f"{self._desk.letters.replay()} put back; each leaves once it is handled."

    def _purge(self) -> str:
        if not self._choice.value:
            return "Select dead letters first."
        if not self._sure.value:
            return "Purging cannot be taken back: tick the box first."
        self._sure.value = False
        return f"{self._desk.letters.purge(*self._choice.value)} removed."

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join(map(_letter_line, self._desk.letters.values())) or "No dead letters."


def _line(one: Blocked) -> str:
    since, again = (clock(at) for at in (one.since, one.next_attempt))
    attempts = "1 attempt" if one.attempts == 1 else f"{one.attempts} attempts"
    return f"{short_name(one.place)} · {one.key} · since {since} · {attempts}, next {again} · {one.error}"


def _letter_line(one: DeadLetter) -> str:
    again = "" if one.replayed is None else " · replay under way"
    return f"{short_name(one.place)} · {one.key} · {one.attempts} attempts · {one.error}{again}"


def _letter_html(one: DeadLetter) -> str:
    failed = ", ".join(clock(at) for at in one.failed)
    value = one.value and one.value[:CHARACTERS]
    rows = {"from": one.place, "key": one.key, "value": value, "failed at": failed, "last error": one.error}
    cells = (f"<tr><th>{name}</th><td><code>{html.escape(str(text))}</code></td></tr>" for name, text in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _set(widget: Any, value: str) -> None:
    if widget.value != value:
        widget.value = value
