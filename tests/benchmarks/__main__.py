"""`python tests/benchmarks`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # from where this folder is a package

from benchmarks.command import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
