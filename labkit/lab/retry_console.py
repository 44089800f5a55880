"""The retry console: what is blocked and by what, and the dead letters; every button has a method."""

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
from labkit.lab.buttons import Button, set_trait
from labkit.lab.deployment import Deployment
from labkit.lab.faults import Action
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


_SELECT = "Select dead letters first."


class RetryConsole:
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
        threading.Thread(target=self._refresh, name=f"console {self.name}", daemon=True).start()

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


class _Part:
    """A list, what is chosen of it, and buttons. Actions run in threads: a click holds nothing up."""

    def __init__(self, title: str) -> None:
        self._title = ipywidgets.HTML(f"<b>{html.escape(title)}</b>")
        self._says = ipywidgets.HTML()
        self._shows = ipywidgets.HTML()

    def row(self, *actions: Callable[[], Action]) -> list[Any]:
        """A button for each of these."""
        self._buttons = [Button(action, self.say) for action in actions]
        for button in self._buttons:
            button.refresh()
        return [button.widget for button in self._buttons]

    def refresh(self) -> None:
        """Show what there is now."""
        for button in self._buttons:
            button.refresh()

    def say(self, text: str, failed: bool = False) -> None:
        """One line below the buttons."""
        set_trait(self._says, "value", f'<div role="status">{html.escape(text)}</div>')


class _Unblock(_Part):
    """Blocked lanes, and the commands about them."""

    def __init__(self, console: RetryConsole) -> None:
        super().__init__(f"What {console.name} cannot get past")
        self._name, self._lanes = console.name, console.lanes
        self._choice = ipywidgets.Select(options=[], rows=4, layout=ipywidgets.Layout(width="auto"))
        buttons = self.row(self._skip, self._skip_all, self._resume)
        self.widget = ipywidgets.VBox(
            [self._title, self._choice, ipywidgets.HBox(buttons), self._says],
            layout=ipywidgets.Layout(max_width="900px"),
        )

    def refresh(self) -> None:
        """Show what is blocked now."""
        options = [(_line(one), place) for place, one in self._lanes.items()]
        if options != list(self._choice.options):
            before = self._choice.value
            self._choice.options = options
            if any(place == before for _, place in options):
                self._choice.value = before
        many = f"{len(options):,} blocked" if options else "nothing"
        set_trait(self._title, "value", f"<b>What {html.escape(self._name)} cannot get past: {many}</b>")
        super().refresh()

    def _skip(self) -> Action:
        chosen = self._choice.value
        return Action(
            "Skip this record",
            "Once, only this one; it leaves a trace.",
            lambda: f"Skipped {short_name(self._lanes.skip(chosen).place)}: it left a trace.",
            lambda: None if chosen else "Nothing is blocked.",
        )

    def _skip_all(self) -> Action:
        return Action(
            "Skip all that fails",
            "From now on, until you resume.",
            lambda: f"Skipped {self._lanes.skip_all()}; whatever fails is skipped until you resume.",
            lambda: "All that fails is skipped already." if self._lanes.skipping else None,
        )

    def _resume(self) -> Action:
        def resume() -> str:
            self._lanes.resume()
            return about

        about = "The next failure blocks again."
        return Action("Resume", about, resume, lambda: None if self._lanes.skipping else "Failures block already.")

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join(map(_line, self._lanes.values())) or "Nothing is blocked."


class _Review(_Part):
    """Dead letters: look at them, put them back, or remove them."""

    def __init__(self, console: RetryConsole) -> None:
        super().__init__(f"Dead letters of {console.name}")
        self._name, self._letters = console.name, console.letters
        self._choice = ipywidgets.SelectMultiple(options=[], rows=6, layout=ipywidgets.Layout(width="auto"))
        self._sure = ipywidgets.Checkbox(description="I am sure", indent=False, layout=ipywidgets.Layout(width="auto"))
        self._choice.observe(lambda _: self._show(), "value")
        self._sure.observe(lambda _: super(_Review, self).refresh(), "value")
        buttons = self.row(self._replay, self._replay_all, self._purge)
        self.widget = ipywidgets.VBox(
            [self._title, self._choice, self._shows, ipywidgets.HBox([*buttons, self._sure]), self._says],
            layout=ipywidgets.Layout(max_width="900px"),
        )

    def refresh(self) -> None:
        """Show what is in the queue now."""
        found = list(self._letters.items())[:SHOWN]
        options = [(_letter_line(letter), place) for place, letter in found]
        if options != list(self._choice.options):
            before = self._choice.value
            self._choice.options = options
            self._choice.value = tuple(place for place in before if place in dict(found))
        set_trait(
            self._title,
            "value",
            f"<b>Dead letters of {html.escape(self._name)}: {len(self._letters):,}</b>",
        )
        super().refresh()

    def _show(self) -> None:
        letters = [self._letters.get(place) for place in self._choice.value]
        set_trait(self._shows, "value", "".join(_letter_html(one) for one in letters[:3] if one is not None))
        super().refresh()

    def _replay(self) -> Action:
        chosen = self._choice.value
        return Action(
            "Replay selected",
            "Put them back where their retries start.",
            lambda: f"{self._letters.replay(*chosen)} put back; each leaves once it is handled.",
            lambda: None if chosen else _SELECT,
        )

    def _replay_all(self) -> Action:
        return Action(
            "Replay all",
            "Each leaves the queue once it is handled.",
            lambda: f"{self._letters.replay()} put back; each leaves once it is handled.",
            lambda: None if self._letters else "There are no dead letters.",
        )

    def _purge(self) -> Action:
        chosen = self._choice.value

        def purge() -> str:
            self._sure.value = False
            return f"{self._letters.purge(*chosen)} removed."

        unsure = None if self._sure.value else "Purging cannot be taken back: tick the box first."
        return Action("Purge selected", "Remove for good.", purge, lambda: unsure if chosen else _SELECT)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join(map(_letter_line, self._letters.values())) or "No dead letters."


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
