"""What a notebook holds. `from labkit.lab import Lab, Consumer` is all that most of them need."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.kafka.consumer import Consumer as Consumer
    from labkit.lab.comparison import compare as compare
    from labkit.lab.lab import Lab as Lab
    from labkit.lab.panels import panel as panel
    from labkit.lab.widgets import exercise as exercise
    from labkit.lab.widgets import hint as hint
    from labkit.lab.widgets import predict as predict
    from labkit.lab.widgets import solution as solution

# Imported when asked for: a pod imports this package too, and has no use for widgets and pictures.
_HOME = {
    "Consumer": "labkit.kafka.consumer",
    "Lab": "labkit.lab.lab",
    "compare": "labkit.lab.comparison",
    "exercise": "labkit.lab.widgets",
    "hint": "labkit.lab.widgets",
    "panel": "labkit.lab.panels",
    "predict": "labkit.lab.widgets",
    "solution": "labkit.lab.widgets",
}
__all__ = ["Consumer", "Lab", "compare", "exercise", "hint", "panel", "predict", "solution"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
