"""Imports of contacts for a browser: a Kafka, a PostgreSQL and all services; importers wait where a test wants it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from labkit.kafka.cluster import Cluster
from labkit.kafka.producer import Producer
from labkit.kafka.records import encode
from labkit.kafka.topics import Topic
from labkit.lab.travel import pack
from labkit.patterns.aggregation import AtomicKeyValueStore
from labkit.patterns.retries import RetryingConsumer, blocking
from labkit.runtime.broker import free_ports
from labkit.services import contacts
from labkit.services.contacts import ContactsJob, ContactsJobs, Importer, Job, JobFinished, Progress, Reports
from labkit.services.http import HOST
from labkit.services.notifications import Channels, NotificationService

SECRET = "a secret of some length"
WAIT = 30.0  # seconds that only end a hang
RUN = """
import sys, threading
from labkit.lab.travel import unpack
unpack(sys.stdin.buffer.read()).run(threading.Event(), lambda *_: print("ready", flush=True))
"""


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """STAND-IN for ImportNotice."""

    stage: str
    request: str
    total: int
    job: int = 0
    line: int = 0
    reason: str = ""
    done: int = 0
    failed: int = 0

    @property
    def id(self) -> str:
        return "/".join(map(str, msgspec.structs.astuple(self)))


class Gate:
    """Importers wait here with each job when its rows are stored and before it is reported."""

    def __init__(self) -> None:
        self._changed, self._free = threading.Condition(), float("inf")

    def hold(self) -> None:
        """Let none through."""
        self._free = 0

    def let(self, jobs: float = float("inf")) -> None:
        """Let so many more through; all of them."""
        with self._changed:
            self._free += jobs
            self._changed.notify_all()

    def __call__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0)
            self._free -= 1


class StandIn(ContactsJobs):
    def routes(self):
        return [*super().routes(), web.get("/channels/{channel}/imports", self.tell)]

    async def tell(self, request: web.Request) -> web.Response:
        channel = request.match_info["channel"]
        Channels(SECRET).check_owner(channel, request.headers["Channel-Key"])
        found = []
        for key, value in dict(STORES[self.port]).items():
            if contacts.channel_of(key) == channel:
                name = key.rpartition("-")[0]
                bad = [{"line": one.line, "reason": one.reason} for one in contacts.bad_rows(DSN[0], name)]
                found.append(
                    {
                        "request": name,
                        "total": value.total,
                        "done": value.done,
                        "failed": value.failed,
                        "bad_rows": bad[:1000],
                        "bad_row_count": len(bad),
                    }
                )
        return web.json_response(found)


STORES: dict[int, Any] = {}
DSN: list[str] = []


class Front(NamedTuple):
    """Ports of a Contacts Jobs and of the WebSocket service of its page."""

    port: int
    notifications_port: int

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://{HOST}:{self.port}/"


class World(ExitStack):
    """All services of the story in threads, until the block ends."""

    def __init__(self, cluster: Cluster, dsn: str) -> None:
        super().__init__()
        self.cluster, self.dsn, self.gate = cluster, dsn, Gate()
        name = uuid.uuid4().hex[:8]
        self.jobs: Topic[ContactsJob] = Topic(cluster, f"{name}.jobs", 4, ContactsJob)
        self.notices: Topic[Told] = Topic(cluster, f"{name}.notices", 2, Told)
        commands = Topic(cluster, f"{name}.commands", 2, JobFinished)
        imports = Topic(cluster, f"{name}.imports", 2, Progress)
        for topic in (self.jobs, self.notices, commands):
            topic.create()
        imports.create({"cleanup.policy": "compact"})
        self.producer = Producer(cluster)
        reports = Reports(commands)
        store = AtomicKeyValueStore(
            commands, imports, lambda value, command: contacts.progress(value, command.value), callback=self.changed
        )

        def report(job: Job) -> None:
            self.gate()
            reports(job)

        importer = self.enter_context(closing(Importer(dsn, report, self.notify)))
        self.imports = self.enter_context(store.reads())
        self.start(RetryingConsumer(self.jobs, importer, f"{name}-importers", retry=blocking(0.1), order="key"))
        self.start(store.consumer(slot="one", commit_interval=0.02))
        self.main = self.front()
        self.callback(self.gate.let)

    def front(self, notifications_port: int = 0) -> Front:
        """Start another Contacts Jobs, whose page listens at this port."""
        port, other = free_ports()
        front = Front(port, notifications_port or other)
        STORES[port] = self.imports
        DSN[:] = [self.dsn]
        options = {"notifications_port": front.notifications_port, "largest": 2_000_000}
        self.start(StandIn(port, self.jobs, self.deliver, **options))
        return front

    def changed(self, key: str, old: Progress | None, new: Progress) -> None:
        request = key.rpartition("-")[0]
        stage = "completed" if new.completed else "processed"
        told = Told(stage, request, new.total, done=new.done, failed=new.failed)
        self.notices.send(told, contacts.channel_of(request))

    def notify(self, channel: str, notice: Any) -> None:
        told = Told(notice.stage, notice.request, notice.total, notice.job, notice.line, notice.reason)
        self.producer.send(self.notices.name, encode(told), channel)

    def deliver(self, channel: str, notice: Any) -> None:
        self.notify(channel, notice)
        self.producer.flush()

    def start(self, service: Any) -> None:
        """Run a service in a thread."""
        stop, up = threading.Event(), threading.Event()
        thread = threading.Thread(target=service.run, args=(stop, lambda *_: up.set()))
        thread.start()
        self.callback(thread.join, WAIT)
        self.callback(stop.set)
        assert up.wait(WAIT)

    @contextmanager
    def notifying(self, front: Front, **options: Any) -> Iterator[None]:
        """The WebSocket service of this page, in a process, which is killed when the block ends."""
        service = NotificationService(front.notifications_port, self.notices, SECRET, (front.url[:-1],), **options)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", RUN]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(pack(service))
                process.stdin.close()
                assert process.stdout.readline() == b"ready\n"
                yield
            finally:
                process.kill()
