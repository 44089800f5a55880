"""Buttons whose actions run in threads, so that a click does not block the kernel's other messages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import ipywidgets

from labkit.kafka.errors import safe_text
from labkit.lab.faults.target import Action

Say: TypeAlias = Callable[[str, bool], None]
"""Receives a click's result: the text that its action returned, or why it failed; and whether it failed."""


class Button:
    """A button. It is disabled while its action runs, and while the action makes no sense; then its tooltip says why.

    `action` is called at every click and `refresh`, because it may depend on what is chosen beside it.
    """

    def __init__(self, action: Callable[[], Action], say: Say) -> None:
        self._action, self._say = action, say
        self._busy, self._closed = False, ""
        self._lock = threading.RLock()  # frames, clicks and finished actions come from different threads
        self.widget = ipywidgets.Button(layout=ipywidgets.Layout(width="auto"))
        self.widget.on_click(lambda _: self._click())

    def refresh(self) -> None:
        """Show the present action, and whether it may be done."""
        with self._lock:
            action = self._action()
            why_not = self._closed or ("Under way …" if self._busy else action.available())
            self.widget.description = action.label
            self.widget.tooltip = why_not or action.tooltip
            self.widget.disabled = why_not is not None

    def close(self, why: str) -> None:
        """Disable it for good."""
        with self._lock:
            self._closed = why
            self.refresh()

    def _click(self) -> None:
        with self._lock:
            if self._closed or self._busy:
                return
            action, self._busy = self._action(), True
            self.refresh()
        threading.Thread(target=self._run, args=(action,), name=f"button: {action.label}", daemon=True).start()

    def _run(self, action: Action) -> None:
        try:
            why_not = action.available()  # the browser may show an old state
            answer = why_not or action.run()
            said, failed = answer if isinstance(answer, str) else "", why_not is not None
        except Exception as error:
            said, failed = f"{action.label}: {one_line(error)}", True
        with self._lock:
            self._busy = False
        self._say(said, failed)
        self.refresh()


def one_line(error: Exception) -> str:
    return " ".join(safe_text(error).split()) or type(error).__name__
