"""A consumer's own topics, for retries, replays, dead letters, lanes and skips: their names and settings.

A consumer makes them with the settings they need, and refuses a topic that has others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from labkit.kafka.errors import ClusterUnreachable, LabkitError, TopicMismatch, TopicMissing
from labkit.kafka.topics import Topic

WEEK = 7 * 24 * 3600
BROKER_MAX = 1_048_588  # bytes that a broker takes at once, unless its settings say otherwise
LONGEST_NAME = 249  # characters of a topic's name that Kafka allows
OWN_TOPIC = re.compile(r"(.+)_([A-Za-z0-9.-]+)_(?:replay|retry\d+-\d+m?s|dead-letters|lanes|skips)")


# -- Names -------------------------------------------------------------------------------------------------------------


def own_topic(topic: str, group: str, what: str) -> str:
    """The name of a topic that a group has beside `topic`; no other topic and group get the same name.

    Nor do they get a name that differs only by "." for "_": Kafka would refuse it. The name begins with that of the
    topic, so that a clean-up by prefix finds it. Raises LabkitError when the name would be too long for Kafka.
    """
    part = digest(group)
    if re.fullmatch(r"[A-Za-z0-9.-]+", group):
        part = group if _reads_one_way(topic, group) else digest(group, len(group))
    name = f"{topic}_{part}_{what}"
    if len(name) > LONGEST_NAME:
        name = f"{topic}_{digest(group)}_{what}"
    if len(name) > LONGEST_NAME:
        raise LabkitError(
            f"topic {topic} has a name too long for {what} topics of its consumers: at most "
            f"{LONGEST_NAME - len(name) + len(topic)} characters"
        )
    return name


def taken_apart(name: str) -> tuple[str, str]:
    """The topic and the group whose own topic this is, as `own_topic` put them into the name.

    The group may be there by its digest only. Two empty texts for any other topic.
    """
    found = OWN_TOPIC.fullmatch(name)
    if found is None:
        return "", ""
    whole = found[2].rpartition("-")[0]
    return found[1], whole if digest(whole, len(whole)) == found[2] else found[2]


def digest(group: str, readable: int = 24) -> str:
    """A group whose name cannot be part of a topic's; no underscore, which separates the parts."""
    shown = re.sub(r"[^A-Za-z0-9.-]+", "-", group)[:readable]
    return f"{shown}-{hashlib.sha256(group.encode()).hexdigest()[:12]}"


def _reads_one_way(topic: str, group: str) -> bool:
    """Whether `topic_group`, with "." for "_" and the other way round, is read as this topic and this group only.

    A group begins where a part is the same as the topic's first one (`shop.orders_shop.billing`, all names of a lab),
    the last of such; if there is none, it is the last part.
    """
    first, *parts = re.split("[._]", f"{topic}_{group}")
    begins = max((number for number, part in enumerate(parts) if part == first), default=len(parts) - 1)
    return begins == len(re.findall("[._]", topic))


# -- Settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Settings that a topic needs, and what happens without them."""

    settings: Mapping[str, str]
    otherwise: str
    waits: float | None = None
    """Seconds for which records wait in the topic. It keeps them as long at least, a week longer if it is made here."""


STORED = Needs({"cleanup.policy": "compact"}, "Kafka deletes entries that are old and still needed")
FOR_EVER = Needs(
    {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}, "Kafka deletes traces that are to stay"
)


def waiting(delay: float) -> Needs:
    """The needs of a topic in which records wait. The broker's clock says since when: a forged timestamp could make a
    record wait for ever."""
    settings = {"cleanup.policy": "delete", "message.timestamp.type": "LogAppendTime"}
    return Needs(settings, "Kafka deletes records that wait, or a forged timestamp makes one wait for ever", delay)


def room(main: Topic[Any]) -> Mapping[str, str]:
    """The setting with which a topic takes every record of `main`, with more headers, and compressed less well."""
    largest = BROKER_MAX
    with suppress(TopicMissing, ClusterUnreachable):  # the topic is not made yet, or we may not read its settings
        largest = max(largest, int(main.cluster.topic_config(main.name)["max.message.bytes"]))
    return {"max.message.bytes": str(min(2 * largest, 2**31 - 1))}


def create(topic: Topic[Any], needs: Needs, more: Mapping[str, str]) -> None:
    """Make the topic, with `more` settings than it needs. Raises TopicMismatch when somebody else has just made it in
    another way, ClusterUnreachable."""
    keep = {} if needs.waits is None else {"retention.ms": f"{(WEEK + needs.waits) * 1000:.0f}"}
    topic.create({**needs.settings, **keep, **more})


def check(topic: Topic[Any], needs: Needs) -> None:
    """Raises TopicMismatch when the topic has other settings; TopicMissing, ClusterUnreachable."""
    has, wanted = topic.cluster.topic_config(topic.name), dict(needs.settings)
    if 0 <= int(has["retention.ms"]) < (needs.waits or 0) * 1000:
        wanted["retention.ms"] = "-1"
    if wrong := {name: value for name, value in wanted.items() if has[name] != value}:
        fix = ",".join(f"{name}={value}" for name, value in wrong.items())
        raise TopicMismatch(
            f"topic {topic.name} has {', '.join(f'{name}={has[name]}' for name in wrong)}: {needs.otherwise}. Set "
            f"{fix}, for instance with `kafka-configs.sh --alter --topic {topic.name} --add-config {fix}`"
        )


def check_partitions(topics: Iterable[Topic[Any]], most: int, otherwise: str, there: Mapping[str, int]) -> None:
    """Raises TopicMismatch when one of these topics has more than `most` partitions. `there` has the partitions of all
    topics; `otherwise` says what would happen, and another way out."""
    for topic in topics:
        if (has := there.get(topic.name, 0)) > most:
            raise TopicMismatch(
                f"topic {topic.name} has {has} partitions, and may have {most}: {otherwise} stop the group's consumers "
                "and delete it, once nothing in it is needed: the next consumer makes it anew"
            )


def check_read(main: Topic[Any], topics: Iterable[Topic[Any]], there: Mapping[str, int]) -> None:
    """Raises TopicMismatch when a topic co-partitioned with `main` has partitions that nobody reads: the member with
    partition n of `main` reads partition n."""
    if read := there.get(main.name):
        check_partitions(topics, read, f"nobody would read the others. Give {main.name} as many, or", there)
