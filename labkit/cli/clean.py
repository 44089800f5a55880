"""`labkit clean`: removes what labs have left on the cluster, those of a machine that is gone, too."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated

import typer

from labkit.cli.names import Learner, hint_at_others
from labkit.cli.output import table
from labkit.cli.topics import kafka
from labkit.kafka.errors import LabkitError

if TYPE_CHECKING:
    from labkit.lab.remains import Remains

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def clean(
    learner: Learner = "",
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="2h", help="Only runs that began before that: 90s, 30m, 2h, 1d.")
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="Everybody's.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove topics and groups of runs that have ended: by default yours. A run that lives stays.

    Of runs on other machines, only the members of their groups are seen: one without a consumer counts as ended.
    With --learner or --all, and without --older-than, a learner of whom nothing lives loses the last verdicts, too.
    """
    from labkit.lab import runs
    from labkit.lab.remains import remains, remove

    if everything and learner:
        raise LabkitError("--all is everybody's: leave out --all, or --learner")
    before = time.time() - _seconds(older_than)
    with kafka() as connection:
        cluster, there = connection.cluster, remains(connection.cluster)
        chosen = [one for one in there if everything or one.learner == runs.learner(learner)]
        alive = {one.learner for one in chosen if one.life}
        if older_than:
            chosen = [one for one in chosen if one.run and (runs.began(one.run) or 0.0) <= before]
        elif not everything and not learner:
            chosen = [one for one in chosen if one.run]
        ended = [one for one in chosen if not one.life and (one.run or one.learner not in alive)]
        if chosen:
            typer.echo(_listed(chosen, ended))
        if not ended:
            if chosen:
                raise LabkitError(
                    "nothing was removed: what is there lives. Close its lab first (`lab.close()`); "
                    "a lab that was killed has ended 6 s later"
                )
            typer.echo("There is nothing to remove.")
            if not everything:
                hint_at_others((name for one in there for name in one.topics), learner)
            return
        what = _counted(ended)
        if not yes and not sys.stdin.isatty():
            typer.echo(f"This would remove {what}. Nothing was removed, as there is no terminal to ask at: add --yes.")
            return
        if not yes and not typer.confirm(f"Remove {what} at {cluster.bootstrap} for good?", err=True):
            raise LabkitError("nothing was removed")
        left, why = remove(cluster, ended)
    if left:
        reasons = why or ["A group has got a member again: try once more when it has left."]
        there_still = "".join(f"\n  {name}" for name in left)
        raise LabkitError(f"removed: {_counted(ended, left)}. Still there:{there_still}\n" + "\n".join(reasons))
    typer.echo(f"Removed {what}.")


def _listed(chosen: list[Remains], ended: list[Remains]) -> str:
    """A row for each run: whose it is, since when, how much of it there is, and why it stays if it does."""
    from labkit.lab import runs

    rows = (
        (
            one.learner,
            one.notebook or "–",
            one.run or "last verdicts",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(began)) if (began := runs.began(one.run)) else "–",
            len(one.topics),
            len(one.groups),
            "" if one in ended else f"stays: {one.life or 'a run of this learner lives'}",
        )
        for one in chosen
    )
    return table(("learner", "notebook", "run", "since", "topics", "groups", ""), rows)


def _counted(ended: list[Remains], left: Collection[str] = ()) -> str:
    """How many topics and groups these are, without those that are left."""
    counts = (
        ("topic", sum(name not in left for one in ended for name in one.topics)),
        ("group", sum(name not in left for one in ended for name in one.groups)),
    )
    return " and ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts if count) or "nothing"


def _seconds(text: str) -> float:
    """Seconds of a time such as 2h; 0 for no text. Raises LabkitError."""
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if text and not found:
        raise LabkitError(f"--older-than is a number and s, m, h or d, such as 2h, not {text!r}")
    return int(found[1]) * UNITS[found[2]] if found else 0.0
