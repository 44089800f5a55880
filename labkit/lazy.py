"""The public names of a package, each loaded from its module when somebody asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of `package`, from module → the names it gives, with spaces between.

    What programs import gives the same names under `TYPE_CHECKING`, for editors and mypy, and a test compares the two;
    the rooms of services are for notebooks, which nobody type-checks.
    """
    home = {name: f"{package}.{module}" for module, given in names.items() for name in given.split()}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    return sorted(home), get, lambda: sorted(home)
