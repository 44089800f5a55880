"""`labkit class`: who of a class is where, for the trainer."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Annotated

import typer

from labkit.cli.output import Json, say_json, table
from labkit.cli.topics import kafka

CLEAR = "\x1b[H\x1b[2J"


def class_(
    once: Annotated[bool, typer.Option("--once", help="Once, and not again and again.")] = False,
    as_json: Json = False,
) -> None:
    """Show everybody's runs, live: since when, the age of the newest record, lag, pods, verdicts. Ctrl-C ends it.

    Pods are the members of a run's consumer groups.
    """
    import msgspec

    from labkit.kafka.errors import LabkitError
    from labkit.lab.classroom import HEADS, REFRESH, cells, look

    with kafka() as connection:

        def shown() -> str:
            rows, now = look(connection.cluster), time.time()
            return table(HEADS, (cells(row, now) for row in rows), "Nobody is there.")

        if as_json:
            say_json(msgspec.to_builtins(look(connection.cluster)))
            return
        if once or not sys.stdout.isatty():
            typer.echo(shown())
            return
        while True:
            try:
                text = shown()
            except LabkitError as error:  # it may come back
                text = f"labkit: {error}"
            width = shutil.get_terminal_size().columns
            lines = "\n".join(line[:width] for line in text.splitlines())
            typer.echo(f"{CLEAR}{lines}\n\n{time.strftime('%H:%M:%S')} · Ctrl-C ends this.")
            time.sleep(REFRESH)
