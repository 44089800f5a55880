"""`labkit lab`: Kafka, JupyterLab, and a browser on notebook 00."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from labkit.kafka.errors import LabkitError
from labkit.runtime.home import BROUGHT

FIRST = "00_start_here.ipynb"
ROOT = Path(__file__).resolve().parents[2]


def lab(
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    port: Annotated[int, typer.Option(help="The port to try first.")] = 8888,
) -> None:
    """Open the lab: Kafka, and JupyterLab with your own copies of the notebooks."""
    from labkit.cli.jupyter import AlreadyRunning, Instance, Jupyter
    from labkit.lab.runs import known_as
    from labkit.runtime.which_kafka import connect

    # A closed terminal must not leave anything running, either. Background jobs of a shell ignore SIGINT otherwise.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    source, work = find_notebooks(ROOT, BROUGHT)
    try:
        with Instance(work) as instance:
            prepare_work(source, work)
            if os.geteuid() == 0:
                typer.echo("You are root, so JupyterLab runs with --allow-root.")
            # JupyterLab starts while Kafka does.
            with Jupyter(instance, port=port) as jupyter, connect() as connection:
                who = known_as(connection.origin)
                typer.echo(f"Kafka is at {connection.cluster.bootstrap} ({connection.origin}), {who}.")
                jupyter.wait_until_ready()
                link = jupyter.link(FIRST)
                instance.announce(link)
                show(link, None if no_browser else instance.page)
                typer.echo("Ctrl-C stops everything.")
                if jupyter.wait():
                    raise LabkitError(f"JupyterLab ended unexpectedly; its log is {jupyter.log}")
                typer.echo("JupyterLab was shut down.")
    except AlreadyRunning as running:
        typer.echo("`labkit lab` runs on these notebooks already, in another terminal. Here it starts nothing.")
        show(running.link, None if no_browser else running.page)
    except KeyboardInterrupt:
        typer.echo("\nStopped.")


def find_notebooks(clone: Path, brought: Path) -> tuple[Path, Path]:
    """The notebooks, and where a learner's copies of them belong. Raises LabkitError if this labkit has none."""
    if (clone / "notebooks" / FIRST).exists():
        return clone / "notebooks", clone / "work"
    if (brought / FIRST).exists():
        return brought, Path.cwd() / "work"
    raise LabkitError(
        f"this labkit came without its notebooks (there is no {brought / FIRST}): "
        "install it again, pip install --force-reinstall 'labkit[lab]', or use `make lab` in a clone of the repository"
    )


def prepare_work(source: Path, work: Path) -> None:
    """Make or refresh the learner's copies of `source` in `work`, and say what has changed. Raises LabkitError."""
    from labkit.cli.copies import copy_notebooks

    try:
        done = copy_notebooks(source, work)
    except OSError as error:
        raise LabkitError(
            f"the notebooks cannot be copied to {work} ({error.strerror or error}): make that folder writable"
        ) from error
    if done.made:
        typer.echo(f"Your copies of the notebooks are in {work}: edit them as you like.")
    for name in done.updated:
        typer.echo(f"{name} has a new version. It replaces your copy, which you had not edited.")
    for name, beside in done.kept.items():
        typer.echo(f"{name} has a new version, {beside}. Your copy stays, as you have edited it.")


def show(link: str, page: Path | None) -> None:
    """Open `page` in a browser, unless it is None; it leads to the address. Print the address in any case."""
    if page and _has_desktop() and _open(page):
        typer.echo(f"JupyterLab opens in your browser; its address is\n\n  {link}\n")
    else:
        why = "No browser on this machine. " if page else ""
        typer.echo(f"{why}JupyterLab is at\n\n  {link}\n")


def _has_desktop() -> bool:
    """Whether there is a desktop. Without one, Python would open a text browser in this terminal."""
    if sys.platform == "darwin" or os.environ.get("BROWSER"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open(page: Path) -> bool:
    import webbrowser

    try:
        return webbrowser.open(page.as_uri())
    except webbrowser.Error:
        return False


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
