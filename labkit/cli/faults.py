"""`labkit fault`: does in a terminal what the buttons of a notebook do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from labkit.cli.names import Name
from labkit.cli.output import Json, say_json, table

if TYPE_CHECKING:
    from labkit.lab.faults.control_socket import TargetState


def fault(
    target: Annotated[
        str, typer.Argument(help="A pod, a server or a service; or notebook/target. Without one: list them.")
    ] = "",
    verb: Annotated[str, typer.Argument(help="kill, freeze, slow, fail, cut, restart; recover mends.")] = "",
    seconds: Annotated[float | None, typer.Option(help="How long it lasts. By default until you recover it.")] = None,
    share: Annotated[float | None, typer.Option(help="For fail: the share of requests refused, 0 to 1.")] = None,
    by: Annotated[float | None, typer.Option(help="For slow: the delay in seconds.")] = None,
    count: Annotated[int | None, typer.Option(help="For cut: the number of connections.")] = None,
    as_json: Json = False,
) -> None:
    """Break something that runs in a notebook, or mend it; without arguments, list what there is."""
    from labkit.kafka.errors import LabkitError
    from labkit.lab.faults.control_socket import Order, ask

    there = _targets()
    if not target:
        _list(there, as_json)
        return
    notebook, _, wanted = target.rpartition("/")
    found = [one for one in there if one[2].target == wanted and notebook in ("", one[0].notebook)]
    if not found:
        known = ", ".join(sorted({f"{name.notebook}/{one.target}" for name, _, one in there}))
        raise LabkitError(f"none of your running notebooks has {target!r}; they have: {known}")
    name, folder, _ = found[-1]  # the newest
    given = {"seconds": seconds, "share": share, "by": by, "count": count}
    answer = ask(folder, Order(wanted, verb, {option: value for option, value in given.items() if value is not None}))
    if answer is None:
        raise LabkitError(f"notebook {name.notebook} has just ended")
    if answer.refused:
        raise LabkitError(answer.refused)
    say_json({"target": wanted, "said": answer.said, **name.whose}) if as_json else typer.echo(
        f"notebook {name.notebook}, run {name.run}: {answer.said}"
    )


def _targets() -> list[tuple[Name, Path, TargetState]]:
    """All targets in the learner's labs on this machine, with the labs' folders; those of the newest lab come last.

    Raises LabkitError when no lab is running.
    """
    from labkit.kafka.errors import LabkitError
    from labkit.lab import runs
    from labkit.lab.faults.control_socket import Order, ask

    own = [name for prefix, _ in runs.living() if (name := Name.parse(prefix)).learner == runs.learner()]
    found = []
    for name in sorted(own, key=lambda name: name.run):
        folder = runs.folder_of(name.run)
        try:
            if answer := ask(folder, Order()):
                found += [(name, folder, one) for one in answer.targets]
        except LabkitError as error:  # the others can be broken all the same
            typer.echo(f"notebook {name.notebook}, run {name.run}: {error}", err=True)
    if not found:
        raise LabkitError(f"no lab of {runs.learner()} is running: run a notebook's cells, from the first on")
    return found


def _list(there: list[tuple[Name, Path, TargetState]], as_json: bool) -> None:
    if as_json:
        from msgspec import to_builtins

        say_json([{**to_builtins(one), **name.whose} for name, _, one in there])
        return
    rows = (
        (name.notebook, one.target, one.state, ", ".join(one.stands) or "–", ", ".join(one.can) or "–")
        for name, _, one in there
    )
    typer.echo(table(("notebook", "target", "is", "stands", "what can be done"), rows))
