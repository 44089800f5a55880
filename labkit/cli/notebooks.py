"""`labkit notebooks`: run the notebooks and rewrite the outputs they are committed with.

Committed are the outputs of verdict cells, which tests compare, and one picture for readers on the web. All else would
change with every run.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labkit.cli.lab import ROOT
from labkit.cli.testing import PACE
from labkit.kafka.errors import LabkitError

if TYPE_CHECKING:
    from nbformat import NotebookNode

VERDICT = "NBVAL_CHECK_OUTPUT"
PICTURE = "image/png"
PICTURE_BYTES = 40_000
CELL_SECONDS = 120
WIDGETS = "application/vnd.jupyter.widget"  # the start of every media type that only a living kernel can draw
CELL_METADATA = {"tags", "jupyter", "slideshow", "editable", "deletable"}
KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks(
    names: Annotated[list[str] | None, typer.Argument(help="Which, as in 00_start_here. All by default.")] = None,
) -> None:
    """Run the notebooks and rewrite the outputs they are committed with."""
    import nbformat

    there = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    if unknown := [name for name in names or [] if name not in there]:
        raise LabkitError(f"there is no notebook {', '.join(unknown)}; there are: {', '.join(there) or 'none'}")
    for name in names or there:
        typer.echo(f"Running {name} …")
        path = there[name]
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        execute(notebook, path.parent, os.environ)
        clean(notebook, path.name)
        temporary = path.with_name(f".{path.name}.new")
        nbformat.write(notebook, temporary)  # type: ignore[no-untyped-call]
        os.replace(temporary, path)


def execute(notebook: NotebookNode, folder: Path, environment: Mapping[str, str]) -> None:
    """Run all cells in a new kernel of this environment. Raises LabkitError showing the cell that failed."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )  # the state of widgets is kept until `clean`: without it nbclient stumbles over the progress of a first start
    try:
        client.execute(env={"LABKIT_PACE": PACE, **environment, "JUPYTER_PREFER_ENV_PATH": "1"})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise LabkitError(f"the notebook failed: {error}") from error


def clean(notebook: NotebookNode, name: str) -> None:
    """Leave only what is committed. Raises LabkitError when the picture is too large."""
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
                raise LabkitError(f"{name}: the picture has {size:,} bytes, and {PICTURE_BYTES:,} are allowed")
            kept.append(picture)
        cell.outputs = [output for output in kept if output.output_type == "stream" or output.get("data")]


def _still(output: Any) -> Any:
    """An output without what only a living kernel can draw."""
    if "data" in output:
        for media_type in [name for name in output["data"] if name.startswith(WIDGETS)]:
            del output["data"][media_type]
        output["metadata"] = type(output["metadata"])()
    return output
