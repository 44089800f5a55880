"""What the topics that a consumer has beside its own must be like: it makes them so, and refuses one that is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from labkit.kafka.errors import ClusterUnreachable, TopicMismatch, TopicMissing
from labkit.kafka.topics import Topic

WEEK = 7 * 24 * 3600
BROKER_MAX = 1_048_588  # bytes that a broker takes at once, unless it is told otherwise


@dataclass(frozen=True)
class Needs:
    """Settings that a topic needs, and what happens without them."""

    settings: Mapping[str, str]
    otherwise: str
    waits: float | None = None
    """For so many seconds records wait in it: it keeps them for at least as long, and for a week more if made here."""


STORED = Needs({"cleanup.policy": "compact"}, "Kafka deletes entries that are old and still needed")
FOR_EVER = Needs(
    {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}, "Kafka deletes traces that are to stay"
)


def waiting(delay: float) -> Needs:
    """Of a topic in which records wait. The broker's clock says since when: a forged timestamp could make one wait for
    ever."""
    settings = {"cleanup.policy": "delete", "message.timestamp.type": "LogAppendTime"}
    return Needs(settings, "Kafka deletes records that wait, or a forged timestamp makes one wait for ever", delay)


def room(main: Topic[Any]) -> Mapping[str, str]:
    """The setting with which a topic takes all that `main` takes, with more headers, and compressed less well."""
    largest = BROKER_MAX
    with suppress(TopicMissing, ClusterUnreachable):  # not made yet, or its settings may not be read
        largest = max(largest, int(main.cluster.topic_config(main.name)["max.message.bytes"]))
    return {"max.message.bytes": str(min(2 * largest, 2**31 - 1))}


def create(topic: Topic[Any], needs: Needs, more: Mapping[str, str]) -> None:
    """Make it, with `more` settings than it needs. Raises TopicMismatch when somebody else just made it in another way,
    ClusterUnreachable."""
    keep = {} if needs.waits is None else {"retention.ms": f"{(WEEK + needs.waits) * 1000:.0f}"}
    topic.create({**needs.settings, **keep, **more})


def check(topic: Topic[Any], needs: Needs) -> None:
    """Raises TopicMismatch when a topic that is there has other settings; TopicMissing, ClusterUnreachable."""
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
    """Raises TopicMismatch when one of these topics has more partitions than that. `there` has all topics' partitions,
    `otherwise` what happens then, and another way out."""
    for topic in topics:
        if (has := there.get(topic.name, 0)) > most:
            raise TopicMismatch(
                f"topic {topic.name} has {has} partitions, and may have {most}: {otherwise} stop the group's consumers "
                "and delete it, once nothing in it is needed: the next consumer makes it anew"
            )


def check_read(main: Topic[Any], topics: Iterable[Topic[Any]], there: Mapping[str, int]) -> None:
    """Raises TopicMismatch when a topic co-partitioned with `main` has partitions that nobody reads: partition n is
    read by who has partition n of `main`."""
    if read := there.get(main.name):
        check_partitions(topics, read, f"nobody would read the others. Give {main.name} as many, or", there)
