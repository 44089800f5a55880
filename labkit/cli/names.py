"""Which topic or group a name means, and whose it is. A short name means one's own, so that nobody acts on another
learner's by accident."""

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
    """The parts of a topic's or group's name. If no lab made it, `short` is the whole name."""

    full: str
    learner: str
    notebook: str
    run: str
    short: str

    @classmethod
    def parse(cls, full: str) -> Name:
        from labkit.lab import runs

        prefix = runs.prefix_of(full)
        if whose := runs.CLASS_TOPIC.fullmatch(full):
            return cls(full, whose[1], "", "", "class")
        if prefix is None:
            return cls(full, "", "", "", full)
        _, learner, notebook, run, _ = prefix.split(".")
        return cls(full, learner, notebook, run, runs.short_names(full))

    @property
    def described(self) -> str:
        """The short name, and whose it is, in words."""
        return f"{self.short} of {self.learner}, notebook {self.notebook}, run {self.run}" if self.run else self.full

    @property
    def whose(self) -> dict[str, str]:
        """Whose it is, as fields of an answer in JSON."""
        return {"learner": self.learner, "notebook": self.notebook, "run": self.run}


def newest(names: Iterable[str]) -> list[Name]:
    """These names, without those that older runs of the same notebook have left. Run ids sort by time."""
    parsed = [Name.parse(name) for name in names]
    latest: dict[tuple[str, str], str] = {}
    for name in parsed:
        notebook = (name.learner, name.notebook)
        latest[notebook] = max(latest.get(notebook, ""), name.run)
    return [name for name in parsed if name.run == latest[name.learner, name.notebook]]


def listed(names: Iterable[str], learner: str = "") -> list[Name]:
    """The names to list for a learner: those of their newest runs, and those that no lab made."""
    from labkit.lab import runs

    whose = runs.learner(learner)
    return [name for name in newest(names) if name.learner in (whose, "")]


def resolve(what: str, wanted: str, names: Iterable[str], learner: str = "") -> Name:
    """The name that is meant by a full name, or by a short one in the learner's newest run. `what` is a word for it.

    Raises LabkitError, which lists the names that exist, or says who has this one.
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
    raise LabkitError(f"{f'there is no {what} called {wanted!r}' if wanted else f'name a {what}'}; there are: {known}")


def hint_at_others(names: Iterable[str], learner: str = "") -> None:
    """If a learner has nothing of their own to see, say who has something."""
    from labkit.lab import runs

    whose, there = runs.learner(learner), sorted({Name.parse(name).learner for name in names} - {""})
    if there and whose not in there:
        others = f"{' and '.join(there)} {'has' if len(there) == 1 else 'have'}"
        typer.echo(f"{whose} has nothing here, but {others}: add --learner {there[0]}.", err=True)
