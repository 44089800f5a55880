"""Channels: made and signed by a service, kept nowhere, and known by every service that has the secret.

The id of a channel goes through Kafka, to all services that tell something. Its key is told to the one who opens it,
and to nobody else: only with the key may one listen. A cookie would not do: a page in a notebook is in a frame of
another site, and its browser would not send it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from typing import NamedTuple

from labkit.kafka.errors import LabkitError

ID = re.compile(r"([\w-]{24})\.(\d{10})\.[\w-]{22}", re.ASCII)
SHORTEST = 16  # characters of a secret


class ChannelUnknown(LabkitError):
    """A channel is not one of ours, or is not whose key this is."""


class ChannelExpired(LabkitError):
    """A channel was one of ours, and its time is over."""


class Channel(NamedTuple):
    """What is told to who opens one."""

    id: str
    key: str
    expires: int
    """Seconds since 1970."""


class Channels:
    """Makes channels and tells whether one is real. All processes of all services have the same `secret`."""

    def __init__(self, secret: str) -> None:
        if len(secret) < SHORTEST:
            raise LabkitError(
                f"the secret of channels has at least {SHORTEST} characters: secrets.token_urlsafe() makes one"
            )
        self._secret = secret.encode()

    def make(self, lifetime: float) -> Channel:
        """A new one, for so many seconds. Nobody can guess it."""
        expires = int(time.time() + lifetime)
        told = f"{secrets.token_urlsafe(18)}.{expires}"
        channel = f"{told}.{self._sign('channel', told)}"
        return Channel(channel, self._sign("key", channel), expires)

    def check(self, channel: str) -> int:
        """When it expires, in seconds since 1970. Raises ChannelUnknown, ChannelExpired."""
        found = ID.fullmatch(channel)
        told, _, signature = channel.rpartition(".")
        if found is None or not hmac.compare_digest(signature, self._sign("channel", told)):
            raise ChannelUnknown("this is no channel of ours: open one")
        expires = int(found[2])
        if time.time() >= expires:
            raise ChannelExpired("the time of this channel is over: open another one")
        return expires

    def check_owner(self, channel: str, key: str) -> int:
        """The same, of a channel that somebody wants to listen to."""
        expires = self.check(channel)
        if not hmac.compare_digest(key.encode(errors="replace"), self._sign("key", channel).encode()):
            raise ChannelUnknown("this channel belongs to somebody else: open one")
        return expires

    def _sign(self, what: str, text: str) -> str:
        seal = hmac.digest(self._secret, f"{what}\0{text}".encode(), hashlib.sha256)[:16]
        return base64.urlsafe_b64encode(seal).decode().rstrip("=")
