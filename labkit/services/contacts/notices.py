"""Notices of an import for its browser: what they say, and how they are sent, on a topic and keyed by channel."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from labkit.kafka.topics import Topic
from labkit.patterns.aggregation import ImportKey
from labkit.services.contacts.reports import Progress

Stage: TypeAlias = Literal["accepted", "consumed", "failed row", "processed", "completed"]


class ImportNotice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something has happened to an import."""

    stage: Stage
    request: str
    total: int
    """How many jobs the import has."""
    job: int = 0
    """The job that was consumed, or has the failed row."""
    line: int = 0
    reason: str = ""
    """What is wrong with the row that begins on this line."""
    done: int = 0
    failed: int = 0
    """How many jobs were done, and how many were given up, so far or in the end."""

    @property
    def id(self) -> str:
        """The id of the event. A notice that is sent twice has the same id, so a page can show it once."""
        if self.stage == "processed":
            return f"processed/{self.request}/{self.done}/{self.failed}"
        return f"{self.stage}/{self.request}/{self.job}/{self.line}"


Notify: TypeAlias = Callable[[str, ImportNotice], object]
"""Called with a channel and a notice, and again with the same ones when a job is handled again."""


def tell_nobody(channel: str, notice: ImportNotice) -> None:
    """The `notify` of an import for which no browser waits."""


def request_of(channel: str, name: str) -> str:
    """The request of an import that belongs to a channel. So the key of each job tells the channel."""
    return f"{channel}/{name}"


def channel_of(request: str) -> str:
    """The channel of a request; "" if it belongs to none."""
    return request.rpartition("/")[0]


@dataclass(frozen=True)
class Notices:
    """Sends notices on a topic: the `notify` of Contacts Jobs, of importers, and of `Counted`. Plain data, so it can
    travel to a pod."""

    topic: Topic[ImportNotice]

    def __call__(self, channel: str, notice: ImportNotice) -> None:
        """Send a notice. Raises DeliveryFailed.

        The notice that an import was accepted is confirmed when this returns. The notice that a job was consumed is
        sent at once, each time that its handler runs. All others go with what the handler sends, and are confirmed, or
        committed, with that.
        """
        if notice.stage == "accepted":
            self.topic.deliver([(notice, channel, None)])
        elif notice.stage == "consumed":
            # What a handler sends is held until it has returned. This context of its own belongs to no handler.
            Context().run(self.topic.send, notice, channel)
        else:
            self.topic.send(notice, channel)


@dataclass(frozen=True)
class Counted:
    """The callback of the store: notifies how many jobs of an import have ended, and, once, that all have.

    Notices on a topic are in the transaction that counts the jobs. Plain data, so it can travel to a pod.
    """

    notify: Notify

    def __call__(self, key: ImportKey, before: Progress | None, after: Progress) -> None:
        channel = channel_of(key.request)
        ended = (0, 0) if before is None else (before.done, before.failed)
        if not channel or ended == (after.done, after.failed):
            return
        stages: list[Stage] = ["processed"]
        if sum(ended) < after.total <= after.done + after.failed:
            stages.append("completed")
        for stage in stages:
            notice = ImportNotice(stage, key.request, after.total, done=after.done, failed=after.failed)
            self.notify(channel, notice)
