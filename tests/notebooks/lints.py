"""What a committed notebook must be. Each lint yields what is wrong, naming the cell."""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from outputs import PICTURE, PICTURE_BYTES, VERDICT, WIDGETS

CODE_LINES = 15  # blank lines and lines that are only a comment do not count; a closing bracket does
SETUP = "setup"
SETUP_NAMES = 12
WIDEST = 100  # characters of a line of code: more is behind a scroll bar of JupyterLab on a laptop
CELL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# `!` and `%` lines pass under nbval whatever they do, and mean nothing outside IPython.
MAGIC = re.compile(r"^\s*(?:[%!]|\w[\w, ]*=\s*[%!])|^\s*[\w.]+\?{1,2}\s*$")
# A cell that raises fails the notebook; `check` and `wait_until` raise.
RAISING = {"check", "wait_until"}
# What hides or collects outputs leaves a reader without them; boards draw the pictures.
DISPLAYS = re.compile(r"\bclear_output\b|\bOutput\(|\bpyplot\b")
MACHINE_PATH = re.compile(r"(?<![\w.:/<])/(?:home|Users|root|tmp|work|opt|private|var)/[\w.-]+")
TIMES = {"execution", "ExecuteTime", "scrolled", "collapsed", "trusted"}

Notebook = Mapping[str, Any]
Lint = Callable[[Notebook, Mapping[str, str]], Iterator[str]]
"""Takes the notebook's JSON and the solutions by cell id."""


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


