"""What a lab brings besides Kafka: a PostgreSQL, ports, HTTP services and their clients, figures of any kind."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest
from aiohttp import web
from lab_helpers import wait_ready, wait_running
from processes import is_alive, wait_until

import labkit.runtime.broker as module
from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Measured, Report, Step
from labkit.kafka.errors import LabkitError
from labkit.lab.board.panels import panel
from labkit.runtime.broker import free_ports
from labkit.runtime.postgres import Postgres
from labkit.runtime.server import ServerState
from labkit.runtime.which_kafka import Connection
from labkit.services.clients import Clients
from labkit.services.faults import Misbehaviour, ServiceFaults
from labkit.services.http import HttpService

pytestmark = pytest.mark.usefixtures("connection")


@pytest.fixture(scope="module")
def lab(connection: Connection) -> Iterator[Lab]:
    with Lab("servers") as lab:
        yield lab


def newest(lab: Lab, metric: str, label: str) -> float:
    return next((one.value for one in reversed(lab._history.samples) if (one.metric, one.label) == (metric, label)), -1)


# -- PostgreSQL


def test_postgres_killed_keeps_what_it_confirmed(lab: Lab) -> None:
    before, database = len(lab.faults), lab.postgres()
    with psycopg.connect(database.dsn, autocommit=True) as one:
        one.execute("create table charges (id int primary key)")
        one.execute("insert into charges select generate_series(1, 1000)")
        assert one.execute("show wal_level").fetchone() == ("logical",)
        # Else each one that is killed leaves a segment in the machine's memory, which nobody deletes.
        assert one.execute("show dynamic_shared_memory_type").fetchone() == ("mmap",)
        database.kill()
        assert database.state is ServerState.DOWN
        with pytest.raises(psycopg.OperationalError):
            one.execute("select 1")
    database.kill()  # or a cell could not run twice
    with pytest.raises(LabkitError, match="cannot restart PostgreSQL: it is down: recover it first"):
        database.restart()
    assert database.recover() == "PostgreSQL is up again"
    assert database.recover() == "nothing to mend: PostgreSQL is running"
    idle = psycopg.connect(database.dsn, autocommit=True)
    assert idle.execute("select count(*) from charges").fetchone() == (1000,)
    database.restart()  # in good order, though somebody is connected
    idle.close()
    with psycopg.connect(database.dsn) as one:
        assert one.execute("select count(*) from charges").fetchone() == (1000,)
    done = [fault.text for fault in lab.faults[before:] if fault.target == "PostgreSQL"]
    assert done == ["kill PostgreSQL", "restart PostgreSQL"]
    assert [action.label for action in database.actions()] == [
        "Kill PostgreSQL",
        "Restart PostgreSQL",
        "Recover PostgreSQL",
    ]


@pytest.mark.long
def test_settle_answers_at_once_while_work_waits_for_a_database_that_is_down(lab: Lab) -> None:
    """Waiting would keep the button that starts it from working."""
    database, topic = lab.postgres(), lab.topic("orders", 1, int)
    dsn = database.dsn

    def store(record: object) -> None:
        psycopg.connect(dsn).close()

    shop = lab.deploy("stores", Consumer(topic, store))
    wait_ready(shop)
    database.kill()
    topic.send(1)
    topic.flush()
    wait_until(lambda: shop.waiting, 20, "a record in a back-off")
    settled = lab.settle(600)  # longer than a test may take
    assert not settled
    assert "in a back-off" in settled.reason
    assert settled.reason.endswith(f"kill {database.name} stands: end that first")
    database.recover()
    assert lab.settle(30)


@pytest.mark.long
def test_settle_waits_while_a_service_refuses_only_some(lab: Lab) -> None:
    """Another attempt may get through, so the fault need not be ended first."""
    topic, tries = lab.topic("payments", 1, int), [0]
    faults = ServiceFaults(lab.topic("switches", 1, Misbehaviour, compacted=True))
    faults.wait_ready()

    def pay(record: object) -> None:
        tries[0] += 1
        if tries[0] < 5:
            raise ConnectionError("503")

    till = lab.service("till", faults)
    till.fail(0.5)
    shop = lab.deploy("pays", Consumer(topic, pay))
    topic.send(1)
    topic.flush()
    wait_until(lambda: shop.waiting, 20, "a record in a back-off")
    assert lab.settle(30), lab.settle(0)
    till.fail()
    assert [fault.text for fault in lab._history.standing() if fault.target == "till"] == ["fail till"]
    assert repr(till) == "till is misbehaving: fail till"
    till.recover()
    assert repr(till) == "till is as it should be"


@pytest.mark.long
def test_postgres_cannot_be_frozen(lab: Lab) -> None:
    with pytest.raises(LabkitError, match="each of its connections is a process"):
        lab.postgres().freeze()


@pytest.mark.long
def test_postgres_dies_with_its_owner_and_leaves_nothing() -> None:
    code = """
        import psycopg, time
        from labkit.runtime.postgres import Postgres
        server = Postgres()
        busy = psycopg.connect(server.dsn)
        pid = busy.execute("select pg_backend_pid()").fetchone()[0]
        print(server.folder, server.pid, pid, flush=True)
        time.sleep(600)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout
        folder, *pids = owner.stdout.readline().split()
        assert all(is_alive(int(pid)) for pid in pids)
        owner.kill()
        wait_until(lambda: not any(is_alive(int(pid)) for pid in pids), 5, "the end of the server and its backends")
    with Postgres() as other:
        assert not Path(folder).exists()
    assert not other.folder.exists()


