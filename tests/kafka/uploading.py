"""Imports over HTTP: topics that nobody has used, services in threads, and senders that do as they like."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from consuming import fresh_topic
from stores import store_topic

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Report, Step
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.lab.pods.travel import pack
from labkit.patterns.aggregation import AtomicKeyValueStore, Command, ImportKey
from labkit.runtime.broker import free_ports
from labkit.services import contacts
from labkit.services.clients import direct
from labkit.services.contacts import (
    ContactsJob,
    ContactsJobs,
    Counted,
    ImportNotice,
    JobFinished,
    Notices,
    Progress,
    Reports,
)
from labkit.services.http import HOST, HttpService
from labkit.services.notifications import Channel, Channels

FILE = Path(__file__).parents[2] / "data" / "contacts.csv"
HEADER = b"name,email\n"
SECRET = "a secret of some length"
MINE, YOURS = Channels(SECRET).make(3600), Channels(SECRET).make(3600)
OPTIONS: dict[str, Any] = {"largest": 100_000, "at_once": 1}

RUN = """
import sys, threading
from labkit.lab.pods.travel import unpack
unpack(sys.stdin.buffer.read()).run(threading.Event(), lambda *_: print("ready", flush=True))
"""


class Served(ExitStack):
    """Services in threads, until the block ends."""

    def serve(self, service: HttpService, report: Report = lambda *_: None) -> None:
        stop, up = threading.Event(), threading.Event()

        def tell(step: Step, subject: Any) -> None:
            report(step, subject)
            up.set()

        thread = threading.Thread(target=service.run, args=(stop, tell))
        thread.start()
        self.callback(thread.join, 60)
        self.callback(stop.set)
        assert up.wait(60)


def advance(value: Progress | None, command: Command[ImportKey, JobFinished]) -> Progress:
    """The update function of the store."""
    assert command.value is not None
    return contacts.progress(value, command.value)


class Imports(Served):
    """The topics of imports, and Contacts Jobs."""

    def __init__(self, cluster: Cluster, dsn: str = "") -> None:
        super().__init__()
        self.dsn = dsn
        self.jobs: Topic[ContactsJob] = fresh_topic(cluster, 1, ContactsJob)
        self.notices: Topic[ImportNotice] = fresh_topic(cluster, 1, ImportNotice)
        self.commands: Topic[JobFinished] = fresh_topic(cluster, 1, JobFinished)
        self.told, self.reports = Notices(self.notices), Reports(self.commands)
        self.store = AtomicKeyValueStore(
            self.commands, store_topic(cluster, 1, Progress), advance, ImportKey.parse, Counted(self.told)
        )

    def service(self, **options: Any) -> ContactsJobs:
        """One for small files, one at a time."""
        port, notifications = free_ports()
        made = ContactsJobs(port, self.jobs, self.told, SECRET, self.store.store, self.dsn, notifications)
        return replace(made, **OPTIONS | options)

    def front(self, **options: Any) -> ContactsJobs:
        """The same, which is served."""
        service = self.service(**options)
        self.serve(service)
        return service

    def heard(self) -> list[tuple[str | None, ImportNotice]]:
        """Channels and notices so far."""
        with Reader(self.notices) as reader:
            return [(record.key, record.value) for record in reader.read_to_end()]

    def ended(self) -> list[str]:
        """The requests that were told to be completed, in order."""
        return [notice.request for _, notice in self.heard() if notice.stage == "completed"]


@contextmanager
def in_process(service: HttpService) -> Iterator[tuple[Any, psutil.Process]]:
    """The service in a process of its own, which is killed in the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", RUN], stdin=-1, stdout=-1, env=environment) as popen:
        try:
            assert popen.stdin is not None
            assert popen.stdout is not None
            popen.stdin.write(pack(service))
            popen.stdin.close()
            assert popen.stdout.readline() == b"ready\n"
            yield service, psutil.Process(popen.pid)
        finally:
            popen.kill()


def upload(service: ContactsJobs, data: bytes, channel: Channel = MINE, charset: str = "utf-8") -> tuple[int, str]:
    """Status and text of the answer; again while another upload is being sent."""
    url, headers = f"{service.url}/channels/{channel.id}/imports", {"Content-Type": f"text/csv; charset={charset}"}
    until = time.monotonic() + 120  # only ends a hang
    while True:
        try:
            with direct(urllib.request.Request(url, data, headers), timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                if refused.code != 503 or time.monotonic() > until:
                    return refused.code, refused.read().decode()


class Sender:
    """An upload by hand: it says what it likes of its length, and sends what it likes."""

    def __init__(self, service: ContactsJobs, *headers: str) -> None:
        self.socket = socket.create_connection((HOST, service.port), timeout=60)
        start = f"POST /channels/{MINE.id}/imports HTTP/1.1"
        self.send("\r\n".join((start, "Host: labkit", *headers, "", "")).encode())

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answered(self) -> bool:
        return bool(select.select([self.socket], [], [], 0.02)[0])

    def status(self) -> int:
        """Of the first answer, whatever comes of the connection."""
        found = re.match(rb"HTTP/1\.1 (\d+) ", self.socket.recv(100))
        assert found
        return int(found[1])

    def statuses(self) -> list[int]:
        """Of all answers, until the service closes the connection."""
        data = b""
        while piece := self.socket.recv(65536):
            data += piece
        return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+)", data)]

    def close(self) -> None:
        self.socket.close()
