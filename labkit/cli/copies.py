"""The learner's copies of the notebooks. An edited copy is never overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from labkit.lab.comparison import FOLDER

RECORD = ".copied.json"
ELSEWHERE = {"solutions", ".ipynb_checkpoints", FOLDER}  # not copied: they are read where they are, or useless


@dataclass
class Copied:
    """What `copy_notebooks` has done, by path below the folder."""

    made: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Copies that the learner has edited, and the file with the new version of each."""


def copy_notebooks(source: Path, work: Path) -> Copied:
    """Bring every notebook of `source` into `work`.

    A copy that the learner has not edited follows its source; running cells changes only outputs, and is no edit. An
    edited copy stays as it is, and each new version of its source is put beside it, once. A deleted copy is made anew.
    """
    work.mkdir(exist_ok=True)
    known = _read_record(work / RECORD)
    done = Copied()
    for original in sorted(path for path in source.rglob("*") if path.is_file()):
        relative = original.relative_to(source)
        if ELSEWHERE & set(relative.parts):
            continue
        name, copy = str(relative), work / relative
        new = _essence(original)
        if not copy.exists():
            _put(original, copy)
            done.made.append(name)
        elif known.get(name) != new and (mine := _essence(copy)) != new:
            if mine == known.get(name):
                _put(original, copy)
                done.updated.append(name)
            else:
                beside = _free_name(copy)
                _put(original, beside)
                done.kept[name] = str(beside.relative_to(work))
        known[name] = new
    temporary = work / f"{RECORD}.new"
    temporary.write_text(json.dumps(known, indent=1))
    os.replace(temporary, work / RECORD)
    return done


def _essence(path: Path) -> str:
    """A hash of what a learner edits: a notebook's cells without their outputs, another file's bytes."""
    content = path.read_bytes()
    if path.suffix == ".ipynb":
        try:
            cells = json.loads(content)["cells"]
            parts = [[cell["cell_type"], "".join(cell["source"])] for cell in cells]
            content = json.dumps(parts).encode()
        except (ValueError, KeyError, TypeError):
            pass  # no notebook any more: its bytes will do
    return hashlib.sha256(content).hexdigest()


def _put(original: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f".{copy.name}.new")
    shutil.copyfile(original, temporary)
    if copy.suffix == ".ipynb":
        _forget_outputs(temporary)
    os.replace(temporary, copy)


def _forget_outputs(path: Path) -> None:
    """Remove outputs: a learner who is to predict something must not read the answer below the cell."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
    except (ValueError, KeyError, TypeError):
        return  # no notebook: copied as it is
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _free_name(path: Path) -> Path:
    number = 1
    while (beside := path.with_name(f"{path.stem}.new{'' if number == 1 else number}{path.suffix}")).exists():
        number += 1
    return beside


def _read_record(path: Path) -> dict[str, str]:
    """The hash of each copy when it was made. Without it, a copy that differs from its source counts as edited."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
