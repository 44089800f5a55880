"""Notebook 00 as a learner meets it: run all, press a fault's button, see the picture change, read the verdict."""

from __future__ import annotations

import io
from pathlib import Path

from notebook_page import NotebookPage
from PIL import Image

from labkit.cli.jupyter import Jupyter
from labkit.cli.lab import FIRST


def test_a_crash_by_button_is_seen_and_the_verdict_is_valid(
    notebook: NotebookPage, jupyter: Jupyter, tmp_path: Path
) -> None:
    notebook.open(jupyter.link(FIRST))
    notebook.start_all()
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
    notebook.wait_until_run(timeout=180)
    assert "lost 0" in notebook.output_text("# NBVAL_CHECK_OUTPUT")
    with Image.open(io.BytesIO(notebook.picture())) as drawn:  # the last one stays on the page
        assert drawn.width > 600
    notebook.screenshot("00_end", tmp_path)
