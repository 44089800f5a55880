"""The retry console: what is blocked and by what, and the dead letters; every button has a method."""

from __future__ import annotations

import html
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count, islice, takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

import ipywidgets

from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic, short_name
from labkit.lab.board.buttons import Button
from labkit.lab.board.panels import Panel, blocked_panel, lag_panel, set_aside_panel
from labkit.lab.faults.target import Action
from labkit.lab.history import clock
from labkit.lab.pods.deployment import Deployment
from labkit.patterns.blocked_lanes import Blocked, BlockedLanes
from labkit.patterns.dead_letters import DeadLetter, DeadLetters
from labkit.patterns.retries import RetryingConsumer

if TYPE_CHECKING:
    import pandas as pd

    from labkit.lab.lab import Lab

REFRESH = 0.4  # seconds between two looks
SHOWN = 200  # entries in a list
CHARACTERS = 1000  # of a value that are shown

_Command: TypeAlias = Callable[[Sequence[str]], Action]
"""A button of a list; it gets the places that are chosen when it is clicked."""


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
        delays = self.consumer.retry.topics
        _, *own = self.consumer.own_topics(self.topic)
        self._retry_topics = {f"in {delay:g} s": topic for topic, delay in zip(own, delays, strict=True)}
        for topic in self.consumer.co_partitioned[self.topic.name][1 + len(own) :]:  # retry topics of an earlier policy
            self._retry_topics[f"in {topic.name.rpartition('-')[2]}, before"] = topic
        self._closed = threading.Event()
        lab.at_end(self.close)
        layout = ipywidgets.Layout(width="auto")
        self._sure = ipywidgets.Checkbox(description="I am sure", indent=False, layout=layout)
        self.unblock = _List(
            lambda many: f"What {self.name} cannot get past: {f'{many:,} blocked' if many else 'nothing'}",
            self.lanes,
            ipywidgets.Select(options=[], rows=4, layout=layout),
            _on_lanes(self.lanes),
        )
        """The widget of blocked lanes."""
        self.review = _List(
            lambda many: f"Dead letters of {self.name}: {many:,}",
            self.letters,
            ipywidgets.SelectMultiple(options=[], rows=6, layout=layout),
            _on_letters(self.letters, self._sure),
            [self._sure],
        )
        """The widget of dead letters."""
        self._sure.observe(lambda _: self.review.show(), "value")
        threading.Thread(target=self._refresh, name=f"console {self.name}", daemon=True).start()

    def blocked_for(self) -> float:
        """Seconds that the longest blocked lane has been blocked."""
        return max((time.time() - one.since for one in self.lanes.values()), default=0.0)

    def wait_blocked(self, timeout: float = 30.0) -> Blocked:
        """Wait until a lane is blocked; return the one that is blocked longest. Raises LabkitError."""
        found: list[Blocked] = []

        def blocked() -> bool:
            found[:] = self.lanes.values()
            return bool(found)

        self._lab.wait_until(blocked, f"{self.name} to be blocked", timeout)
        return found[0]

    @property
    def panels(self) -> list[Panel]:
        """For a board: lag; how long lanes have been blocked; what waits in each retry topic, and the dead letters."""
        retries = {label: partial(self._depth, topic) for label, topic in self._retry_topics.items()}
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
        except LabkitError as error:  # a repr must not fail
            return f"Retries of {self.name}: {error}"

    def _depth(self, topic: Topic[Any]) -> float:
        """How many records wait there, by the newest sample. It may have fewer partitions than its source."""
        figures = (self._lab.figure("lag", f"{topic.short}/{number}") for number in count())
        known = list(takewhile(math.isfinite, figures))
        return sum(known) if known else math.nan

    def _refresh(self) -> None:
        while not self._closed.wait(REFRESH):
            for widget in (self.unblock, self.review):
                try:
                    widget.refresh()
                except LabkitError as error:
                    widget.say(str(error))


