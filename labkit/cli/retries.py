"""`labkit blocked`, `skip`, `resume` and `dlq`: what a notebook's desk does, for a terminal and for production."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labkit.cli.output import Json, say_json, say_table
from labkit.cli.topics import Name, kafka, newest
from labkit.kafka.errors import LabkitError

if TYPE_CHECKING:
    from labkit.kafka.topics import Topic
    from labkit.patterns.blocked_lanes import Blocked, BlockedLanes
    from labkit.patterns.dead_letters import DeadLetter, DeadLetters

Group = Annotated[str, typer.Argument(help="A consumer group with retries: its full name, or the deployment's.")]
Places = Annotated[list[str] | None, typer.Argument(help="topic/partition/offset, as `list` shows them.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

dlq = typer.Typer(help="Review the dead letters of a consumer group.", no_args_is_help=True)


@dataclass(frozen=True)
class _Retried:
    """A topic that a group reads with retries."""

    topic: Topic[Any]
    group: str


def blocked(group: Group, as_json: Json = False) -> None:
    """Say which records a group cannot get past: where, since when, when they are tried again, and why."""
    with _lanes(group) as found:
        now = [one for lanes in found for one in lanes.values()]
    if as_json:
        say_json([_plain(one) for one in now])
    elif not now:
        typer.echo("Nothing is blocked.")
    else:
        say_table(
            ("record", "key", "since", "attempts", "next", "error"),
            (
                (_short(one.place), one.key, _clock(one.since), one.attempts, _clock(one.next_attempt), one.error)
                for one in now
            ),
        )


def skip(
    group: Group,
    place: Annotated[str, typer.Argument(help="The record: topic/partition/offset, as `blocked` shows it.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Whatever fails, from now on until `resume`.")] = False,
    as_json: Json = False,
) -> None:
    """Let a blocked record be, once; it leaves a trace."""
    if bool(place) == everything:
        raise LabkitError("name the record to skip, as `labkit blocked` shows it, or say --all")
    with _lanes(group) as found:
        if everything:
            count = sum(lanes.skip_all() for lanes in found)
            told: object = {"skipped": count, "until": "resume"}
            said = f"Skipped {count}. Whatever fails is skipped until: labkit resume {group}"
        else:
            known = {one: lanes for lanes in found for one in lanes}
            full = _resolved(place, known, "blocked")
            one = known[full].skip(full)
            told, said = _plain(one), f"Skipped {_short(one.place)} ({one.key}): {one.error}"
    say_json(told) if as_json else typer.echo(said)


def resume(group: Group, as_json: Json = False) -> None:
    """Take `skip --all` back: the next failure blocks again."""
    with _lanes(group) as found:
        skipping = [lanes for lanes in found if lanes.skipping]
        for lanes in skipping or found[:1]:
            lanes.resume()
    say_json({"resumed": True}) if as_json else typer.echo("The next failure blocks again.")


@dlq.command("list")
def list_letters(group: Group, as_json: Json = False) -> None:
    """List them, oldest first."""
    with _queues(group) as found:
        letters = [letter for queue in found for letter in queue.values()]
    if as_json:
        say_json([_plain(one) for one in letters])
    elif not letters:
        typer.echo("No dead letters.")
    else:
        say_table(
            ("record", "key", "since", "attempts", "error"),
            ((_short(one.place), one.key, _clock(one.at), one.attempts, one.error) for one in letters),
        )


@dlq.command("show")
def show(
    group: Group, place: Annotated[str, typer.Argument(help="topic/partition/offset")], as_json: Json = False
) -> None:
    """Show one: its payload, where it came from, all attempts, the last error."""
    with _queues(group) as found:
        known = {one: queue for queue in found for one in queue}
        full = _resolved(place, known, "among the dead letters")
        letter = known[full][full]
    if as_json:
        say_json(_plain(letter))
        return
    times = {name: _clock(at) for name in ("timestamp", "at", "replayed") if (at := getattr(letter, name))}
    for name, value in {**_plain(letter), **times, "failed": ", ".join(map(_clock, letter.failed))}.items():
        typer.echo(f"{name}: {value}")


@dlq.command("replay")
def replay(
    group: Group,
    places: Places = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    as_json: Json = False,
) -> None:
    """Put some back where their retries start. Each leaves the queue once it is handled."""
    count = _change(group, places, everything, "replay")
    say_json({"replayed": count}) if as_json else typer.echo(f"{count:,} put back; each leaves once it is handled.")


@dlq.command("purge")
def purge(
    group: Group,
    places: Places = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove some for good."""
    what = "all dead letters" if everything else ", ".join(places or [])
    if not yes and (places or everything) and not typer.confirm(f"Remove {what} of {group} for good?", err=True):
        raise LabkitError("nothing was removed")
    count = _change(group, places, everything, "purge")
    say_json({"purged": count}) if as_json else typer.echo(f"{count:,} removed.")


