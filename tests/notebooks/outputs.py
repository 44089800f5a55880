"""`make notebooks`: run the notebooks and rewrite the outputs they are committed with, and the README's pictures.

Committed are the outputs of verdict cells, which tests compare, and one picture for readers on the web. All else would
change with every run.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[2]
PACE = "10"  # as in conftest.py: saved outputs are those of a test's run
VERDICT = "NBVAL_CHECK_OUTPUT"
PICTURE = "image/png"
PICTURE_BYTES = 40_000
PICTURES = ROOT / "docs" / "pictures"
SMALL = (440, 140)  # pixels of a picture in the README's table, where it is half as wide: a board's first row of panels
CELL_SECONDS = 280
WIDGETS = "application/vnd.jupyter.widget"  # the start of every media type that only a living kernel can draw
CELL_METADATA = {"tags", "jupyter", "slideshow", "editable", "deletable"}
KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main(names: list[str]) -> None:
    """Run these notebooks, all by default, and rewrite what is committed of them."""
    there = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    if unknown := [name for name in names if name not in there]:
        sys.exit(f"there is no notebook {', '.join(unknown)}; there are: {', '.join(there)}")
    for name in names or there:
        print(f"Running {name} …", flush=True)
        path = there[name]
        notebook = nbformat.read(path, as_version=4)
        execute(notebook, path.parent)
        clean(notebook, path.name)
        temporary = path.with_name(f".{path.name}.new")
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
        (PICTURES / f"{name[:2]}.png").write_bytes(small(notebook))


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a new kernel of this environment, at the pace of tests. Raises what nbclient raises."""
    client = NotebookClient(
        notebook,
        coalesce_streams=True,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )  # the state of widgets is kept until `clean`: without it nbclient stumbles over the progress of a first start
    client.execute(env={**os.environ, "LABKIT_PACE": PACE, "JUPYTER_PREFER_ENV_PATH": "1"})


def clean(notebook: NotebookNode, name: str) -> None:
    """Leave only what is committed. Raises ValueError when the picture is too large."""
    notebook.metadata.clear()
    notebook.metadata.update(KERNEL)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [(cell, output) for cell in code for output in cell.outputs if PICTURE in output.get("data", {})]
    for cell in notebook.cells:
        cell.metadata = type(cell.metadata)({key: cell.metadata[key] for key in cell.metadata if key in CELL_METADATA})
    for cell in code:
        outputs = cell.outputs if VERDICT in cell.source else []
        kept = [_still(output) for output in outputs if PICTURE not in output.get("data", {})]
        if pictures and cell is pictures[-1][0]:
            picture = _still(pictures[-1][1])
            size = len(base64.b64decode(picture["data"][PICTURE]))
            if size > PICTURE_BYTES:
                raise ValueError(f"{name}: the picture has {size:,} bytes, and {PICTURE_BYTES:,} are allowed")
            kept.append(picture)
        cell.outputs = [output for output in kept if output.output_type == "stream" or output.get("data")]


def small(notebook: NotebookNode) -> bytes:
    """The first row of a notebook's committed picture, for the README's table."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    (picture,) = (output["data"][PICTURE] for output in outputs if PICTURE in output.get("data", {}))
    board = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    made = io.BytesIO()
    row = (0, 0, board.width, min(board.height, board.width * SMALL[1] // SMALL[0]))
    board.resize(SMALL, Image.Resampling.LANCZOS, row).quantize(32).save(made, "PNG", optimize=True)
    return made.getvalue()


def _still(output: Any) -> Any:
    """An output without what only a living kernel can draw."""
    if "data" in output:
        for media_type in [name for name in output["data"] if name.startswith(WIDGETS)]:
            del output["data"][media_type]
        output["metadata"] = type(output["metadata"])()
    return output


if __name__ == "__main__":
    main(sys.argv[1:])
