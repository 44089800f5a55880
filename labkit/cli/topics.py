"""`labkit topics` and `labkit lag`: the contents of Kafka, by the names that notebooks use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from labkit.cli.names import Learner, Name, hint_at_others, listed, resolve
from labkit.cli.output import Json, say_json, table

if TYPE_CHECKING:
    from labkit.runtime.which_kafka import Connection


def topics(
    learner: Learner = "",
    everything: Annotated[
        bool, typer.Option("--all", help="All topics, by full name: everybody's, of all runs, and Kafka's own.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List topics and how many records they have: your newest run's in each notebook, and those that no lab made."""
    from labkit.kafka.lag import end_offsets, start_offsets

    with kafka() as connection:
        there = connection.cluster.topics()
        own = [] if everything else listed((name for name in there if name[0] != "_"), learner)
        shown = [Name.parse(name) for name in there] if everything else own
        wanted = [name.full for name in shown]
        starts, ends = start_offsets(connection.cluster, wanted), end_offsets(connection.cluster, wanted)
    records = dict.fromkeys(wanted, 0)
    for (topic, partition), end in ends.items():
        records[topic] += max(0, end - starts.get((topic, partition), 0))
    shown.sort(key=lambda name: (name.learner, name.notebook, name.run, name.short))
    if as_json:
        facts = {name.full: {"partitions": there[name.full], "records": records[name.full]} for name in shown}
        say_json([{"topic": one.full, "short": one.short, **one.whose, **facts[one.full]} for one in shown])
    else:
        rows = (
            (*_whose(one), one.full if everything else one.short, there[one.full], records[one.full]) for one in shown
        )
        typer.echo(table(("learner", "notebook", "topic", "partitions", "records"), rows, "No topics."))
    if not everything:
        hint_at_others(there, learner)


def lag(
    group: Annotated[
        str, typer.Argument(help="A consumer group, by its full name or its deployment's. Without one: list them.")
    ] = "",
    learner: Learner = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Without a group: list everybody's, of all runs, by full name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say how many records a consumer group has still to handle, by partition."""
    from labkit.kafka.errors import LabkitError
    from labkit.kafka.lag import committed_offsets
    from labkit.kafka.lag import lag as behind

    with kafka() as connection:
        groups = connection.cluster.groups()
        if not group:
            shown = [Name.parse(one) for one in groups] if everything else listed(groups, learner)
            shown.sort(key=lambda one: (one.learner, one.notebook, one.run, one.short))
            if as_json:
                say_json([{"group": one.full, "short": one.short, **one.whose} for one in shown])
            else:
                rows = ((*_whose(one), one.full if everything else one.short) for one in shown)
                typer.echo(table(("learner", "notebook", "group"), rows, "There is no consumer group."))
            if not everything:
                hint_at_others(groups, learner)
            return
        name = resolve("group", group, groups, learner)
        full = name.full
        committed = committed_offsets(connection.cluster, full)
        if not committed:
            raise LabkitError(
                f"group {full} has committed nothing yet, so its lag is unknown: let its consumers handle a record "
                "first. `labkit topics` tells whether there are any; in a notebook, run the cell that starts the group"
            )
        lags = behind(connection.cluster, full, sorted({topic for topic, _ in committed}))
    if as_json:
        partitions = [
            {"topic": topic, "partition": partition, "committed": committed.get((topic, partition)), "lag": count}
            for (topic, partition), count in sorted(lags.items())
        ]
        say_json({"group": full, **name.whose, "lag": sum(lags.values()), "partitions": partitions})
    else:
        typer.echo(f"{name.described}: {sum(lags.values()):,} records behind")
        behind_by = ((Name.parse(topic).short, partition, count) for (topic, partition), count in sorted(lags.items()))
        typer.echo(table(("topic", "partition", "lag"), behind_by))


def _whose(name: Name) -> tuple[str, str]:
    return name.learner or "–", name.notebook or "–"


def kafka() -> Connection:
    """The Kafka that is running. Raises LabkitError when there is none."""
    from labkit.kafka.errors import LabkitError
    from labkit.runtime.which_kafka import running

    connection = running()
    if connection is None:
        raise LabkitError("no Kafka is running: `labkit up` or `make lab` starts one")
    return connection