@pytest.mark.long
def test_a_supervisor_that_is_killed_takes_postgres_along() -> None:
    with Postgres() as server:
        supervisor = psutil.Process(server.pid).parent()
        assert supervisor
        supervisor.kill()
        wait_until(lambda: not is_alive(server.pid), 5, "the end of the server")
        server.restart()
        with psycopg.connect(server.dsn) as one:
            assert one.execute("select 1").fetchone() == (1,)


@pytest.mark.long
def test_servers_that_start_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    """Two processes with state folders of their own: what one is making, the other must not take for a dead one's."""
    code = "from labkit.runtime.postgres import Postgres\nfor _ in range(2):\n    Postgres().close()"
    running = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "LABKIT_STATE": str(tmp_path / name)})
        for name in ("one", "another")
    ]
    assert [process.wait(110) for process in running] == [0, 0]


# -- HTTP services


@dataclass(frozen=True)
class Shop(HttpService):
    """Answers with its process; `/broken` fails."""

    greeting: str = "hello"

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.get("/hello", self.hello), web.get("/broken", self.broken)]

    async def hello(self, request: web.Request) -> web.Response:
        return web.json_response({"says": self.greeting})

    async def broken(self, request: web.Request) -> web.Response:
        raise RuntimeError("broken on purpose")


@dataclass(frozen=True)
class Slow(Shop):
    """Listens once there is a file."""

    allowed: str = ""

    async def start(self, app: web.Application) -> None:
        while not os.path.exists(self.allowed):
            await asyncio.sleep(0.01)


def get(url: str) -> object:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


@pytest.mark.long
def test_a_service_in_two_pods_and_its_clients_tell_their_figures(lab: Lab) -> None:
    service = Shop(lab.port("shop"))
    assert lab.port("shop") == service.port != lab.port("another")
    shop = lab.deploy("shop", service, replicas=2)
    wait_ready(shop)
    assert get(f"{service.url}/hello") == {"says": "hello"}
    clients = lab.deploy("clients", Clients(service.url, ["/hello"], count=4, think=0.02))
    wait_ready(clients)
    wait_until(lambda: newest(lab, "requests/s", "clients") > 100, 20, "100 requests a second")
    wait_until(lambda: newest(lab, "requests", "shop") > 100, 20, "the same at the service")
    assert newest(lab, "p99 ms", "shop") > 0
    assert newest(lab, "p99 ms", "clients") >= newest(lab, "p50 ms", "clients") > 0
    assert newest(lab, "errors", "shop") == newest(lab, "errors", "clients") == 0
    shop.pods[0].kill()  # the other one goes on, and the port stays ours
    wait_until(lambda: shop.pods[0].restarts == 1 and shop.ready(), 20, "its restart")
    assert get(f"{service.url}/hello") == {"says": "hello"}
    with pytest.raises(urllib.error.HTTPError):
        get(f"{service.url}/broken")
    wait_until(lambda: newest(lab, "errors", "shop") == 1, 20, "the failure to be counted")
    clients.drain()
    shop.drain()


