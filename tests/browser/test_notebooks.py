"""Notebooks as a learner meets them in a browser: what only a browser shows."""

from __future__ import annotations

import io
from pathlib import Path

import nbformat
import pytest
from notebook_page import NotebookPage
from PIL import Image

from labkit.cli.jupyter import Jupyter
from labkit.cli.lab import FIRST

VERDICT = "NBVAL_CHECK_OUTPUT"


def test_00_a_crash_by_button_is_seen_and_the_verdict_is_valid(
    notebook: NotebookPage, jupyter: Jupyter, root: Path, tmp_path: Path
) -> None:
    own = "00_broken_by_button.ipynb"
    book = nbformat.read(root / FIRST, as_version=4)
    rest = [cell for cell in book.cells if cell.id != "break"]  # it crashes the same pod: a dead button would not show
    assert len(rest) == len(book.cells) - 1
    book.cells = rest
    (load,) = [cell for cell in book.cells if "islice(numbers, 1000)" in cell.source]
    load.source = load.source.replace("1000", "500")
    nbformat.write(book, root / own)
    notebook.open(jupyter.link(own))
    notebook.run_above(VERDICT)  # the rest waits for the click, however slow the machine is
    before = notebook.picture()
    with Image.open(io.BytesIO(before)) as drawn:
        assert drawn.width > 600
    notebook.wait_for_new_picture(before)
    notebook.click("Kill shop-0")
    notebook.wait_for_text("killed by SIGKILL")
    after = notebook.wait_for_new_picture(before)
    notebook.wait_for_new_picture(after)
    notebook.scroll_to("lab.board(")
    notebook.screenshot("00_board", tmp_path)
    notebook.run_below(VERDICT)
    assert "lost 0" in notebook.output_text(VERDICT)
    with Image.open(io.BytesIO(notebook.picture())) as drawn:  # the last one stays on the page
        assert drawn.width > 600
    notebook.screenshot("00_end", tmp_path)


@pytest.mark.long
def test_01_the_boards_are_drawn_and_a_writer_is_crashed_by_button(
    notebook: NotebookPage, jupyter: Jupyter, root: Path, tmp_path: Path
) -> None:
    board = "board = lab.board("  # the cells after the one with the board are nbval's business
    book = nbformat.read(root / "01_consume_and_project.ipynb", as_version=4)
    last = next(number for number, cell in enumerate(book.cells) if board in cell.source)
    book.cells = [*book.cells[: last + 2], nbformat.v4.new_code_cell("print('settled:', bool(lab.settle()))")]
    nbformat.write(book, root / "01_until_the_board.ipynb")
    notebook.open(jupyter.link("01_until_the_board.ipynb"))
    notebook.run_all()
    load, view = notebook.picture(0), notebook.picture(1)
    for drawn in (load, view):
        with Image.open(io.BytesIO(drawn)) as image:
            assert image.width > 600
    notebook.scroll_to(board)
    notebook.click("Kill writer-0")
    notebook.wait_for_text("killed by SIGKILL")
    after = notebook.wait_for_new_picture(view, 1)
    notebook.wait_for_new_picture(after, 1)
    notebook.screenshot("01_board", tmp_path)
    notebook.scroll_to("busy = lab.board(")
    notebook.screenshot("01_load", tmp_path)


@pytest.mark.long
def test_04_a_record_is_skipped_and_dead_letters_are_replayed_by_button(
    notebook: NotebookPage, jupyter: Jupyter, root: Path, tmp_path: Path
) -> None:
    skip, left = "if blocked.place in console.lanes:", "every = payments.due(MONTHLY"
    book = nbformat.read(root / "04_schedule_and_forget.ipynb", as_version=4)
    last = next(number for number, cell in enumerate(book.cells) if left in cell.source)
    book.cells = book.cells[: last + 1]  # what follows closes the lab
    nbformat.write(book, root / "04_until_the_verdict.ipynb")
    notebook.open(jupyter.link("04_until_the_verdict.ipynb"))

    notebook.run_above(skip)
    notebook.wait_for_text("cannot get past: 1 blocked")
    choice = notebook.page.locator(".jp-OutputArea-output select").last
    assert "customer\xa0107" in (choice.text_content() or "")  # ipywidgets writes options with such spaces
    notebook.scroll_to("console.unblock")
    notebook.screenshot("04_unblock", tmp_path)
    choice.select_option(index=0)
    notebook.click("Skip this record")
    notebook.wait_for_text("it left a trace")
    before = notebook.picture()

    notebook.run_below(skip)
    notebook.wait_for_new_picture(before)
    assert "300 took effect · lost 0 · duplicated 0" in notebook.output_text("calls_since = payments.finished(")
    assert "rejected: 107-6" in notebook.output_text("a skip is for one record, once")
    assert "240 sent · 236 took effect · lost 0" in notebook.output_text(left)
    notebook.scroll_to("dead = console.table()")
    notebook.screenshot("04_review", tmp_path)

    notebook.click("Replay all")
    notebook.wait_for_text("4 put back; each leaves once it is handled.")
    notebook.wait_for_text("Dead letters of subscriptions: 4", timeout=60)  # a card that is declined is declined again
    notebook.scroll_to("declined=")
    notebook.screenshot("04_board", tmp_path)
