"""With its solutions filled in a notebook says that every exercise is done, though each cell runs twice."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from outputs import ROOT, execute

from labkit.lab.exercises import read_solutions


def printed(cell: nbformat.NotebookNode) -> str:
    """Without what is said of other loads: a cell that sends makes one of them, the second time."""
    text = "".join(output["text"] for output in cell.outputs if output["output_type"] == "stream")
    return re.sub(r" · [\d,]+ of other loads not looked at", "", text)


SOLVED = sorted((ROOT / "notebooks" / "solutions").glob("*.py"))


@pytest.mark.long
@pytest.mark.timeout(900)  # twice a notebook; on a slow machine each of its cells may take a while
@pytest.mark.usefixtures("broker")
@pytest.mark.parametrize("solutions", SOLVED, ids=lambda path: path.stem)
def test_every_exercise_is_done_and_every_cell_can_be_run_twice(solutions: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{solutions.stem}.ipynb", as_version=4)
    filled = read_solutions(solutions)
    cells, notebook.cells = notebook.cells, []
    for cell in cells:
        cell.source = filled.get(cell.id, cell.source)
        notebook.cells.append(cell)
        if cell.cell_type == "code":
            notebook.cells.append(again := copy.deepcopy(cell))
            again.id = f"{cell.id}-again"
    execute(notebook, ROOT / "notebooks")
    checked = [cell for cell in notebook.cells if cell.cell_type == "code" and "NBVAL_CHECK_OUTPUT" in cell.source]
    for cell, again in zip(checked[::2], checked[1::2], strict=True):
        assert printed(cell) == printed(again) != "", (cell.id, printed(again))
    for cell in notebook.cells:
        if cell.id.removesuffix("-again") in filled:
            texts = [output["data"]["text/plain"] for output in cell.outputs if "data" in output]
            assert texts, f"{cell.id} shows nothing"
            assert texts[-1].endswith("Done."), texts[-1]
