"""The table that ends the lab: a row of each notebook, with figures that are none too, and files that are no rows."""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from labkit.cli.copies import copy_notebooks
from labkit.kafka.errors import LabkitError
from labkit.lab import comparison
from labkit.lab.comparison import ELSEWHERE, FOLDER, NOTEBOOKS, Way, lines_of, read, write

ROOT = Path(__file__).parents[2]
TITLE = "03 A store: 100 reads"
WAYS = [Way("ask", polls=100, lines=3, failed=1), Way("a store", polls=0, locks=0.25, failed=0)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a notebook's kernel runs: rows go beside it."""
    monkeypatch.delenv(ELSEWHERE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / FOLDER


def cells(table: object) -> list[list[str]]:
    return [list(map(str, row)) for row in table.to_numpy()]  # type: ignore[attr-defined]


def test_a_row_is_shown_and_kept_and_is_there_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("key-value-store", "03 before", [Way("x", polls=7)])
    shown = write("key-value-store", TITLE, WAYS)
    assert [path.name for path in folder.iterdir()] == ["key-value-store.json"]
    assert list(shown.index) == [(TITLE, "ask"), (TITLE, "a store")]
    assert cells(shown) == [["100", "–", "3", "1", "–"], ["0", "0.2", "–", "0", "–"]]
    assert read().equals(shown)
    assert capsys.readouterr().out == "Missing: run notebooks 01, 02, 04, 05, 06, 07 for their rows.\n"


def test_rows_come_in_the_order_of_the_notebooks_and_no_row_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in reversed(NOTEBOOKS[1:]):
        write(f"a-name-{9 - int(number)}", f"{number} …", WAYS)
    read()
    assert capsys.readouterr().out == "Missing: run notebook 01 for its row.\n"
    write("z", "01 …", WAYS)
    assert [title[:2] for title, _ in read().index] == [number for number in NOTEBOOKS for _ in WAYS]
    assert capsys.readouterr().out == ""


def test_without_any_row_there_is_a_table_and_all_are_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(read()) == 0
    assert "01, 02, 03, 04, 05, 06, 07" in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.parametrize("figure", [np.float64(2.5), np.int64(2), 2.5, True, float("nan"), np.float64("nan"), None])
def test_a_figure_may_be_numpys_or_unknown(folder: Path, figure: float | None) -> None:
    shown = write("n", TITLE, [Way("x", polls=figure)])
    assert read().iloc[0, 0] == shown.iloc[0, 0] == {2.5: "2.5", 2: "2", 1: "1"}.get(figure or 0, "–")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text('{"title": "03 A store", "ways"'),
        lambda path: path.write_bytes(b'{"title": "\xff"}'),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"title": "03", "ways": [{"name": "x", "polls": "many"}]}'),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["empty", "cut off", "no text", "deep", "another JSON", "no number", "a folder"],
)
def test_a_file_that_is_no_row_counts_as_missing_and_the_rest_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object]
) -> None:
    write("key-value-store", TITLE, WAYS)
    write("aggregation", "06 …", WAYS)
    spoil(folder / "key-value-store.json")
    assert {title for title, _ in read().index} == {"06 …"}
    assert capsys.readouterr().out == "Missing: run notebooks 01, 02, 03, 04, 05, 07 for their rows.\n"


def test_where_a_row_cannot_be_kept_it_is_shown_and_the_fix_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write_text("a file, where the folder should be")
    assert len(write("n", TITLE, WAYS)) == 2
    assert re.search(rf"will miss this row: .*{re.escape(str(folder))}.*, and run", capsys.readouterr().out)
    folder.unlink()
    (folder / "n.json").mkdir(parents=True)
    assert len(write("n", TITLE, WAYS)) == 2
    assert "will miss this row" in capsys.readouterr().out


def test_a_row_is_whole_or_the_one_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the kernel is killed in the middle."""
    write("n", TITLE, WAYS)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write("n", TITLE, [Way("x" * 10)])
    assert msgspec.json.decode((folder / "n.json").read_bytes())["ways"][0]["name"] == "ask"
    assert len(read()) == 2


def one(record: object) -> int:
    """A docstring

    of lines."""
    # why
    found = [
        1,
        2,
    ]

    return sum(found)


class Two:
    """A class."""

    field: int = 1
    """Of its own."""

    @property
    def three(self) -> int:
        """Only this."""
        return self.field


def test_lines_are_statements_without_comments_docstrings_and_blank_lines() -> None:
    def inner() -> None: ...

    assert lines_of(one) == 3
    assert lines_of(Two) == 5
    assert lines_of(inner, one) == 5
    assert lines_of() == 0
    assert lines_of(textwrap) > 100


def test_what_has_no_source_is_refused_with_the_fix() -> None:
    made: dict[str, type] = {}
    exec("class Made: pass", {"__name__": "__main__"}, made)
    for code in (made["Made"], len):
        with pytest.raises(LabkitError, match="give functions"):
            lines_of(code)


def test_rows_of_this_checkout_are_neither_committed_nor_copied_to_learners(tmp_path: Path) -> None:
    kept = tmp_path / "notebooks" / FOLDER / "n.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    assert copy_notebooks(tmp_path / "notebooks", tmp_path / "work").made == []
    for name in (f"notebooks/{FOLDER}/n.json", f"work/{FOLDER}/n.json"):
        ignored = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False)
        if ignored.returncode == 128:
            pytest.skip("this is no git clone")
        assert ignored.returncode == 0


def test_each_notebook_but_the_first_writes_its_row() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))[1:]:
        sources = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}
        assert f'lab.compare(\n    "{path.name[:2]} ' in sources.get("compare", ""), path.name
