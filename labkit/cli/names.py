"""Which topic or group is meant by a name, and whose it is. A short name means one's own; nobody acts on another's
by accident."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import typer

Learner = Annotated[
    str, typer.Option("--learner", metavar="NAME", help="Whose. By default yours: LABKIT_LEARNER, else your user name.")
]


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
        from labkit.lab import runs

        prefix = runs.prefix_of(full)
        if prefix is None:
            return cls(full, "", "", "", full)
        _, learner, notebook, run, _ = prefix.split(".")
        return cls(full, learner, notebook, run, runs.short_names(full))

    @property
    def told(self) -> str:
        """The short name, and whose it is, in words."""
        return f"{self.short} of {self.learner}, notebook {self.notebook}, run {self.run}" if self.run else self.full

    @property
    def whose(self) -> dict[str, str]:
        """Whose it is, as fields of an answer in JSON."""
        return {"learner": self.learner, "notebook": self.notebook, "run": self.run}


def newest(names: Iterable[str]) -> list[Name]:
    """Without what older runs of the same notebook left. Run ids sort by time."""
    parsed = [Name.parse(name) for name in names]
    latest: dict[tuple[str, str], str] = {}
    for name in parsed:
        place = (name.learner, name.notebook)
        latest[place] = max(latest.get(place, ""), name.run)
    return [name for name in parsed if name.run == latest[name.learner, name.notebook]]


def listed(names: Iterable[str], learner: str = "") -> list[Name]:
    """What a learner is shown: the newest runs' of their own, and what no lab made."""
    from labkit.lab import runs

    whose = runs.learner(learner)
    return [name for name in newest(names) if name.learner in (whose, "")]


def resolve(what: str, wanted: str, names: Iterable[str], learner: str = "") -> Name:
    """What is meant by a full name, or by a short one: of the learner's runs the newest. `what` is a word for it.

    Raises LabkitError naming what there is, or who has it.
    """
    from labkit.kafka.errors import LabkitError
    from labkit.lab import runs

    whose, names = runs.learner(learner), list(names)
    parsed = [Name.parse(name) for name in names]
    full = [name for name in parsed if name.full == wanted]
    short = [name for name in parsed if name.short == wanted]
    own = [name for name in short if name.learner == whose]
    # A short name means a learner's own, though somebody else's full name may be the same.
    if found := own or [name for name in full if not learner or name.learner == whose]:
        return max(found, key=lambda name: name.run)
    if others := sorted({name.learner for name in short} - {""}):
        raise LabkitError(
            f"{whose} has no {what} called {wanted!r}; {' and '.join(others)} {'has' if len(others) == 1 else 'have'} "
            f"one: add --learner {others[0]}"
        )
    there = [name for name in newest(names) if name.learner == whose or not (learner or name.learner)]
    known = ", ".join(sorted({name.short for name in there})) or "none"
    raise LabkitError(f"{f'there is no {what} called {wanted!r}' if wanted else 'name one'}; there are: {known}")


def hint_at_others(names: Iterable[str], learner: str = "") -> None:
    """Tell somebody who is shown nothing of their own who has something."""
    from labkit.lab import runs

    whose, there = runs.learner(learner), sorted({Name.parse(name).learner for name in names} - {""})
    if there and whose not in there:
        said = f"{whose} has nothing here. There is something of {', '.join(there)}: add --learner {there[0]}."
        typer.echo(said, err=True)
