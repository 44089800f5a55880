"""What every test gets, a notebook's cells included: a Kafka that is nobody else's, and the pace of tests."""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from labkit.runtime import shared_broker
from labkit.runtime.which_kafka import composed

PACED = ("notebooks", "browser")  # folders whose tests run notebooks
# Settings of the person who runs the tests that would lead them to another Kafka.
OUTSIDE = ("KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLIENT_CONFIG", "LABKIT_LEARNER")

state = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep what this process and its children do in a state folder of their own, the rows that notebooks write too. The
    cache stays the user's."""
    for name in OUTSIDE:
        os.environ.pop(name, None)
    folder = config.stash[state] = Path(tempfile.mkdtemp(prefix="labkit-test-"))
    os.environ |= {"LABKIT_STATE": str(folder), "JUPYTER_PREFER_ENV_PATH": "1"}
    os.environ["LABKIT_COMPARISON"] = str(folder / "comparison")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not session.config.option.collectonly and composed():
        pytest.exit("the broker of docker-compose.yml runs, and tests would use it: `docker compose stop` first", 1)


def pytest_unconfigure(config: pytest.Config) -> None:
    if (folder := config.stash.get(state, None)) is not None:
        if any(folder.glob("broker-*/")):
            shared_broker.stop()  # notebooks that have just ended would keep it for some seconds
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Notebooks are paced for people; under test they send the same records faster."""
    if item.path.parent.name in PACED:
        os.environ["LABKIT_PACE"] = "10"
    else:
        os.environ.pop("LABKIT_PACE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have each exercise run a second time, solved, and files that run notebooks beside ones that wait for Kafka."""
    add_solved(items)
    files = [list(group) for _, group in itertools.groupby(items, lambda item: item.path)]
    paced = [file for file in files if file[0].path.parent.name in PACED]
    others = [file for file in files if file[0].path.parent.name not in PACED]
    turns = itertools.zip_longest(paced, others, fillvalue=[])
    items[:] = itertools.chain.from_iterable(file for turn in turns for file in turn)


def add_solved(items: list[pytest.Item]) -> None:
    for number, item in reversed(list(enumerate(items))):
        if item.path.suffix == ".ipynb":
            solutions = item.path.parent / "solutions" / f"{item.path.stem}.py"
            if solutions.exists() and (filled := solutions_in(solutions).get(item.cell.id)) is not None:
                items.insert(number + 1, solved(item, filled))


def solutions_in(file: Path) -> dict[str, str]:
    """The solutions of a notebook's exercises, by the id of the cell."""
    from labkit.lab.exercises import read_solutions  # with all of Jupyter: only where there is a notebook

    return read_solutions(file)


def solved(exercise: pytest.Item, solution: str) -> pytest.Item:
    """The cell of an exercise once more, with its solution, which must be right."""
    *steps, last = ast.parse(solution).body  # the last one is `exercise(…)`, which is true once all is right
    lines = [*map(ast.unparse, steps), f"_solved = {ast.unparse(last)}", "assert _solved, _solved"]
    cell = exercise.cell.copy()
    cell.source, cell.outputs = "\n".join(lines), []
    options = {"cell_num": exercise.cell_num, "cell": cell, "options": exercise.options}
    return type(exercise).from_parent(exercise.parent, name=f"{exercise.name} solved", **options)
