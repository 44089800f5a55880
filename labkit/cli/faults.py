"""`labkit fault`: what a notebook's buttons do to a service, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from labkit.cli.names import Learner, Name, resolve
from labkit.cli.output import Json, say_json, say_table
from labkit.cli.topics import kafka

if TYPE_CHECKING:
    from labkit.services.faults import Misbehaviour


def fault(
    service: Annotated[str, typer.Argument(help="The service. None: says which misbehave, and how.")] = "",
    errors: Annotated[float, typer.Option(help="The share of requests that it refuses, 0 to 1.")] = 0.0,
    status: Annotated[int, typer.Option(help="With which HTTP status.")] = 503,
    delay: Annotated[float, typer.Option(help="Seconds that each request waits before.")] = 0.0,
    seconds: Annotated[float | None, typer.Option(help="How long. By default until it is cleared.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Have it behave again.")] = False,
    topic: Annotated[str, typer.Option(help="The topic with the faults, of several runs' the newest.")] = "",
    learner: Learner = "",
    as_json: Json = False,
) -> None:
    """Have a service of a running notebook misbehave, or behave again."""
    from labkit.kafka.errors import LabkitError
    from labkit.kafka.topics import Topic
    from labkit.services.faults import TOPIC, Misbehaviour, ServiceFaults

    if clear and not service:
        raise LabkitError("say which service is to behave again: labkit fault payments-provider --clear")
    if service and not (clear or errors or delay):
        raise LabkitError(f"say what {service} is to do: --errors 1, --delay 2, or --clear")
    with kafka() as connection:
        there = connection.cluster.topics()
        name = resolve("topic", topic or TOPIC, there, learner)
        faults = ServiceFaults(Topic(connection.cluster, name.full, there[name.full], Misbehaviour))
        faults.wait_ready()
        if clear:
            faults.clear(service)
        elif service:
            faults.set(service, errors, status, delay, seconds)
        told = {one: faults.of(one) for one in faults.store}
        faults.close()
    _say(name, {service: one for service, one in sorted(told.items()) if one != Misbehaviour()}, as_json)


def _say(name: Name, told: dict[str, Misbehaviour], as_json: bool) -> None:
    if as_json:
        rows = [
            {"service": service, "errors": one.errors, "status": one.status, "delay": one.delay, "until": one.until}
            for service, one in told.items()
        ]
        say_json([{**row, **name.whose} for row in rows])
        return
    typer.echo(name.told)
    if not told:
        typer.echo("All services behave.")
    else:
        say_table(
            ("service", "errors", "status", "delay"),
            ((service, f"{one.errors:.0%}", one.status, f"{one.delay:g} s") for service, one in told.items()),
        )
