"""A call to somebody else's service by HTTP, made once: to call again is up to the consumer that handles the record.

Without a web framework: pods that only call wait for no import of one.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec

IDEMPOTENCY_KEY = "Idempotency-Key"  # the header
PATIENCE = 5.0  # seconds to wait for an answer


def post(
    url: str,
    body: Any,
    service: str,
    failed: Callable[[str], Exception],
    patience: float = PATIENCE,
    idempotency_key: str | None = None,
) -> tuple[int, bytes]:
    """What `service` answers to this, sent as JSON: status and body. Raises `failed` when it does not answer."""
    address = urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if idempotency_key is not None:
        headers[IDEMPOTENCY_KEY] = idempotency_key
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=patience)
    try:
        connection.request("POST", address.path, msgspec.json.encode(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise failed(f"no answer from {service}: {type(error).__name__}") from error
    finally:
        connection.close()
