"""What `make notebooks` leaves in a notebook."""

from __future__ import annotations

import base64
import io
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from outputs import KERNEL, PICTURE, PICTURE_BYTES, PICTURES, ROOT, SMALL, WIDGETS, clean, small
from PIL import Image

VERDICT = "# NBVAL_CHECK_OUTPUT\nprint(verdict)"


def cell(source: str, *outputs: Any, **metadata: Any) -> nbformat.NotebookNode:
    return new_code_cell(source, outputs=list(outputs), execution_count=1, metadata=metadata)


def picture(size: int = 10, fill: bytes = b"x") -> nbformat.NotebookNode:
    return new_output("display_data", data={PICTURE: base64.b64encode(fill * size).decode(), "text/plain": "Image"})


def printed(text: str) -> nbformat.NotebookNode:
    return new_output("stream", name="stdout", text=text)


def cleaned(*cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    notebook = new_notebook(cells=list(cells), metadata={"widgets": {"state": {}}, "signature": "x"})
    clean(notebook, "00.ipynb")
    nbformat.validate(notebook)
    return notebook


def test_only_verdicts_keep_their_outputs() -> None:
    notebook = cleaned(cell("print(1)", printed("1\n")), cell(VERDICT, printed("lost 0\n")))
    assert [len(one.outputs) for one in notebook.cells] == [0, 1]
    assert notebook.cells[1].execution_count == 1


def test_only_the_last_picture_stays() -> None:
    first, last = picture(), picture(fill=b"y")
    notebook = cleaned(cell("board", first), cell("board.snapshot()", printed("x"), last))
    assert [len(one.outputs) for one in notebook.cells] == [0, 1]
    assert base64.b64decode(notebook.cells[1].outputs[0].data[PICTURE]) == b"y" * 10


def test_a_large_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"00\.ipynb: the picture has 40,001 bytes"):
        cleaned(cell("board.snapshot()", picture(PICTURE_BYTES + 1)))


def test_widgets_and_times_go() -> None:
    view = new_output("display_data", data={f"{WIDGETS}-view+json": {"model_id": "1"}, "text/plain": "Radio"})
    only_view = new_output("display_data", data={f"{WIDGETS}-view+json": {"model_id": "2"}})
    notebook = cleaned(cell(VERDICT, view, only_view, execution={"iopub.status.idle": "12:00"}, tags=["verdict"]))
    assert notebook.metadata == KERNEL
    assert notebook.cells[0].metadata == {"tags": ["verdict"]}
    assert [output.data for output in notebook.cells[0].outputs] == [{"text/plain": "Radio"}]


def test_the_readme_shows_a_small_picture_of_each_notebook() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made = Image.open(io.BytesIO(small(nbformat.read(path, as_version=4))))
        there = Image.open(io.BytesIO((PICTURES / f"{path.stem[:2]}.png").read_bytes()))
        assert made.size == there.size == SMALL
        assert f"docs/pictures/{path.stem[:2]}.png" in readme, path.stem
