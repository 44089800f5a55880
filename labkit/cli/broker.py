"""`labkit up`, `down` and `status`: the broker, without a notebook."""

from __future__ import annotations

from dataclasses import asdict

import typer

from labkit.cli.output import Json, say_json


def up() -> None:
    """Start the embedded broker and keep it, with its data, until `labkit down`."""
    from labkit.runtime.which_kafka import connect

    with connect() as connection:
        if connection.lease is None:
            typer.echo(f"Kafka is at {connection.cluster.bootstrap} already ({connection.origin}): nothing to start.")
            return
        connection.lease.pin()
        typer.echo(f"Kafka is at {connection.cluster.bootstrap}. `labkit down` ends it and removes its data.")


def down() -> None:
    """End the embedded broker, for everybody, and remove its data."""
    from labkit.runtime import shared_broker

    typer.echo("Stopped; its data is removed." if shared_broker.stop() else "No embedded broker was running.")


def status(as_json: Json = False) -> None:
    """Say which Kafka is running. Starts nothing; the exit code is 1 if there is none."""
    from labkit.lab import runs
    from labkit.runtime import shared_broker
    from labkit.runtime.which_kafka import running

    connection = running()
    embedded = shared_broker.status() if connection is None or connection.origin == "embedded" else None
    facts: dict[str, object] = {"running": connection is not None}
    if connection is not None:
        with connection:
            facts |= {
                "origin": connection.origin,
                "bootstrap": connection.cluster.bootstrap,
                "cluster_id": connection.cluster_id,
                "learner": runs.learner(),
            }
    if embedded is not None:
        users = max(0, embedded.users - (connection is not None))  # without the lease that `running` takes for a moment
        facts = {**asdict(embedded), **facts, "users": users, "folder": str(embedded.folder)}
    if as_json:
        say_json(facts)
    elif connection is None:
        kept = embedded is not None and embedded.pinned
        typer.echo("No Kafka is running; `labkit up` starts one" + (" on the data that was kept." if kept else "."))
    else:
        whose = runs.known_as(connection.origin)
        place = f"({connection.origin}, cluster {connection.cluster_id})"
        typer.echo(f"Kafka is at {connection.cluster.bootstrap} {place}, {whose}")
        if embedded is not None:
            until = "until `labkit down`" if embedded.pinned else "while somebody uses it"
            typer.echo(
                f"{users} user{'s' * (users != 1)}, {embedded.memory_mb} MB, {embedded.restarts} restarts, "
                f"runs {until}; data and log in {embedded.folder}"
            )
    if connection is None:
        raise typer.Exit(1)
