"""What a browser is told of its import, through its channel. How a notice gets there is somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

Stage: TypeAlias = Literal["accepted", "consumed", "failed row"]


class ImportNotice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that has happened to an import."""

    stage: Stage
    request: str
    total: int
    """Jobs of the import."""
    job: int = 0
    line: int = 0
    reason: str = ""

    @property
    def id(self) -> str:
        """What happened. A notice that is sent twice has the same, so a page can show it once."""
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
