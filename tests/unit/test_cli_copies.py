"""The learner's copies: a pull never conflicts with them, and never takes away what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkit.cli.copies import RECORD, Copied, copy_notebooks


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source = tmp_path / "notebooks"
    (source / "solutions").mkdir(parents=True)
    (source / "solutions" / "00.py").write_text("secret")
    write(source / "00.ipynb", "first")
    return source, tmp_path / "work"


def write(path: Path, source: str, outputs: list[object] | None = None) -> None:
    cell = {"cell_type": "code", "source": source, "outputs": outputs or [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}}))


def source_of(path: Path) -> str:
    return str(json.loads(path.read_text())["cells"][0]["source"])


def test_copies_are_made_without_solutions(folders: tuple[Path, Path]) -> None:
    source, work = folders
    assert copy_notebooks(source, work) == Copied(made=["00.ipynb"])
    assert sorted(path.name for path in work.iterdir()) == [RECORD, "00.ipynb"]
    assert copy_notebooks(source, work) == Copied()


def test_an_edited_copy_stays_as_it_is(folders: tuple[Path, Path]) -> None:
    source, work = folders
    copy_notebooks(source, work)
    write(work / "00.ipynb", "mine")
    assert copy_notebooks(source, work) == Copied()
    assert source_of(work / "00.ipynb") == "mine"


def test_a_copy_that_was_only_run_follows_its_source(folders: tuple[Path, Path]) -> None:
    source, work = folders
    copy_notebooks(source, work)
    write(work / "00.ipynb", "first", outputs=[{"text": "ran"}])
    write(source / "00.ipynb", "second")
    assert copy_notebooks(source, work) == Copied(updated=["00.ipynb"])
    assert source_of(work / "00.ipynb") == "second"


def test_a_new_version_of_an_edited_copy_is_put_beside_it_once(folders: tuple[Path, Path]) -> None:
    source, work = folders
    copy_notebooks(source, work)
    write(work / "00.ipynb", "mine")
    write(source / "00.ipynb", "second")
    assert copy_notebooks(source, work) == Copied(kept={"00.ipynb": "00.new.ipynb"})
    assert copy_notebooks(source, work) == Copied()
    assert (source_of(work / "00.ipynb"), source_of(work / "00.new.ipynb")) == ("mine", "second")
    write(source / "00.ipynb", "third")
    assert copy_notebooks(source, work) == Copied(kept={"00.ipynb": "00.new2.ipynb"})


def test_a_deleted_copy_is_made_anew(folders: tuple[Path, Path]) -> None:
    source, work = folders
    copy_notebooks(source, work)
    (work / "00.ipynb").unlink()
    assert copy_notebooks(source, work) == Copied(made=["00.ipynb"])


@pytest.mark.parametrize("record", ["", "{", "[1]"])
def test_without_a_record_nothing_is_overwritten(folders: tuple[Path, Path], record: str) -> None:
    source, work = folders
    copy_notebooks(source, work)
    write(work / "00.ipynb", "mine")
    (work / RECORD).write_text(record)
    assert copy_notebooks(source, work) == Copied(kept={"00.ipynb": "00.new.ipynb"})
    assert source_of(work / "00.ipynb") == "mine"


def test_a_copy_that_is_no_notebook_any_more_is_kept(folders: tuple[Path, Path]) -> None:
    source, work = folders
    copy_notebooks(source, work)
    (work / "00.ipynb").write_text("<<<<<<<")
    write(source / "00.ipynb", "second")
    assert copy_notebooks(source, work) == Copied(kept={"00.ipynb": "00.new.ipynb"})
    assert (work / "00.ipynb").read_text() == "<<<<<<<"


def test_a_copy_has_no_answers_in_it(tmp_path: Path) -> None:
    source, work = tmp_path / "notebooks", tmp_path / "work"
    source.mkdir()
    write(source / "00.ipynb", "verdict", outputs=[{"text": "lost 0"}])
    (source / "broken.ipynb").write_text("no notebook")
    copy_notebooks(source, work)
    (cell,) = json.loads((work / "00.ipynb").read_text())["cells"]
    assert cell["outputs"] == []
    assert (work / "broken.ipynb").read_text() == "no notebook"
    again = copy_notebooks(source, work)
    assert again == Copied()
