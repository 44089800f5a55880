"""Every notebook passes every lint; and every lint can fail."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lints
import pytest
from outputs import PICTURE, PICTURE_BYTES

from labkit.cli.lab import ROOT
from labkit.lab.exercises import read_solutions

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def solutions_of(path: Path) -> dict[str, str]:
    file = path.parent / "solutions" / f"{path.stem}.py"
    return read_solutions(file) if file.exists() else {}


@pytest.mark.parametrize("lint", lints.LINTS, ids=lambda lint: lint.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, lint: lints.Lint) -> None:
    notebook = json.loads(path.read_text())
    assert list(lint(notebook, solutions_of(path))) == []


def test_there_are_notebooks_and_every_solutions_file_belongs_to_one() -> None:
    assert NOTEBOOKS
    solved = {path.stem for path in (ROOT / "notebooks" / "solutions").glob("*.py")}
    assert solved <= {path.stem for path in NOTEBOOKS}


def picture(size: int) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": {PICTURE: base64.b64encode(b"x" * size).decode()}}


GOOD: dict[str, Any] = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {"kernelspec": {"name": "python3"}},
    "cells": [
        {
            "cell_type": "markdown",
            "id": "title",
            "metadata": {},
            "source": "# Title\n\n/lab/tree and https://a.b/tmp/x",
        },
        {
            "cell_type": "code",
            "id": "setup",
            "metadata": {},
            "execution_count": 1,
            "source": "# This much is allowed.\n\n" + "a = b = c = d = e = f = g = h = i = j = k = l = 1\n" * 15,
            "outputs": [],
        },
        {
            "cell_type": "code",
            "id": "verdict",
            "metadata": {"tags": ["verdict"]},
            "execution_count": 2,
            "source": "# NBVAL_CHECK_OUTPUT\nprint(verdict.check())  # why? 10 % 3 != 2",
            "outputs": [{"output_type": "stream", "name": "stdout", "text": "lost 0\n"}],
        },
        {
            "cell_type": "code",
            "id": "snapshot",
            "metadata": {},
            "execution_count": 3,
            "source": "board.snapshot()",
            "outputs": [picture(PICTURE_BYTES)],
        },
        {
            "cell_type": "code",
            "id": "most",
            "metadata": {},
            "execution_count": 4,
            "source": "most = ...\nexercise(most=most)",
            "outputs": [],
        },
    ],
}
SOLUTIONS = {"most": "most = 4"}
SETUP, VERDICT, SNAPSHOT, MOST = 1, 2, 3, 4
THIRTEEN = "import a, b, c.d\nfrom e import f as g, h\ni, *j = k = 1, 2\nwith open(x) as m: n = o = p = q = 1\n"


def change(number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda notebook: notebook["cells"][number].update(values)


def source(text: str) -> Callable[[dict[str, Any]], None]:
    return change(SNAPSHOT, source=text)


BAD: list[tuple[lints.Lint, str, Callable[[dict[str, Any]], Any]]] = [
    (lints.kernel, "'conda'", lambda notebook: notebook["metadata"]["kernelspec"].update(name="conda")),
    (lints.kernel, "None", lambda notebook: notebook["metadata"].clear()),
    (lints.cell_ids, "has no id", lambda notebook: notebook["cells"][0].pop("id")),
    (lints.cell_ids, "two cells", change(0, id="most")),
    (lints.verdicts, "no cell is marked", change(VERDICT, source="print(1)")),
    (lints.verdicts, "no execution count", change(VERDICT, execution_count=None)),
    (lints.verdicts, "no output", change(VERDICT, outputs=[])),
    (lints.verdicts_assert, "asserts nothing", change(VERDICT, source="# NBVAL_CHECK_OUTPUT\nprint(verdict)")),
    (lints.bare_outputs, "widget state", lambda notebook: notebook["metadata"].update(widgets={})),
    (lints.bare_outputs, "'execution'", change(MOST, metadata={"execution": {"iopub.execute_input": "2026"}})),
    (lints.bare_outputs, "no verdict", change(MOST, outputs=[{"output_type": "stream", "text": "at 12:01"}])),
    (lints.bare_outputs, "an error", change(MOST, outputs=[{"output_type": "error", "ename": "KeyError"}])),
    (
        lints.bare_outputs,
        "widget view",
        change(VERDICT, outputs=[{"output_type": "display_data", "data": {f"{lints.WIDGETS}-view+json": {}}}]),
    ),
    (lints.one_picture, "2 pictures", change(MOST, outputs=[picture(10)])),
    (lints.one_picture, "40,001 bytes", change(SNAPSHOT, outputs=[picture(PICTURE_BYTES + 1)])),
    (lints.short_cells, "a line of 121 characters", source("x = '" + 115 * "a" + "'")),
    (lints.short_cells, "16 lines", source("# why\n\n" + "x = 1\n" * 16)),
    (lints.few_names, "no code cell setup", change(SETUP, id="beginning")),
    (lints.few_names, "13 names", change(SETUP, source=THIRTEEN)),
    (lints.plain_python, "!exit 3", source("!exit 3")),
    (lints.plain_python, "%timeit", source("x = 1\n%timeit x")),
    (lints.plain_python, "%%bash", source("%%bash\nls")),
    (lints.plain_python, "!ls", source("files = !ls")),
    (lints.plain_python, "lab?", source("lab?")),
    (lints.plain_python, "not plain Python", source("def")),
    (lints.plain_outputs, "uses clear_output", source("from IPython.display import clear_output")),
    (lints.plain_outputs, "uses Output(", source("ipywidgets.Output()")),
    (lints.plain_outputs, "uses pyplot", source("import matplotlib.pyplot as plt")),
    (lints.no_machine_paths, "/home/ada", source('open("/home/ada/x")')),
    (lints.no_machine_paths, "/tmp/run7", change(VERDICT, outputs=[{"output_type": "stream", "text": "in /tmp/run7"}])),
    (lints.exercises_have_solutions, "no solution", change(MOST, id="other")),
    (lints.exercises_have_solutions, "belongs to no exercise", change(MOST, source="most = 4")),
    (
        lints.exercises_may_stay_unsolved,
        "cell later uses most",
        lambda notebook: notebook["cells"].append({"cell_type": "code", "id": "later", "source": "print(most + 1)"}),
    ),
]


@pytest.mark.parametrize("lint", lints.LINTS, ids=lambda lint: lint.__name__)
def test_a_good_notebook_passes(lint: lints.Lint) -> None:
    assert list(lint(GOOD, SOLUTIONS)) == []


@pytest.mark.parametrize(("lint", "words", "spoil"), BAD, ids=[f"{lint.__name__}: {words}" for lint, words, _ in BAD])
def test_a_bad_notebook_fails(lint: lints.Lint, words: str, spoil: Callable[[dict[str, Any]], Any]) -> None:
    notebook = copy.deepcopy(GOOD)
    spoil(notebook)
    found = list(lint(notebook, SOLUTIONS))
    assert len(found) >= 1
    assert any(words in text for text in found), found


def test_every_lint_was_seen_to_fail() -> None:
    assert {lint for lint, _, _ in BAD} == set(lints.LINTS)
