"""The mail service: no transaction takes its effects back, neither Kafka's nor a database's. What is sent is sent.

The service belongs to another company, and is called by HTTP. Against sending twice it only offers an idempotency key.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import psycopg
from aiohttp import web

from labkit.kafka.errors import LabkitError
from labkit.services.calls import IDEMPOTENCY_KEY, post
from labkit.services.connections import rows
from labkit.services.http import HttpService, body

TABLE = """create table if not exists mails (
    id serial primary key, order_id text not null, recipient text not null, idempotency_key text unique,
    at double precision not null)"""


class Mail(msgspec.Struct, frozen=True):
    """A mail to be sent, which says that this order is on its way."""

    order: str
    to: str


class Sent(NamedTuple):
    """A mail that was sent."""

    order: str
    to: str
    at: float


class MailFailed(LabkitError):
    """The mail service did not answer, or refused: the mail may have been sent, or not."""


@dataclass(frozen=True)
class MailService(HttpService):
    """`POST /mails` sends a Mail, once for each `Idempotency-Key`. `dsn` is the PostgreSQL in which it notes mails."""

    dsn: str = ""

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/mails", self.send)]

    async def start(self, app: web.Application) -> None:
        app[OUTBOX] = await psycopg.AsyncConnection.connect(self.dsn, autocommit=True)
        await app[OUTBOX].execute(TABLE)

    async def finish(self, app: web.Application) -> None:
        await app[OUTBOX].close()

    async def send(self, request: web.Request) -> web.Response:
        mail = await body(request, Mail)
        cursor = await request.app[OUTBOX].execute(
            "insert into mails (order_id, recipient, idempotency_key, at) values (%s, %s, %s, %s) "
            "on conflict (idempotency_key) do nothing",
            (mail.order, mail.to, request.headers.get(IDEMPOTENCY_KEY), time.time()),
        )
        return web.json_response({"sent": mail.order, "again": not cursor.rowcount})


OUTBOX = web.AppKey("outbox", psycopg.AsyncConnection[Any])


def send_mail(url: str, order: str, to: str, idempotency_key: str | None = None) -> None:
    """Have the service at `url` send a mail. With a key the mail is sent once, however often this is called.

    Raises MailFailed.
    """
    mail, who = Mail(order, to), "the mail service"
    status, said = post(f"{url}/mails", mail, who, MailFailed, idempotency_key=idempotency_key)
    if status != 200:
        raise MailFailed(f"{who} answers {status}: {said.decode(errors='replace').strip()}")


def mails(dsn: str) -> list[Sent]:
    """All mails that were sent, in order; none if there is no table yet."""
    return [Sent(*row) for row in rows(dsn, "select order_id, recipient, at from mails order by id")]
