"""Notebook 01 in a browser: boards draw load, lag and age, and a writer of the view can be crashed by button."""

from __future__ import annotations

import io
from pathlib import Path

from notebook_page import NotebookPage
from PIL import Image

from labkit.cli.jupyter import Jupyter

LAST = "board = lab.board("  # the cells after the one with the board are nbval's business


def test_the_boards_are_drawn_and_a_writer_is_crashed_by_button(
    notebook: NotebookPage, jupyter: Jupyter, root: Path, tmp_path: Path
) -> None:
    import nbformat

    book = nbformat.read(root / "01_consume_and_project.ipynb", as_version=4)
    last = next(number for number, cell in enumerate(book.cells) if LAST in cell.source)
    book.cells = [*book.cells[: last + 2], nbformat.v4.new_code_cell("print('settled:', bool(lab.settle()))")]
    nbformat.write(book, root / "01_until_the_board.ipynb")
    notebook.open(jupyter.link("01_until_the_board.ipynb"))
    notebook.run_all(timeout=90)
    load, view = notebook.picture(0), notebook.picture(1)
    for drawn in (load, view):
        with Image.open(io.BytesIO(drawn)) as image:
            assert image.width > 600
    notebook.scroll_to(LAST)
    notebook.click("Crash writer-0")
    notebook.wait_for_text("killed by SIGKILL")
    after = notebook.wait_for_new_picture(view, 1)
    notebook.wait_for_new_picture(after, 1)
    notebook.screenshot("01_board", tmp_path)
    notebook.scroll_to("busy = lab.board(")
    notebook.screenshot("01_load", tmp_path)
