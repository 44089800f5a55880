"""Calls of a service by HTTP: once, to whoever calls again is a consumer with its record; or until somebody answers.

Without a web framework: pods that only call wait for no import of one.
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
LONG_PATIENCE = 10.0  # seconds that somebody waits who asks a service which waits for Kafka

direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""As `urlopen`, and never by a proxy of the environment: what is asked is on this machine."""


def call(
    url: str, method: str = "GET", body: Any = None, timeout: float = PATIENCE, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, bool]:
    """One request, sent once: status, what was answered, and whether that is JSON. `body` goes as JSON, unless it is
    bytes. Raises OSError when nobody answers, and HTTPError, which is one, for a refusal."""
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
    """What `service` answers to this, sent as JSON: status and body. Raises `failed` when it does not answer."""
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
    """One request: the status, and what was answered: JSON decoded, else as text. `body` goes as JSON.

    While nobody answers, or the connection ends before the answer, it is sent again for up to `patience` seconds, as
    most clients do. Raises OSError after that.
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
            time.sleep(0.05)  # between two attempts: nothing tells when somebody listens


def answers(url: str) -> bool:
    """Whether somebody answers a GET there now, with 200."""
    try:
        return ask(url, patience=0)[0] == 200
    except OSError:
        return False