def outputs(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(cell.get("outputs", []))


def kernel(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """nbval and learners run it in whatever environment they are in, under this name."""
    name = notebook["metadata"].get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"its kernel is {name!r}, not 'python3'"


def cell_ids(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """Solutions and tests name cells by id."""
    seen = set()
    for number, cell in enumerate(notebook["cells"]):
        identity = cell.get("id", "")
        if not CELL_ID.fullmatch(identity):
            yield f"cell {number} has no id"
        if identity in seen:
            yield f"two cells have the id {identity}"
        seen.add(identity)


def verdicts(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """nbval compares nothing for a cell without an execution count, and a notebook without a verdict proves nothing."""
    marked = [cell for cell in code_cells(notebook) if VERDICT in source(cell)]
    if not marked:
        yield f"no cell is marked {VERDICT}"
    for cell in marked:
        if cell.get("execution_count") is None:
            yield f"cell {cell['id']} is marked {VERDICT} and has no execution count: `make notebooks`"
        if not outputs(cell):
            yield f"cell {cell['id']} is marked {VERDICT} and has no output: `make notebooks`"


def verdicts_assert(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """`make notebooks` would commit a wrong output as readily as a right one."""
    for cell in code_cells(notebook):
        if VERDICT in source(cell) and not any(map(_asserts, _nodes(cell))):
            yield f"cell {cell['id']} is marked {VERDICT} and asserts nothing"


def bare_outputs(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """What changes with every run, or only a living kernel can draw, is not committed."""
    if "widgets" in notebook["metadata"]:
        yield "it has saved widget state: `make notebooks`"
    for cell in notebook["cells"]:
        for name in TIMES & set(cell.get("metadata", {})):
            yield f"cell {cell['id']} has {name!r} in its metadata: `make notebooks`"
    for cell in code_cells(notebook):
        for output in outputs(cell):
            kinds = set(output.get("data", {}))
            if any(kind.startswith(WIDGETS) for kind in kinds):
                yield f"cell {cell['id']} has a widget view among its outputs: `make notebooks`"
            if output["output_type"] == "error":
                yield f"cell {cell['id']} was saved with an error"
            if VERDICT not in source(cell) and PICTURE not in kinds:
                yield f"cell {cell['id']} is no verdict and has an output: `make notebooks`"


def one_picture(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """One small picture teaches readers on the web; more bloat every clone."""
    pictures = [
        (cell["id"], output["data"][PICTURE])
        for cell in code_cells(notebook)
        for output in outputs(cell)
        if PICTURE in output.get("data", {})
    ]
    if len(pictures) > 1:
        yield f"it has {len(pictures)} pictures; one is allowed"
    for identity, picture in pictures:
        size = len(base64.b64decode("".join(picture)))
        if size > PICTURE_BYTES:
            yield f"the picture of cell {identity} has {size:,} bytes; {PICTURE_BYTES:,} are allowed"


def short_cells(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """A few lines a cell; helpers live in labkit."""
    for cell in code_cells(notebook):
        lines = [line for line in source(cell).splitlines() if line.strip() and not line.strip().startswith("#")]
        if len(lines) > CODE_LINES:
            yield f"cell {cell['id']} has {len(lines)} lines of code; {CODE_LINES} are allowed"
        for line in lines:
            if len(line) > WIDEST:
                yield f"cell {cell['id']} has a line of {len(line)} characters; {WIDEST} are allowed: {line[:30]}…"


def few_names(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """A reader who begins holds a dozen names in mind; other imports stand in the cell that uses them."""
    cell = next((cell for cell in code_cells(notebook) if cell.get("id") == SETUP), None)
    if cell is None:
        yield f"it has no code cell {SETUP}"
        return
    names = {name for node in _nodes(cell) for name in _made(node)}
    if len(names) > SETUP_NAMES:
        yield f"cell {SETUP} makes {len(names)} names; {SETUP_NAMES} are allowed: {', '.join(sorted(names))}"


def plain_python(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """`!exit 3` passes under nbval."""
    for cell in code_cells(notebook):
        for line in source(cell).splitlines():
            if MAGIC.match(line):
                yield f"cell {cell['id']} has a magic or shell line: {line.strip()}"
        try:
            ast.parse(source(cell))
        except SyntaxError as error:
            yield f"cell {cell['id']} is not plain Python: {error.msg}"


def plain_outputs(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """Nothing is cleared away, and there is one way to draw."""
    for cell in code_cells(notebook):
        for found in DISPLAYS.findall(source(cell)):
            yield f"cell {cell['id']} uses {found}"


def no_machine_paths(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """Of the machine it was written on."""
    for found in sorted(set(MACHINE_PATH.findall(json.dumps(notebook["cells"])))):
        yield f"it holds a path of a machine: {found}"


def exercises_have_solutions(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """Each exercise can be looked up, and each solution belongs to a cell that is there."""
    exercises = {cell["id"] for cell in code_cells(notebook) if re.search(r"\bexercise\(", source(cell))}
    for identity in sorted(exercises - set(solutions)):
        yield f"exercise {identity} has no solution in notebooks/solutions"
    for identity in sorted(set(solutions) - exercises):
        yield f"the solution {identity} belongs to no exercise"


def exercises_may_stay_unsolved(notebook: Notebook, solutions: Mapping[str, str]) -> Iterator[str]:
    """A learner who skips an exercise has `...` in its names, so no later cell may need them."""
    cells = code_cells(notebook)
    made = [{name for node in _nodes(cell) for name in _made(node)} for cell in cells]
    for number, cell in enumerate(cells):
        if re.search(r"\bexercise\(", source(cell)):
            own = made[number].difference(*made[:number], *made[number + 1 :])
            for later in cells[number + 1 :]:
                used = {node.id for node in _nodes(later) if isinstance(node, ast.Name)}
                for name in sorted(used & own):
                    yield f"cell {later['id']} uses {name}, which only the exercise {cell['id']} makes"


def _nodes(cell: Mapping[str, Any]) -> list[ast.AST]:
    try:
        return list(ast.walk(ast.parse(source(cell))))
    except SyntaxError:  # `plain_python` tells
        return []


def _asserts(node: ast.AST) -> bool:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RAISING
    return called or isinstance(node, ast.Assert)


def _made(node: ast.AST) -> list[str]:
    """Names that this part of a cell gives a value."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [(alias.asname or alias.name).partition(".")[0] for alias in names]
    return []


LINTS: tuple[Lint, ...] = (
    kernel,
    cell_ids,
    verdicts,
    verdicts_assert,
    bare_outputs,
    one_picture,
    short_cells,
    few_names,
    plain_python,
    plain_outputs,
    no_machine_paths,
    exercises_have_solutions,
    exercises_may_stay_unsolved,
)
