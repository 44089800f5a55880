"""`labkit topics` and `labkit lag`: what is in Kafka, by the names that notebooks use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from labkit.cli.output import Json, say_json, say_table

if TYPE_CHECKING:
    from labkit.runtime.connect import Connection

_NAME = re.compile(r"labkit\.(?P<learner>[^.]+)\.(?P<notebook>[^.]+)\.(?P<run>[^.]+)\.(?P<short>.+)")


@dataclass(frozen=True)
class Name:
    """A topic's or group's name, taken apart; for those no lab made, `short` is all of it."""

    full: str
    learner: str
    notebook: str
    run: str
    short: str

    @classmethod
    def parse(cls, full: str) -> Name:
        found = _NAME.fullmatch(full)
        return cls(full, **found.groupdict()) if found else cls(full, "", "", "", full)


def newest(names: Iterable[str]) -> list[Name]:
    """Without what older runs of the same notebook left. Run ids sort by time."""
    parsed = [Name.parse(name) for name in names]
    latest: dict[tuple[str, str], str] = {}
    for name in parsed:
        place = (name.learner, name.notebook)
        latest[place] = max(latest.get(place, ""), name.run)
    return [name for name in parsed if name.run == latest[name.learner, name.notebook]]


def resolve(wanted: str, names: Iterable[str]) -> str:
    """The full name that is meant by a full or a short one: of several runs' the newest.

    Raises LabkitError naming what there is.
    """
    from labkit.kafka.errors import LabkitError

    names = list(names)
    if wanted in names:
        return wanted
    found = [name for name in map(Name.parse, names) if name.short == wanted]
    if found:
        return max(found, key=lambda name: name.run).full
    known = ", ".join(sorted({name.short for name in newest(names)})) or "none"
    which = f"there is no {wanted!r}" if wanted else "name one"
    raise LabkitError(f"{which}; there are: {known}")


def topics(
    everything: Annotated[
        bool, typer.Option("--all", help="Older runs' and Kafka's own topics too, by full name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List topics with their number of records: those of each notebook's newest run."""
    from labkit.kafka.lag import end_offsets, start_offsets

    with kafka() as connection:
        there = connection.cluster.topics()
        shown = [Name.parse(name) for name in there] if everything else newest(n for n in there if n[0] != "_")
        wanted = [name.full for name in shown]
        starts, ends = start_offsets(connection.cluster, wanted), end_offsets(connection.cluster, wanted)
    records = dict.fromkeys(wanted, 0)
    for (topic, partition), end in ends.items():
        records[topic] += max(0, end - starts.get((topic, partition), 0))
    shown.sort(key=lambda name: (name.notebook, name.run, name.short))
    if as_json:
        say_json(
            [
                {
                    "topic": name.full,
                    "short": name.short,
                    "notebook": name.notebook,
                    "run": name.run,
                    "partitions": there[name.full],
                    "records": records[name.full],
                }
                for name in shown
            ]
        )
    elif not shown:
        typer.echo("No topics.")
    else:
        say_table(
            ("notebook", "topic", "partitions", "records"),
            (
                (name.notebook or "–", name.full if everything else name.short, there[name.full], records[name.full])
                for name in shown
            ),
        )


def lag(
    group: Annotated[
        str, typer.Argument(help="A consumer group: its full name, or the deployment's. None: says which there are.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Say how many records a consumer group has still to finish, by partition."""
    from labkit.kafka.errors import LabkitError
    from labkit.kafka.lag import committed_offsets
    from labkit.kafka.lag import lag as behind

    with kafka() as connection:
        groups = connection.cluster.groups()
        if not group:
            names = sorted({name.short for name in newest(groups)})
            say_json(names) if as_json else typer.echo("\n".join(names) or "There is no consumer group.")
            return
        full = resolve(group, groups)
        committed = committed_offsets(connection.cluster, full)
        if not committed:
            raise LabkitError(
                f"group {full} has not committed anything yet, so nothing says where it is: let its consumers finish a "
                "record first. `labkit topics` tells whether there are any; in a notebook, run the cell that starts it"
            )
        lags = behind(connection.cluster, full, sorted({topic for topic, _ in committed}))
    if as_json:
        partitions = [
            {"topic": topic, "partition": partition, "committed": committed.get((topic, partition)), "lag": count}
            for (topic, partition), count in sorted(lags.items())
        ]
        say_json({"group": full, "lag": sum(lags.values()), "partitions": partitions})
    else:
        typer.echo(f"{full}: {sum(lags.values()):,} records behind")
        say_table(
            ("topic", "partition", "lag"),
            ((Name.parse(topic).short, partition, count) for (topic, partition), count in sorted(lags.items())),
        )


def kafka() -> Connection:
    """The Kafka that is running. Raises LabkitError when there is none."""
    from labkit.kafka.errors import LabkitError
    from labkit.runtime.connect import running

    connection = running()
    if connection is None:
        raise LabkitError("no Kafka is running: `labkit up` or `make lab` starts one, `labkit status` tells")
    return connection
