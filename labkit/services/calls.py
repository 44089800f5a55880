"""Calls of a service by HTTP: `call` and `post` try once, as a consumer calls again with its record; `ask` tries again.

They need no web framework, so that pods that only call need not wait for the import of one.
"""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.error import HTTPError

import msgspec

IDEMPOTENCY_KEY = "Idempotency-Key"  # the header
PATIENCE = 5.0  # seconds to wait for an answer
LONG_PATIENCE = 10.0  # seconds to wait for the answer of a service that waits for Kafka

direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""As `urlopen`, but without the proxy that the environment may name: the services are on this machine."""


def call(
    url: str, method: str = "GET", body: Any = None, timeout: float = PATIENCE, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, bool]:
    """One request, sent once: returns the status, the answer, and whether that is JSON. `body` goes as JSON, unless it
    is bytes. Raises OSError when nobody answers, and HTTPError, which is one, for a refusal."""
    data = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
    with direct(urllib.request.Request(url, data, headers or {}, method=method), timeout=timeout) as answer:  # noqa: S310
        return answer.status, answer.read(), answer.headers.get_content_subtype() == "json"


def post(
    url: str,
    body: Any,
    service: str,
    failed: Callable[[str], Exception],
    patience: float = PATIENCE,
    idempotency_key: str | None = None,
) -> tuple[int, bytes]:
    """Send a value as JSON; returns status and body of the answer. Raises `failed` when `service` does not answer."""
    headers = {"Content-Type": "application/json"}
    if idempotency_key is not None:
        headers[IDEMPOTENCY_KEY] = idempotency_key
    try:
        return call(url, "POST", body, patience, headers)[:2]
    except HTTPError as refused:
        with refused:
            return refused.code, refused.read()
    except (OSError, http.client.HTTPException) as error:
        raise failed(f"no answer from {service}: {type(error).__name__}") from error


def ask(
    url: str, method: str = "GET", body: Any = None, patience: float = 5.0, headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """One request: returns the status, and the answer, which is decoded if it is JSON, else text. `body` goes as JSON.

    While nobody answers, or the connection ends before the answer, the request is sent again for up to `patience`
    seconds, as most clients do. Raises OSError after that.
    """
    until = time.monotonic() + patience
    while True:
        try:
            status, said, is_json = call(url, method, body, LONG_PATIENCE, headers)
            return status, msgspec.json.decode(said) if is_json else said.decode()
        except HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)  # there is no event for somebody who begins to listen


def answers(url: str) -> bool:
    """Whether somebody answers a GET of this URL with 200 now."""
    try:
        return ask(url, patience=0)[0] == 200
    except OSError:
        return False
