"""Notebook 00 as a learner meets it: run it, press a fault's button, see the picture change, read the verdict."""

from __future__ import annotations

import io
from pathlib import Path

from notebook_page import NotebookPage
from PIL import Image

from labkit.cli.jupyter import Jupyter
from labkit.cli.lab import FIRST

VERDICT = "NBVAL_CHECK_OUTPUT"
OWN = "00_broken_by_button.ipynb"


def test_a_crash_by_button_is_seen_and_the_verdict_is_valid(
    notebook: NotebookPage, jupyter: Jupyter, root: Path, tmp_path: Path
) -> None:
    import nbformat

    book = nbformat.read(root / FIRST, as_version=4)
    rest = [cell for cell in book.cells if cell.id != "break"]  # it crashes the same pod: a dead button would not show
    assert len(rest) == len(book.cells) - 1
    book.cells = rest
    nbformat.write(book, root / OWN)
    notebook.open(jupyter.link(OWN))
    notebook.run_above(VERDICT)  # the rest waits for the click, however slow the machine is
    before = notebook.picture()
    with Image.open(io.BytesIO(before)) as drawn:
        assert drawn.width > 600
    notebook.wait_for_new_picture(before)
    notebook.click("Crash pod 0")
    notebook.wait_for_text("killed by SIGKILL")
    after = notebook.wait_for_new_picture(before)
    notebook.wait_for_new_picture(after)
    notebook.scroll_to("lab.board(")
    notebook.screenshot("00_board", tmp_path)
    notebook.run_below(VERDICT, timeout=180)
    assert "lost 0" in notebook.output_text(VERDICT)
    with Image.open(io.BytesIO(notebook.picture())) as drawn:  # the last one stays on the page
        assert drawn.width > 600
    notebook.screenshot("00_end", tmp_path)