class _List:
    """All entries of one kind, which of them are chosen, and buttons."""

    def __init__(
        self,
        title: Callable[[int], str],
        entries: Mapping[str, Any],
        choice: Any,
        commands: Sequence[_Command],
        more: Sequence[Any] = (),
    ) -> None:
        self._heading, self._entries, self._choice = title, entries, choice
        self._title, self._shows, self._says = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._choice.observe(lambda _: self.show(), "value")
        self._buttons = [
            Button(lambda of=command: of(self._chosen()), self.say)  # type: ignore[misc]
            for command in commands
        ]
        buttons = ipywidgets.HBox([*(button.widget for button in self._buttons), *more])
        self.widget = ipywidgets.VBox(
            [self._title, self._choice, self._shows, buttons, self._says], layout=ipywidgets.Layout(max_width="900px")
        )
        self.refresh()

    def refresh(self) -> None:
        """Show the present entries."""
        self._found = dict(islice(self._entries.items(), SHOWN))
        options = [(_line(one), place) for place, one in self._found.items()]
        if options != list(self._choice.options):
            kept = tuple(place for place in self._chosen() if place in self._found)
            self._choice.options = options  # this resets the choice
            if isinstance(self._choice, ipywidgets.SelectMultiple):
                self._choice.value = kept
            elif kept:
                self._choice.value = kept[0]
        self._title.value = f"<b>{html.escape(self._heading(len(self._entries)))}</b>"
        self.show()

    def show(self) -> None:
        """Show the chosen entries, and what can be done with them."""
        chosen = [self._found[place] for place in self._chosen() if place in self._found]
        self._shows.value = "".join(map(_details, chosen[:3]))
        for button in self._buttons:
            button.refresh()

    def say(self, text: str, failed: bool = False) -> None:
        """One line below the buttons."""
        self._says.value = f'<div role="status">{html.escape(text)}</div>'

    def _chosen(self) -> tuple[str, ...]:
        value = self._choice.value
        return value if isinstance(value, tuple) else (value,) if value else ()

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join([self._heading(len(self._entries)), *map(_line, self._entries.values())])


def _on_lanes(lanes: BlockedLanes) -> list[_Command]:
    def resume() -> str:
        lanes.resume()
        return again

    again = "The next failure blocks again."
    return [
        lambda chosen: Action(
            "Skip this record",
            "Once, only this one; it leaves a trace.",
            lambda: f"Skipped {short_name(lanes.skip(chosen[0]).place)}: it left a trace.",
            lambda: None if chosen else "Nothing is blocked.",
        ),
        lambda _: Action(
            "Skip all that fails",
            "From now on, until you resume.",
            lambda: f"Skipped {lanes.skip_all()}; whatever fails is skipped until you resume.",
            lambda: "All that fails is skipped already." if lanes.skipping else None,
        ),
        lambda _: Action("Resume", again, resume, lambda: None if lanes.skipping else "Failures block already."),
    ]


def _on_letters(letters: DeadLetters, sure: Any) -> list[_Command]:
    def put_back(*places: str) -> str:
        return f"{letters.replay(*places)} put back; each leaves once it is handled."

    def purge(*places: str) -> str:
        sure.value = False
        return f"{letters.purge(*places)} removed."

    none, select = "There are no dead letters.", "Select dead letters first."
    unsure = "Purging cannot be taken back: tick the box first."
    return [
        lambda chosen: Action(
            "Replay selected",
            "Put them back where their retries start.",
            partial(put_back, *chosen),
            lambda: None if chosen else select,
        ),
        lambda _: Action(
            "Replay all", "Each leaves the queue once it is handled.", put_back, lambda: None if letters else none
        ),
        lambda chosen: Action(
            "Purge selected",
            "Remove for good.",
            partial(purge, *chosen),
            lambda: select if not chosen else None if sure.value else unsure,
        ),
    ]


def _line(one: Blocked | DeadLetter) -> str:
    attempts = "1 attempt" if one.attempts == 1 else f"{one.attempts} attempts"
    if isinstance(one, Blocked):
        attempts = f"since {clock(one.since)} · {attempts}, next {clock(one.next_attempt)}"
    again = " · replay under way" if isinstance(one, DeadLetter) and one.replayed is not None else ""
    return f"{short_name(one.place)} · {one.key} · {attempts} · {one.error}{again}"


def _details(one: Blocked | DeadLetter) -> str:
    failed = ", ".join(map(clock, one.failed if isinstance(one, DeadLetter) else [one.since]))
    value = one.value and one.value[:CHARACTERS]
    rows = {"from": one.place, "key": one.key, "value": value, "failed at": failed, "last error": one.error}
    cells = (f"<tr><th>{name}</th><td><code>{html.escape(str(text))}</code></td></tr>" for name, text in rows.items())
    return f"<table>{''.join(cells)}</table>"
