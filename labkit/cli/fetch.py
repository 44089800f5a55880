"""`labkit fetch`: all jars beforehand, so that no network is needed later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fetch(
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FOLDER", help="The jars of a bundle: then no network is needed.")
    ] = None,
) -> None:
    """Fetch all jars that the notebooks need (some 65 MB): from then on they need no network."""
    from labkit.runtime import jars

    for what in jars.LISTS:
        typer.echo(f"{what}: {jars.fetch(what, source)}")