def _change(group: str, places: list[str] | None, everything: bool, verb: str) -> int:
    if bool(places) == everything:
        raise LabkitError(f"name the records to {verb}, as `labkit dlq list` shows them, or say --all")
    with _queues(group) as found:
        known = {one: queue for queue in found for one in queue}
        full = [*known] if everything else [_resolved(one, known, "among the dead letters") for one in places or []]
        count = 0
        for queue in found:
            if mine := [one for one in full if known[one] is queue]:
                count += queue.replay(*mine) if verb == "replay" else queue.purge(*mine)
    return count


@contextmanager
def _lanes(group: str) -> Iterator[list[BlockedLanes]]:
    from labkit.patterns.blocked_lanes import BlockedLanes

    with ExitStack() as stack:
        yield [stack.enter_context(BlockedLanes(one.topic, one.group)) for one in _retried(group)]


@contextmanager
def _queues(group: str) -> Iterator[list[DeadLetters]]:
    from labkit.patterns.dead_letters import DeadLetters

    with ExitStack() as stack:
        yield [stack.enter_context(DeadLetters(one.topic, one.group)) for one in _retried(group)]


def _retried(group: str) -> list[_Retried]:
    """The topics that a group reads with retries. Raises LabkitError naming the groups that do."""
    from labkit.kafka.topics import Topic
    from labkit.patterns.blocked_lanes import LANES
    from labkit.patterns.trails import own_topic

    with kafka() as connection:
        there, groups = connection.cluster.topics(), connection.cluster.groups()
        cluster = connection.cluster
        names = [name for name in there if name.endswith(f"_{LANES}")]
        # A group whose consumers are all gone may be forgotten by Kafka; its topics are not.
        told = {name.removesuffix(f"_{LANES}").rpartition("_")[2] for name in names}
        found: list[_Retried] = []
        for full in _meant(group, [*groups, *told]):
            for source, count in there.items():
                with suppress(LabkitError):  # its name is too long to have such topics
                    if own_topic(source, full, LANES) in names:
                        found.append(_Retried(Topic(cluster, source, count, dict), full))
            if found:
                return found
    known = ", ".join(sorted({Name.parse(one).short for one in (name.full for name in newest(told))})) or "none"
    raise LabkitError(f"there is no group {group!r} with retries; there are: {known}")


def _meant(group: str, groups: list[str]) -> list[str]:
    """The full names that may be meant: itself, or of several runs' the newest first."""
    short = sorted({one for one in groups if Name.parse(one).short == group}, key=lambda one: Name.parse(one).run)
    return [group, *reversed(short)]


def _resolved(place: str, known: dict[str, Any], where: str) -> str:
    """The full place that is meant by a full or a short one."""
    found = [one for one in known if place in (one, _short(one))]
    if not found:
        raise LabkitError(f"{place} is not {where}; there are: {', '.join(map(_short, known)) or 'none'}")
    return found[0]


def _plain(one: Blocked | DeadLetter) -> dict[str, Any]:
    import msgspec

    return {"place": one.place, **{k: v for k, v in msgspec.to_builtins(one).items() if k != "type"}}


def _short(place: str) -> str:
    topic, _, rest = place.partition("/")
    return f"{Name.parse(topic).short}/{rest}"


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))
