"""`labkit blocked`, `skip`, `resume` and `dlq`: a notebook's retry console, in a terminal and in production."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labkit.cli.names import Learner, Name, resolve
from labkit.cli.output import Json, say_json, table
from labkit.cli.topics import kafka
from labkit.kafka.errors import LabkitError
from labkit.lab.history import clock

if TYPE_CHECKING:
    from labkit.kafka.topics import Topic
    from labkit.patterns.blocked_lanes import Blocked, BlockedLanes
    from labkit.patterns.dead_letters import DeadLetter, DeadLetters

Group = Annotated[str, typer.Argument(help="A consumer group with retries, by its full name or its deployment's.")]
Places = Annotated[list[str] | None, typer.Argument(help="The records: topic/partition/offset, as `list` shows them.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

dlq = typer.Typer(help="Review the dead letters of a consumer group.", no_args_is_help=True)


def blocked(group: Group, learner: Learner = "", as_json: Json = False) -> None:
    """Say which records block a group: where, since when, why, and when the next attempt is."""
    with _lanes(group, learner) as (name, found):
        now = [one for lanes in found for one in lanes.values()]
    rows = (
        (_short(one.place), one.key, clock(one.since), one.attempts, clock(one.next_attempt), one.error) for one in now
    )
    said = table(("record", "key", "since", "attempts", "next", "error"), rows, "Nothing is blocked.")
    _say(name, [_plain(one) for one in now], said, as_json)


def skip(
    group: Group,
    place: Annotated[str, typer.Argument(help="The record: topic/partition/offset, as `blocked` shows it.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Skip all that fail, from now on until `resume`.")] = False,
    learner: Learner = "",
    as_json: Json = False,
) -> None:
    """Skip a blocked record, once. The skip leaves a trace."""
    if bool(place) == everything:
        raise LabkitError("name the record to skip, as `labkit blocked` shows it, or say --all")
    with _lanes(group, learner) as (name, found):
        if everything:
            count = sum(lanes.skip_all() for lanes in found)
            answer: dict[str, Any] = {"skipped": count, "until": "resume"}
            said = f"Skipped {count}. Every record that fails is skipped until: labkit resume {name.full}"
        else:
            known = {one: lanes for lanes in found for one in lanes}
            full = _resolved(place, known, "blocked")
            one = known[full].skip(full)
            answer, said = _plain(one), f"Skipped {_short(one.place)} ({one.key}): {one.error}"
    _say(name, answer, said, as_json)


def resume(group: Group, learner: Learner = "", as_json: Json = False) -> None:
    """End `skip --all`: the next failure blocks again."""
    with _lanes(group, learner) as (name, found):
        skipping = [lanes for lanes in found if lanes.skipping]
        for lanes in skipping or found[:1]:
            lanes.resume()
    _say(name, {"resumed": True}, "The next failure blocks again.", as_json)


@dlq.command("list")
def list_letters(group: Group, learner: Learner = "", as_json: Json = False) -> None:
    """List the dead letters, oldest first."""
    with _queues(group, learner) as (name, found):
        letters = [letter for queue in found for letter in queue.values()]
    rows = ((_short(one.place), one.key, clock(one.at), one.attempts, one.error) for one in letters)
    said = table(("record", "key", "since", "attempts", "error"), rows, "No dead letters.")
    _say(name, [_plain(one) for one in letters], said, as_json)


@dlq.command("show")
def show(
    group: Group,
    place: Annotated[str, typer.Argument(help="topic/partition/offset")],
    learner: Learner = "",
    as_json: Json = False,
) -> None:
    """Show one dead letter: its payload, where it came from, its attempts, the last error."""
    with _queues(group, learner) as (name, found):
        known = {one: queue for queue in found for one in queue}
        full = _resolved(place, known, "among the dead letters")
        letter = known[full][full]
    times = {field: clock(at) for field in ("timestamp", "at", "replayed") if (at := getattr(letter, field))}
    shown = {**_plain(letter), **times, "failed": ", ".join(map(clock, letter.failed))}
    _say(name, _plain(letter), "\n".join(f"{field}: {value}" for field, value in shown.items()), as_json)


@dlq.command("replay")
def replay(
    group: Group,
    places: Places = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    learner: Learner = "",
    as_json: Json = False,
) -> None:
    """Put dead letters back where their retries start. Each leaves the queue once it is handled."""
    name, count = _change(group, learner, places, everything, "replay")
    _say(name, {"replayed": count}, f"{count:,} put back; each leaves once it is handled.", as_json)


@dlq.command("purge")
def purge(
    group: Group,
    places: Places = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    learner: Learner = "",
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove dead letters for good."""
    what = "all dead letters" if everything else ", ".join(places or [])
    name, count = _change(group, learner, places, everything, "purge", "" if yes else f"Remove {what} of")
    _say(name, {"purged": count}, f"{count:,} removed.", as_json)


