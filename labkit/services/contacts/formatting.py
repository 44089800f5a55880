"""The formatting service of another company, called by HTTP, which misbehaves on demand.

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
from labkit.services.faults import FAULTS, Misbehaving
from labkit.services.http import body, json


class FormattingFailed(LabkitError):
    """The formatting service did not answer, or not with the contacts: ask again later."""


@dataclass(frozen=True)
class FormattingService(Misbehaving):
    """`POST /format` takes contacts as JSON, and answers with the same ones in its form; `PUT /faults` misbehaviour.

    `takes` is how long an answer takes, in seconds.
    """

    takes: float = 0.01

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/format", self.format), *super().routes()]

    async def format(self, request: web.Request) -> web.Response:
        contacts = await body(request, list[Contact])
        await asyncio.sleep(self.takes + request.app[FAULTS][0].delay)
        faults = request.app[FAULTS][0]
        if faults.refuses():
            return web.json_response({"error": "unavailable"}, status=faults.status)
        if faults.wrong:
            return web.json_response([])
        if faults.cut and request.transport is not None:
            request.app[FAULTS][0] = msgspec.structs.replace(faults, cut=faults.cut - 1)
            request.transport.abort()
        return json([formatted(one) for one in contacts])


def formatted(contact: Contact) -> Contact:
    """A name without needless spaces and capitals, and a phone number as digits in groups."""
    name = " ".join(contact.name.split())
    if name.isupper() or name.islower():
        name = name.title()
    return contact._replace(name=name, phone=" ".join(re.findall(r"\+?\d+", contact.phone)))


@dataclass(frozen=True)
class Formatting:
    """Asks the service at `url` to format contacts; waits `patience` seconds. Plain data, so it can travel to a pod."""

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
