"""Notebook 04 as a learner meets it: break the provider by a button, look at the desk, read every verdict."""

from __future__ import annotations

from pathlib import Path

from notebook_page import NotebookPage

from labkit.cli.jupyter import Jupyter


def test_all_of_it_runs_and_every_verdict_holds(notebook: NotebookPage, jupyter: Jupyter, tmp_path: Path) -> None:
    notebook.open(jupyter.link("04_schedule_and_forget.ipynb"))
    notebook.start_all()
    notebook.click("Cut connections", timeout=60)  # charged, and never told: the ids of the charges make up for it
    before = notebook.picture()
    notebook.wait_for_new_picture(before)
    notebook.wait_for_text("customer 107", timeout=90)
    notebook.scroll_to("desk.unblock")
    notebook.screenshot("04_unblock", tmp_path)
    notebook.wait_for_text("Dead letters of subscriptions", timeout=60)
    notebook.wait_until_run(timeout=180)
    for cell in ("some are charged twice ·", "announced, each once", "skipped: {", "left among the dead letters"):
        said = notebook.output_text(cell)
        assert said, cell
    assert "300 charged · not charged 0 · charged twice 0" in notebook.output_text("announced, each once")
    assert "skipped: 107-6" in notebook.output_text("a skip is for one record, once")
    assert "236 charged · not charged 0" in notebook.output_text("left among the dead letters")
    notebook.scroll_to("dead = desk.table()")
    notebook.screenshot("04_review", tmp_path)
    notebook.scroll_to("board.snapshot()")
    notebook.screenshot("04_end", tmp_path)
