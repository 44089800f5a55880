"""The harness itself, on a notebook with a picture and a button: what it reports is what the browser shows."""

from __future__ import annotations

import io
from pathlib import Path

import nbformat
import pytest
from notebook_page import NotebookPage
from PIL import Image

from labkit.cli.jupyter import Jupyter

pytestmark = pytest.mark.long
SETUP = """\
import io
import ipywidgets
from PIL import Image

def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (40, 20), colour).save(file, "PNG")
    return file.getvalue()

image = ipywidgets.Image(value=picture("green"), format="png")
said = ipywidgets.HTML("nothing yet")
button = ipywidgets.Button(description="Crash pod 1", tooltip="Kill it at once")
button.on_click(lambda _: (setattr(image, "value", picture("red")), setattr(said, "value", "crashed <b>once</b>")))
ipywidgets.VBox([image, button, said])"""


@pytest.fixture
def link(root: Path, jupyter: Jupyter) -> str:
    cells = [nbformat.v4.new_code_cell(SETUP), nbformat.v4.new_code_cell('print("the", "verdict")')]
    cells += [nbformat.v4.new_markdown_cell("# Filler\n\n" + "line\n\n" * 80), nbformat.v4.new_code_cell("6 * 7")]
    _write(root / "harness.ipynb", cells)
    return jupyter.link("harness.ipynb")


def _write(path: Path, cells: list[nbformat.NotebookNode]) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def test_runs_all_cells_clicks_and_sees_the_picture_change(notebook: NotebookPage, link: str, tmp_path: Path) -> None:
    notebook.open(link)
    notebook.run_all()
    assert notebook.output_text("verdict") == "the verdict\n"
    assert notebook.output_text("6 * 7") == "42"
    before = notebook.picture()
    assert Image.open(io.BytesIO(before)).getpixel((0, 0)) == (0, 128, 0)
    notebook.click("Crash pod 1")
    after = notebook.wait_for_new_picture(before)
    assert Image.open(io.BytesIO(after)).getpixel((0, 0)) == (255, 0, 0)
    notebook.wait_for_text("crashed once")
    assert notebook.button("Kill it at once").inner_text() == "Crash pod 1"
    with Image.open(notebook.screenshot("harness", tmp_path)) as shot:
        assert shot.width == 1280


def test_no_dialog_asks_for_anything(notebook: NotebookPage, link: str) -> None:
    notebook.open(link)
    notebook.run_all()
    assert notebook.page.locator(".jp-Dialog").count() == 0
    assert "news" not in notebook.page.locator("body").inner_text().lower()


def test_a_cell_that_raises_fails(notebook: NotebookPage, root: Path, jupyter: Jupyter) -> None:
    _write(root / "raises.ipynb", [nbformat.v4.new_code_cell("1 / 0")])
    notebook.open(jupyter.link("raises.ipynb"))
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        notebook.run_all()


def test_a_missing_button_fails(notebook: NotebookPage, link: str) -> None:
    notebook.open(link)
    with pytest.raises(AssertionError, match="No such button"):
        notebook.click("No such button", timeout=0.5)
