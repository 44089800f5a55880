"""Notebook 04 in a browser: a lane is unblocked by button, every verdict holds, dead letters are replayed."""

from __future__ import annotations

from pathlib import Path

from notebook_page import NotebookPage

from labkit.cli.jupyter import Jupyter

SKIP, LAST = "if blocked.place in desk.lanes:", "left among the dead letters"


def test_a_record_is_skipped_and_dead_letters_are_replayed_by_button(
    notebook: NotebookPage, jupyter: Jupyter, root: Path, tmp_path: Path
) -> None:
    import nbformat

    book = nbformat.read(root / "04_schedule_and_forget.ipynb", as_version=4)
    last = next(number for number, cell in enumerate(book.cells) if LAST in cell.source)
    book.cells = book.cells[: last + 1]  # what follows closes the lab
    nbformat.write(book, root / "04_until_the_verdict.ipynb")
    notebook.open(jupyter.link("04_until_the_verdict.ipynb"))

    notebook.run_above(SKIP)
    notebook.wait_for_text("cannot get past: 1 blocked")
    choice = notebook.page.locator(".jp-OutputArea-output select").last
    assert "customer\xa0107" in (choice.text_content() or "")  # ipywidgets writes options with such spaces
    notebook.scroll_to("desk.unblock")
    notebook.screenshot("04_unblock", tmp_path)
    choice.select_option(index=0)
    notebook.click("Skip this record")
    notebook.wait_for_text("it left a trace")
    before = notebook.picture()

    notebook.run_below(SKIP)
    notebook.wait_for_new_picture(before)
    assert "300 charged · not charged 0 · charged twice 0" in notebook.output_text("announced, each once")
    assert "skipped: 107-6" in notebook.output_text("a skip is for one record, once")
    assert "236 charged · not charged 0" in notebook.output_text(LAST)
    notebook.scroll_to("dead = desk.table()")
    notebook.screenshot("04_review", tmp_path)

    notebook.click("Replay all")
    notebook.wait_for_text("4 put back; each leaves once it is handled.")
    notebook.wait_for_text("Dead letters of subscriptions: 4", timeout=60)  # a card that is declined is declined again
    notebook.scroll_to("payments.decline(")
    notebook.screenshot("04_board", tmp_path)
