"""Faults of services, switched on and off while they run: by a store, or by HTTP.

A service that reads the store looks into its own memory at each request. A service that stands for another company's
knows no Kafka: it takes its faults by HTTP, and is a `Misbehaving`.
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
    """The share of requests that are refused."""
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] = 503
    """The HTTP status of a refusal."""
    delay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds that each request waits first."""

    def refuses(self) -> bool:
        """Whether to refuse a request now."""
        return random.random() < self.errors  # noqa: S311


NONE = Misbehaviour()


class ServiceFaults(KeyValueStore[Misbehaviour]):
    """Which services misbehave, and how. `topic` is compacted; a fault stands until it is taken back."""

    understands = Misbehaviour.__struct_fields__

    def of(self, service: str) -> Misbehaviour:
        """How this service misbehaves now. Asks nobody, so call it at every request. Raises StoreNotReady."""
        return self.get(service) or NONE

    async def meet(self, service: str) -> None:
        """Let a request wait, or refuse it by an error that aiohttp turns into an answer."""
        fault = self.of(service)
        if fault is NONE:
            return
        await asyncio.sleep(fault.delay)
        if fault.refuses():
            raise _refusal(fault.status)(text=f"{service} refuses this, by a fault\n")

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        """Set these faults and no others. Raises LabkitError for values that make no sense, DeliveryFailed."""
        if told:
            self.put(service, _misbehaviour(service, told, Misbehaviour))
        else:
            self.delete(service)


class HttpMisbehaviour(Misbehaviour, frozen=True):
    """What another company's service does to those who ask."""

    cut: int = 0
    """How many times it still does what it is asked for, and cuts the connection before the answer."""
    wrong: bool = False
    """It answers 200 with something else, and does nothing."""


FAULTS: web.AppKey[list[Any]] = web.AppKey("faults", list)


@dataclass(frozen=True)
class Misbehaving(HttpService):
    """A service that takes its faults by `PUT /faults`, as a value of `kind`, the one item of `app[FAULTS]`."""

    kind: ClassVar[type[HttpMisbehaviour]] = HttpMisbehaviour

    @property
    def faults(self) -> HttpFaults:
        """Its faults, for `lab.service`."""
        return HttpFaults(self.url, self.kind)

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.put("/faults", self.set_faults)]

    async def start(self, app: web.Application) -> None:
        app[FAULTS] = [self.kind()]

    async def set_faults(self, request: web.Request) -> web.Response:
        request.app[FAULTS][0] = await body(request, self.kind)
        return web.Response()


class HttpFaults:
    """The faults of the service at `url`, set by `PUT /faults` with a value of this kind."""

    def __init__(self, url: str, kind: type[Misbehaviour]) -> None:
        self.url, self.kind = url, kind
        self.understands = kind.__struct_fields__

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        """Set these faults and no others. Raises LabkitError for values that make no sense, or when it is away."""
        try:
            call(f"{self.url}/faults", "PUT", _misbehaviour(service, told, self.kind))
        except OSError as error:
            raise LabkitError(f"{service} at {self.url} takes no orders: is its pod running? {error}") from error


def _misbehaviour(service: str, told: Mapping[str, object], kind: type[Misbehaviour]) -> Misbehaviour:
    try:
        return msgspec.convert({**told}, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(kind.__struct_fields__)
        raise LabkitError(f"{service} cannot do that: {error}; it understands: {known}") from error


@lru_cache(None)
def _refusal(status: int) -> type[web.HTTPException]:
    return type(f"Refusal{status}", (web.HTTPException,), {"status_code": status})
