"""What a learner fills in and asks for: predictions, exercises, hints and solutions.

None of them raises because of what a learner did or left out, and each reads as plain text where no widget is drawn.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets

from labkit.kafka.errors import error_text
from labkit.lab.results import tell
from labkit.runtime.home import BROUGHT

_OK, _MISSING = "#00835F", "#B84F00"


@dataclass(frozen=True, repr=False)
class Shown:
    """A text, and how a notebook draws it. True for an exercise that is filled in, and right."""

    text: str
    as_html: str
    ok: bool = False

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.as_html


# -- Predict ---------------------------------------------------------------------------------------------------------


class Prediction:
    """A question asked before a fault, and the learner's guess."""

    def __init__(self, question: str, options: Sequence[str]) -> None:
        if len(options) < 2:
            raise ValueError(f"a prediction needs two options or more: {question!r}")
        self.question, self.options = question, tuple(options)
        self._radio = ipywidgets.RadioButtons(
            options=self.options,
            index=None,
            layout=ipywidgets.Layout(width="max-content", margin="0 0 0 12px"),
        )
        self._noted = ipywidgets.HTML()
        self._radio.observe(self._note, "value")
        asked = ipywidgets.HTML(f"<b>Predict.</b> {html.escape(question)}")
        self.widget = ipywidgets.VBox([asked, self._radio, self._noted])

    @property
    def guess(self) -> str | None:
        """The option chosen, or None so far."""
        guess: str | None = self._radio.value
        return guess

    def repeat(self, happened: str) -> str:
        """The guess beside what happened, for a verdict to print."""
        guessed = f"you guessed: {self.guess}" if self.guess is not None else "you made no guess"
        return f"{guessed}; what happened: {happened}"

    def _note(self, change: dict[str, Any]) -> None:
        # Not whether it is right: the fault says that.
        self._noted.value = "" if change["new"] is None else "Noted. Now see what happens."

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {**self.widget._repr_mimebundle_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        # The same whatever was chosen: saved notebooks must not differ from learner to learner.
        return "\n".join([f"Predict. {self.question}", *(f"  ( ) {option}" for option in self.options)])


def predict(question: str, options: Sequence[str]) -> Prediction:
    """Ask before the fault. No option is chosen at first; `.guess` is the choice, `.repeat(…)` goes into the verdict.

    Raises ValueError for fewer than two options.
    """
    return Prediction(question, options)


# -- Exercise --------------------------------------------------------------------------------------------------------


def exercise(task: str, check: Callable[..., object] | None = None, **answers: object) -> Shown:
    """Say what is still missing of an exercise; never raises.

    An answer counts as missing while it is `...`, holds one, or is a function with nothing but one in it. When all are
    there, `check(**answers)` may judge them: None or True is right, False wrong, a text says what is wrong.
    """
    missing = [name for name, answer in answers.items() if _unfilled(answer)]
    if missing:
        names = ", ".join(f"<code>{html.escape(name)}</code>" for name in missing)
        return _exercise(task, "open", f"Still to fill in: {', '.join(missing)}.", f"Still to fill in: {names}.")
    try:
        result = True if check is None else check(**answers)
        if result is None or result is True:
            return _exercise(task, "done", "Done.", "Done.")
        wrong = str(result) if result else "this is not what was asked for."
    except Exception as error:
        wrong = error_text(error)
    return _exercise(task, "not yet", f"Not yet: {wrong}", f"Not yet: {html.escape(wrong)}")


def _exercise(task: str, result: str, state: str, as_html: str) -> Shown:
    tell("exercise", result)  # and nothing else: what is wrong may quote the answer
    ok = result == "done"
    colour = _OK if ok else _MISSING
    return Shown(
        f"Exercise: {task} {state}",
        f'<div style="border-left:3px solid {colour};padding:2px 10px"><b>Exercise.</b> '
        f'{html.escape(task)} <span style="color:{colour}">{as_html}</span></div>',
        ok,
    )


def _blank(*_: object) -> object: ...


def _blank_documented(*_: object) -> object:
    """Nothing but this line."""


_EMPTY_BODIES = {f.__code__.co_code for f in (_blank, _blank_documented)}


def _unfilled(answer: object) -> bool:
    if answer is ...:
        return True
    if isinstance(answer, dict):
        return any(_unfilled(value) for value in answer.values())
    if isinstance(answer, list | tuple | set | frozenset):
        return any(_unfilled(value) for value in answer)
    code = getattr(answer, "__code__", None)
    return code is not None and code.co_code in _EMPTY_BODIES


# -- Hint and solution -----------------------------------------------------------------------------------------------


def hint(text: str) -> Shown:
    """A hint that stays folded until it is clicked. `code` in backticks is set as code, which is all a hint needs."""
    as_html = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)).replace("\n", "<br>")
    return Shown(f"Hint: {text}", f"<details><summary>Hint</summary><p>{as_html}</p></details>")


_CELL = re.compile(r"^# %% *(\S+) *$", re.MULTILINE)


def read_solutions(path: Path) -> dict[str, str]:
    """Cell id → source of one solutions file, in which a line `# %% <cell id>` stands above each cell."""
    parts = _CELL.split(path.read_text(encoding="utf-8"))
    # Split by one group: text before the first cell, then id and source in turn.
    return {parts[i]: parts[i + 1].strip("\n") for i in range(1, len(parts), 2)}


def solution(cell_id: str) -> Shown:
    """Show the solution of an exercise. Never raises: what is missing is said in place.

    Solutions are in `notebooks/solutions/<notebook>.py`, looked for from the working folder upwards, then in labkit.
    """
    folder = _solutions_folder(Path.cwd())
    if folder is None:
        return _no_solution(
            f"No folder notebooks/solutions here, above {Path.cwd().name}, or in labkit: is this a full clone?"
        )
    # The server says which notebook this is; where it does not, the cell's id alone has to do.
    notebook = Path(os.environ.get("JPY_SESSION_NAME", "")).stem
    files = sorted(folder.glob("*.py"), key=lambda file: (file.stem != notebook, file.name))
    known: list[str] = []
    for file in files:
        try:
            cells = read_solutions(file)
        except (OSError, UnicodeDecodeError) as error:
            return _no_solution(f"notebooks/solutions/{file.name} cannot be read: {error}")
        if cell_id in cells:
            # Folded: "run all cells" must not give it away.
            source = html.escape(cells[cell_id])
            return Shown(cells[cell_id], f"<details><summary>Solution</summary><pre>{source}</pre></details>")
        known += cells
    listed = ", ".join(known) if known else "none"
    return _no_solution(f"No solution with the cell id {cell_id!r}. There are: {listed}.")


def _no_solution(why: str) -> Shown:
    return Shown(why, f"<p>{html.escape(why)}</p>")


def _solutions_folder(start: Path) -> Path | None:
    for folder in (start, *start.parents):
        for candidate in (folder / "solutions", folder / "notebooks" / "solutions"):
            if candidate.is_dir():
                return candidate
    return BROUGHT / "solutions" if (BROUGHT / "solutions").is_dir() else None
