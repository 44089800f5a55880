"""The formatting service: it belongs to somebody else, is reached by HTTP, and misbehaves when told to.

It brings the names and phone numbers of Google contacts into one form. Asking it twice does no harm.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.services.calls import PATIENCE, post
from labkit.services.contacts.content import Contact
from labkit.services.faults import HttpFaults, Misbehaviour
from labkit.services.http import HttpService, body, json


class FormatterMisbehaviour(Misbehaviour, frozen=True):
    """What the formatting service does to those who ask."""

    cut: int = 0
    """So many connections are cut before the answer."""
    wrong: bool = False
    """Answers 200 with something else than the contacts."""


class FormattingFailed(LabkitError):
    """The formatting service did not answer, or not with the contacts: ask again later."""


@dataclass(frozen=True)
class FormattingService(HttpService):
    """`POST /format` takes contacts as JSON, and answers with the same ones in its form; `PUT /faults` misbehaviour.

    `takes` is how long one answer takes it, in seconds.
    """

    takes: float = 0.01

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/format", self.format), web.put("/faults", self.tell)]

    @property
    def faults(self) -> HttpFaults:
        """How it is told to misbehave, for `lab.service`."""
        return HttpFaults(self.url, FormatterMisbehaviour)

    async def start(self, app: web.Application) -> None:
        app[FAULTS] = [FormatterMisbehaviour()]

    async def tell(self, request: web.Request) -> web.Response:
        request.app[FAULTS][0] = await body(request, FormatterMisbehaviour)
        return web.Response()

    async def format(self, request: web.Request) -> web.Response:
        contacts = await body(request, list[Contact])
        told = request.app[FAULTS]
        await asyncio.sleep(self.takes + told[0].delay)
        faults = told[0]
        if faults.refuses():
            return web.json_response({"error": "unavailable"}, status=faults.status)
        if faults.wrong:
            return web.json_response([])
        if faults.cut and request.transport is not None:
            told[0] = msgspec.structs.replace(faults, cut=faults.cut - 1)
            request.transport.abort()
        return json([formatted(one) for one in contacts])


FAULTS = web.AppKey("faults", list[FormatterMisbehaviour])


def formatted(contact: Contact) -> Contact:
    """A name without needless spaces and capitals, and a phone number as digits in groups."""
    name = " ".join(contact.name.split())
    if name.isupper() or name.islower():
        name = name.title()
    return contact._replace(name=name, phone=" ".join(re.findall(r"\+?\d+", contact.phone)))


@dataclass(frozen=True)
class Formatting:
    """Asks the service at `url` to format contacts, and waits for `patience` seconds. Plain data, so it can travel."""

    url: str
    patience: float = PATIENCE

    def __call__(self, contacts: list[Contact]) -> list[Contact]:
        """The contacts, formatted, in the same order. Raises FormattingFailed."""
        who = "the formatting service"
        status, said = post(f"{self.url}/format", contacts, who, FormattingFailed, self.patience)
        if status != 200:
            raise FormattingFailed(f"{who} answers {status}")
        try:
            found = msgspec.json.decode(said, type=list[Contact])
        except msgspec.DecodeError as error:
            raise FormattingFailed(f"{who} answers with no contacts: {error}") from error
        if [one.email for one in found] != [one.email for one in contacts]:
            raise FormattingFailed(f"asked for {len(contacts)} contacts, {who} answers with others")
        return found
