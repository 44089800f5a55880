"""`labkit`: does in a terminal, and in production, what a notebook's dashboard does."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from labkit.cli import broker, classroom, clean, doctor, faults, fetch, lab, retries, topics
from labkit.kafka.errors import LabkitError


class _Commands(TyperGroup):
    """Prints only the message of an error that labkit raises on purpose. A traceback means a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LabkitError as error:
            typer.echo(f"labkit: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo(err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # as in `labkit topics | head`
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=_Commands,
    help="Learn event-driven architecture by breaking it, on a real Apache Kafka.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("lab")(lab.lab)
app.command("doctor")(doctor.doctor)
app.command("fetch")(fetch.fetch)
app.command("up")(broker.up)
app.command("down")(broker.down)
app.command("status")(broker.status)
app.command("topics")(topics.topics)
app.command("lag")(topics.lag)
app.command("clean")(clean.clean)
app.command("class")(classroom.class_)
app.command("fault")(faults.fault)
app.command("blocked")(retries.blocked)
app.command("skip")(retries.skip)
app.command("resume")(retries.resume)
app.add_typer(retries.dlq, name="dlq")
