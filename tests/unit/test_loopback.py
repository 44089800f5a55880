"""Services of this machine are asked without a proxy, whatever the environment names."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from labkit.services.clients import answers, ask
from labkit.services.faults import HttpFaults, Misbehaviour
from labkit.services.payments.job_scheduler import Progress, Schedule, finished, schedule
from labkit.services.payments.ledger import Renewal, charge
from labkit.services.payments.subscriptions import Costs, costs

WANTED = Schedule("http://127.0.0.1:1/due", "monthly")
ANSWERS: dict[str, Any] = {
    "/schedules": [Progress(WANTED, done=1)],
    "/due?lock=optimistic": Costs(),
    "/charges": {"charge": "1"},
    "/faults": {},
}


class Service(BaseHTTPRequestHandler):
    """Answers in the place of every service."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(200 if self.path in ANSWERS else 404)
        self.end_headers()
        self.wfile.write(msgspec.json.encode(ANSWERS.get(self.path)))

    do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: refused at once
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


CALLS: dict[str, Callable[[str], object]] = {
    "schedule": lambda url: schedule(url, WANTED),
    "finished": lambda url: finished(url, WANTED, 5),
    "costs": lambda url: costs(url, "optimistic", 5),
    "a fault of the provider": lambda url: HttpFaults(url, Misbehaviour).tell("provider", {"errors": 1.0}),
    "charge": lambda url: charge(url, Renewal("1", "customer 1", 1, 2900)),
    "ask": lambda url: json.loads(ask(f"{url}/faults", patience=0)[1]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_call_goes_to_a_proxy(url: str, call: Callable[[str], object]) -> None:
    call(url)


def test_answers_tells_whether_somebody_is_there_and_has_it(url: str) -> None:
    assert answers(f"{url}/faults")
    assert not answers(f"{url}/nothing")
    assert not answers("http://127.0.0.1:9/faults")