@pytest.mark.long
def test_a_service_is_ready_once_it_listens(lab: Lab, tmp_path: Path) -> None:
    """Its pod runs before that: whoever asks then is refused."""
    allowed = tmp_path / "allowed"
    service = Slow(lab.port("slow"), allowed=str(allowed))
    deployment = lab.deploy("slow", service)
    wait_running(deployment)
    assert not deployment.ready()
    allowed.touch()
    wait_ready(deployment)
    assert get(f"{service.url}/hello") == {"says": "hello"}


def test_a_port_on_which_connections_were_closed_just_now_is_passed_over(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first keeps the port for a minute
    choices = iter([(port, 0)])
    monkeypatch.setattr(module, "free_ports", lambda: next(choices, None) or free_ports())
    assert lab.port("anew") != port


def test_clients_of_a_service_that_is_away_count_errors(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    figures: list[Measured] = []
    stop = threading.Event()

    def report(step: Step, subject: Measured) -> None:
        figures.append(subject)
        if subject.counts["errors"] >= 3:
            stop.set()

    Clients(f"http://127.0.0.1:{lab.port('nobody')}", ["/"], count=2).run(stop, report)
    assert figures[-1].counts["requests"] == figures[-1].counts["errors"] >= 3
    assert capfd.readouterr().err.startswith("GET /: ClientConnectorError ")


@pytest.mark.parametrize("wrong", [{"paths": []}, {"count": 0}, {"think": -1}])
def test_clients_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(LabkitError, match="clients need"):
        Clients("http://127.0.0.1:1", **{"paths": ["/"], **wrong})  # type: ignore[arg-type]


# -- figures and boards


class Meter:
    """Reports one count and one gauge, and waits."""

    def run(self, stop: threading.Event, report: Report) -> None:
        report(Step.MEASURED, Measured({"drops": 3}, {"level": 0.5}))
        stop.wait()


@pytest.mark.long
def test_what_pods_measure_is_in_the_history(lab: Lab) -> None:
    meters = lab.deploy("meters", Meter(), replicas=2)
    wait_until(lambda: newest(lab, "drops", "meters") == 6, 20, "the sum of both pods")
    assert newest(lab, "level", "meters") == 0.5  # not summed: the highest
    assert {"drops", "drops/s", "level"} <= set(lab.history().metric)
    meters.drain()


@pytest.mark.long
def test_a_board_of_two_deployments_breaks_either(lab: Lab) -> None:
    first, second = lab.deploy("first", Meter()), lab.deploy("second", Meter(), replicas=2)
    wait_ready(first)
    wait_ready(second)
    board = lab.board(pods=[first, second], panels=[panel("Level", "level", unit="metres")])
    board.start()
    choice = board._pods._choice  # type: ignore[union-attr]
    assert [label for label, _ in choice.options] == ["first-0", "second-0", "second-1"]
    choice.value = "second-1"
    buttons = {button.widget.description: button.widget for button in board._all_buttons()}
    buttons["Kill second-1"].click()
    wait_until(lambda: [pod.restarts for pod in second.pods] == [0, 1], 20, "the kill")
    wait_until(second.ready, 20, "its restart")
    assert first.pods[0].restarts == 0
    board.close()
