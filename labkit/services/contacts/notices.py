"""What a browser is told of its import, through its channel, and how that leaves: on a topic, keyed by the channel."""

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
    """Something that has happened to an import."""

    stage: Stage
    request: str
    total: int
    """Jobs of the import."""
    job: int = 0
    """Which one was consumed, or has the failed row."""
    line: int = 0
    reason: str = ""
    """What is wrong with the row that begins on this line."""
    done: int = 0
    failed: int = 0
    """How many jobs have ended well, and how many were given up, when it was processed so far, or completed."""

    @property
    def id(self) -> str:
        """What happened. A notice that is sent twice has the same, so a page can show it once."""
        if self.stage == "processed":
            return f"processed/{self.request}/{self.done}/{self.failed}"
        return f"{self.stage}/{self.request}/{self.job}/{self.line}"


Notify: TypeAlias = Callable[[str, ImportNotice], object]
"""Called with a channel and a notice, and again with the same when a job is handled again."""


def tell_nobody(channel: str, notice: ImportNotice) -> None:
    """The `notify` of an import that no browser waits for."""


def request_of(channel: str, name: str) -> str:
    """The request of an import that belongs to a channel. So the key of each of its jobs tells the channel."""
    return f"{channel}/{name}"


def channel_of(request: str) -> str:
    """The channel of a request; "" if it was not made for one."""
    return request.rpartition("/")[0]


@dataclass(frozen=True)
class Notices:
    """Tells channels through a topic: the `notify` of Contacts Jobs, of importers, and of `Counted`. Plain data, so it
    can travel."""

    topic: Topic[ImportNotice]

    def __call__(self, channel: str, notice: ImportNotice) -> None:
        """Raises DeliveryFailed.

        That an import was accepted is confirmed when this returns. That a job was consumed leaves at once, as often as
        its handler runs. All else goes with what the handler sends, and is confirmed, or committed, with it.
        """
        if notice.stage == "accepted":
            self.topic.deliver([(notice, channel, None)])
        elif notice.stage == "consumed":
            # What a handler sends is held until it has returned. A context of its own is in no handler.
            Context().run(self.topic.send, notice, channel)
        else:
            self.topic.send(notice, channel)


@dataclass(frozen=True)
class Counted:
    """The callback of the store: tells how many jobs of an import have ended, and once, that all have.

    What it tells through a topic is in the transaction that counts them. Plain data, so it can travel.
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
