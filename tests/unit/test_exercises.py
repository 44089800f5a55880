"""What a learner fills in: none of it raises, all of it reads as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.lab.exercises import exercise, hint, predict, read_solutions, solution

OPTIONS = ["lost", "handled twice", "wait"]


def test_a_prediction_has_no_default_and_is_repeated() -> None:
    asked = predict("What happens to <them>?", OPTIONS)
    assert asked.guess is None
    assert asked.repeat("handled twice") == "you made no guess; what happened: handled twice"
    plain = repr(asked)
    asked._radio.value = "lost"
    assert asked.guess == "lost"
    assert asked.repeat("none lost, 3 twice") == "you guessed: lost; what happened: none lost, 3 twice"
    assert repr(asked) == plain, "the saved text must not depend on the guess"
    bundle = asked._repr_mimebundle_()
    assert bundle["text/plain"] == plain
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "&lt;them&gt;" in asked.widget.children[0].value


def test_an_author_of_a_prediction_is_told_of_mistakes() -> None:
    with pytest.raises(ValueError, match="two options"):
        predict("Which?", ["one"])


def _todo(record: object) -> object: ...


def _documented(record: object) -> object:
    """What to do."""


def _done(record: object) -> object:
    return record


@pytest.mark.parametrize("answer", [..., [1, ...], {"delay": ...}, (1, (2, ...)), _todo, _documented])
def test_an_unfilled_exercise_says_what_is_missing(answer: object) -> None:
    state = exercise("Choose a delay.", delay=answer, times=3)
    assert not state
    assert repr(state) == "Exercise: Choose a delay. Still to fill in: delay."
    assert "<code>delay</code>" in state._repr_html_()


@pytest.mark.parametrize("answer", [0, None, "", [1], _done, print])
def test_anything_else_is_an_answer(answer: object) -> None:
    assert exercise("Choose.", answer=answer)


def test_a_check_judges_and_its_own_failure_is_shown() -> None:
    assert exercise("Choose.", lambda delay: delay > 0, delay=1)
    assert exercise("Choose.", lambda delay: None, delay=1)
    low = exercise("Choose.", lambda delay: delay > 0 or "it must be <above> 0.", delay=0)
    assert not low
    assert "it must be <above> 0." in repr(low)
    assert "&lt;above&gt;" in low._repr_html_()
    assert "not what was asked" in repr(exercise("Choose.", lambda delay: delay > 0, delay=0))
    assert "TypeError" in repr(exercise("Choose.", lambda delay: delay > 0, delay="soon"))
    unjudged = exercise("Choose.", lambda delay: 1 / 0, delay=...)
    assert repr(unjudged) == "Exercise: Choose. Still to fill in: delay."


class Untold:
    """As an array of numbers, which is neither true nor false."""

    def __bool__(self) -> bool:
        raise ValueError("some of it")


class Unshown:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("judged", [Untold(), Unshown()])
def test_a_check_may_return_anything(judged: object) -> None:
    state = exercise("Choose.", lambda delay: judged, delay=1)
    assert not state
    assert "Not yet: " in repr(state)


def test_a_hint_is_folded_and_plain() -> None:
    folded = hint("Try `blocking(0.1)` & <wait>.")
    assert folded._repr_html_().startswith("<details><summary>Hint")
    assert "<code>blocking(0.1)</code> &amp; &lt;wait&gt;" in folded._repr_html_()
    assert repr(folded) == "Hint: Try `blocking(0.1)` & <wait>."


SOLVED = """# Solutions of notebook 00.

# %% delay
delay = 0.1

# %% handler

def handle(record):
    return record
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "notebooks" / "solutions").mkdir(parents=True)
    (tmp_path / "notebooks" / "solutions" / "00_start_here.py").write_text(SOLVED)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return tmp_path


def test_solutions_are_found_from_a_folder_of_copies(clone: Path) -> None:
    assert repr(solution("delay")) == "delay = 0.1"
    assert repr(solution("handler")) == "def handle(record):\n    return record"
    assert solution("handler")._repr_html_().startswith("<details><summary>Solution</summary><pre>def handle")


def test_solutions_are_found_beside_the_notebook(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone / "notebooks")
    assert repr(solution("delay")) == "delay = 0.1"


def test_the_notebook_that_asks_comes_first(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clone / "notebooks" / "solutions" / "04_retry.py").write_text("# %% delay\ndelay = 60\n")
    assert repr(solution("delay")) == "delay = 0.1"
    monkeypatch.setenv("JPY_SESSION_NAME", "work/04_retry.ipynb")
    assert repr(solution("delay")) == "delay = 60"


def test_a_missing_solution_is_said_not_raised(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repr(solution("other")) == "No solution with the cell id 'other'. There are: delay, handler."
    (clone / "notebooks" / "solutions" / "00_start_here.py").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in repr(solution("delay"))
    (clone / "notebooks" / "solutions" / "00_start_here.py").unlink()
    assert "There are: none." in repr(solution("delay"))
    (clone / "notebooks" / "solutions").rmdir()
    assert "No folder notebooks/solutions" in repr(solution("delay"))


def test_without_a_clone_the_solutions_are_those_that_labkit_brings(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = (clone / "notebooks").rename(clone / "brought")
    monkeypatch.setattr("labkit.lab.exercises.BROUGHT", brought)
    assert repr(solution("delay")) == "delay = 0.1"


def test_a_solutions_file_is_read_by_cell(clone: Path) -> None:
    cells = read_solutions(clone / "notebooks" / "solutions" / "00_start_here.py")
    assert list(cells) == ["delay", "handler"]