def _change(
    group: str, learner: str, places: list[str] | None, everything: bool, verb: str, question: str = ""
) -> tuple[Name, int]:
    """Replay or purge; returns whose dead letters, and how many. Asks the question first, if there is one."""
    if bool(places) == everything:
        raise LabkitError(f"name the records to {verb}, as `labkit dlq list` shows them, or say --all")
    with _queues(group, learner) as (name, found):
        if question and not typer.confirm(f"{question} {name.described} for good?", err=True):
            raise LabkitError("nothing was removed")
        known = {one: queue for queue in found for one in queue}
        full = [*known] if everything else [_resolved(one, known, "among the dead letters") for one in places or []]
        count = 0
        for queue in found:
            if mine := [one for one in full if known[one] is queue]:
                count += queue.replay(*mine) if verb == "replay" else queue.purge(*mine)
    return name, count


@contextmanager
def _lanes(group: str, learner: str) -> Iterator[tuple[Name, list[BlockedLanes]]]:
    from labkit.patterns.blocked_lanes import BlockedLanes

    name, topics = _retried(group, learner)
    with ExitStack() as stack:
        yield name, [stack.enter_context(BlockedLanes(topic, name.full)) for topic in topics]


@contextmanager
def _queues(group: str, learner: str) -> Iterator[tuple[Name, list[DeadLetters]]]:
    from labkit.patterns.dead_letters import DeadLetters

    name, topics = _retried(group, learner)
    with ExitStack() as stack:
        yield name, [stack.enter_context(DeadLetters(topic, name.full)) for topic in topics]


def _retried(group: str, learner: str) -> tuple[Name, list[Topic[Any]]]:
    """A group, and the topics that it reads with retries. Raises LabkitError, which lists the groups that do."""
    from labkit.kafka.topics import Topic
    from labkit.patterns.blocked_lanes import LANES
    from labkit.patterns.own_topics import digest, taken_apart

    with kafka() as connection:
        cluster = connection.cluster
        there, groups = cluster.topics(), cluster.groups()
    retried: dict[str, list[Topic[Any]]] = defaultdict(list)  # by the group, or its digest, as names of topics have it
    for one in there:
        source, of = taken_apart(one)
        if one.endswith(f"_{LANES}") and source in there:
            retried[of].append(Topic(cluster, source, there[source], dict))
    # Kafka may have forgotten a group whose consumers are all gone. Its topics are still there.
    names = {one for one in (*retried, *groups, group) if one in retried or digest(one) in retried}
    name = resolve("group with retries", group, names, learner)
    return name, [*retried[name.full], *retried[digest(name.full)]]


def _say(name: Name, answer: dict[str, Any] | list[dict[str, Any]], said: str, as_json: bool) -> None:
    """Answer, in JSON or in words, and say whose group it is."""
    if not as_json:
        typer.echo(f"{name.described}\n{said}")
    else:
        say_json({**answer, **name.whose} if isinstance(answer, dict) else [{**one, **name.whose} for one in answer])


def _resolved(place: str, known: dict[str, Any], where: str) -> str:
    """The full place for a full or a short one."""
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
