"""Faults of services, switched while they run: through a store of its own, or by HTTP.

Every process of a service that reads the store pays for a look into its memory at each request. A service that stands
for another company's knows no Kafka: it takes its faults by HTTP, and is a `Misbehaving`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import msgspec
from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.patterns.key_value_store import KeyValueStore
from labkit.services.calls import call
from labkit.services.http import HttpService, body


class Misbehaviour(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a service does to its requests."""

    errors: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """The share of them that is refused."""
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] = 503
    """With which HTTP status."""
    delay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds that each waits before."""

    def refuses(self) -> bool:
        """Whether a request is refused now."""
        return random.random() < self.errors  # noqa: S311


NONE = Misbehaviour()


class ServiceFaults(KeyValueStore[Misbehaviour]):
    """Which services are to misbehave, and how. `topic` is a compacted one; what was told stays told."""

    understands = Misbehaviour.__struct_fields__

    def of(self, service: str) -> Misbehaviour:
        """What this service is to do now. Asks nobody, so it may be called at every request. Raises StoreNotReady."""
        return self.get(service) or NONE

    async def meet(self, service: str) -> None:
        """What a request meets: it waits, and may be refused by an error that aiohttp makes an answer of."""
        told = self.of(service)
        if told is NONE:
            return
        await asyncio.sleep(told.delay)
        if told.refuses():
            raise _refusal(told.status)(text=f"{service} is told to refuse this\n")

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        """Have it do this and nothing else. Raises LabkitError for values that make no sense, DeliveryFailed."""
        if told:
            self.put(service, _misbehaviour(service, told, Misbehaviour))
        else:
            self.delete(service)


class HttpMisbehaviour(Misbehaviour, frozen=True):
    """What another company's service does to those who ask."""

    cut: int = 0
    """So many times it does what it is asked for, and cuts the connection before the answer."""
    wrong: bool = False
    """Answers 200 with something else, and does nothing."""


FAULTS: web.AppKey[list[Any]] = web.AppKey("faults", list)


@dataclass(frozen=True)
class Misbehaving(HttpService):
    """A service that is told to misbehave by `PUT /faults`, with a value of `kind`. `app[FAULTS]` has the one value."""

    kind: ClassVar[type[HttpMisbehaviour]] = HttpMisbehaviour

    @property
    def faults(self) -> HttpFaults:
        """How it is told to misbehave, for `lab.service`."""
        return HttpFaults(self.url, self.kind)

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.put("/faults", self.tell)]

    async def start(self, app: web.Application) -> None:
        app[FAULTS] = [self.kind()]

    async def tell(self, request: web.Request) -> web.Response:
        request.app[FAULTS][0] = await body(request, self.kind)
        return web.Response()


class HttpFaults:
    """How the service at `url` is told: `PUT /faults` with a value of this kind."""

    def __init__(self, url: str, kind: type[Misbehaviour]) -> None:
        self.url, self.kind = url, kind
        self.understands = kind.__struct_fields__

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        """Have it do this and nothing else. Raises LabkitError for values that make no sense, or when it is away."""
        try:
            call(f"{self.url}/faults", "PUT", _misbehaviour(service, told, self.kind))
        except OSError as error:
            raise LabkitError(f"{service} at {self.url} takes no orders: is its pod running? {error}") from error


def _misbehaviour(service: str, told: Mapping[str, object], kind: type[Misbehaviour]) -> Misbehaviour:
    try:
        return msgspec.convert({**told}, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(kind.__struct_fields__)
        raise LabkitError(f"{service} cannot be told to do that: {error}; it understands: {known}") from error


@lru_cache(None)
def _refusal(status: int) -> type[web.HTTPException]:
    return type(f"Refusal{status}", (web.HTTPException,), {"status_code": status})
