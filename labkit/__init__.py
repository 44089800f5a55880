"""Learn event-driven architecture by breaking it.

`labkit` gives what a notebook holds, `labkit.patterns` what a service can lift, `labkit.kafka` what both stand on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from labkit.lab.board.panels import panel as panel
    from labkit.lab.classroom import class_table as class_table
    from labkit.lab.comparison import Way as Way
    from labkit.lab.comparison import lines_of as lines_of
    from labkit.lab.exercises import exercise as exercise
    from labkit.lab.exercises import hint as hint
    from labkit.lab.exercises import predict as predict
    from labkit.lab.exercises import solution as solution
    from labkit.lab.faults.trap import Trap as Trap
    from labkit.lab.lab import Lab as Lab
    from labkit.lab.pages import Page as Page
    from labkit.runtime.connectors import capture as capture
    from labkit.runtime.connectors import mirror as mirror
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "lab.board.panels": "panel",
            "lab.classroom": "class_table",
            "lab.comparison": "Way lines_of",
            "lab.exercises": "exercise hint predict solution",
            "lab.faults.trap": "Trap",
            "lab.lab": "Lab",
            "lab.pages": "Page",
            "runtime.connectors": "capture mirror",
        },
    )
