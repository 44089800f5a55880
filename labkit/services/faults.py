"""Faults of services, switched while they run: a store of its own, from which every process of a service reads.

A service asks at each request and pays for a look into its memory. Whoever can reach Kafka may switch: a notebook, a
button of its board, the command line.
"""

from __future__ import annotations

import asyncio
import random
import time
from functools import lru_cache
from typing import Annotated

import msgspec
from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore

TOPIC = "service-faults"  # the name under which the command line looks for it


class Misbehaviour(msgspec.Struct, frozen=True):
    """What a service does to its requests."""

    errors: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """The share of them that is refused."""
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] = 503
    """With which HTTP status."""
    delay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds that each waits before."""
    until: float | None = None
    """When it ends by itself, in seconds since 1970."""


NONE = Misbehaviour()


class ServiceFaults:
    """Which services are to misbehave, and how. `topic` is a compacted one; the object travels to pods.

    Raises StoreNotReady until it is loaded (see `wait_ready`).
    """

    def __init__(self, topic: Topic[Misbehaviour]) -> None:
        self.store: KeyValueStore[Misbehaviour] = KeyValueStore(topic)

    def wait_ready(self) -> None:
        """Wait until it is known which services are to misbehave."""
        self.store.wait_ready()

    def of(self, service: str) -> Misbehaviour:
        """What this service is to do now. Asks nobody, so it may be called at every request."""
        told = self.store.get(service)
        return NONE if told is None or (told.until is not None and told.until < time.time()) else told

    async def meet(self, service: str) -> None:
        """What a request meets: it waits, and may be refused by an error that aiohttp makes an answer of."""
        told = self.of(service)
        if told is NONE:
            return
        await asyncio.sleep(told.delay)
        if random.random() < told.errors:  # noqa: S311
            raise _refusal(told.status)(text=f"{service} is told to refuse this\n")

    def set(
        self, service: str, errors: float = 0.0, status: int = 503, delay: float = 0.0, seconds: float | None = None
    ) -> None:
        """Have it misbehave, for so many seconds or until `clear`.

        Raises LabkitError for figures that make no sense, DeliveryFailed.
        """
        until = None if seconds is None else time.time() + seconds
        try:
            told = msgspec.convert(msgspec.structs.asdict(Misbehaviour(errors, status, delay, until)), Misbehaviour)
        except msgspec.ValidationError as error:
            raise LabkitError(f"{service} cannot be told to do that: {error}") from error
        self.store.put(service, told)

    def clear(self, service: str) -> None:
        """Have it behave again. Raises DeliveryFailed."""
        self.store.delete(service)

    def close(self) -> None:
        """Let the store go; what was set stays set."""
        self.store.close()

    def __reduce__(self) -> tuple[type[ServiceFaults], tuple[Topic[Misbehaviour]]]:
        return type(self), (self.store.topic,)


@lru_cache(None)
def _refusal(status: int) -> type[web.HTTPException]:
    return type(f"Refusal{status}", (web.HTTPException,), {"status_code": status})
