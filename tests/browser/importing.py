"""Imports of contacts for a browser: all services, a WebSocket service to be killed, and importers that wait."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from consuming import fresh_group
from uploading import SECRET, Imports, advance

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.lab.travel import pack
from labkit.patterns.aggregation import Command, ImportKey
from labkit.services.contacts import ContactsJobs, Importer, Job, JobFinished, Progress
from labkit.services.notifications import NotificationService

RUN = """
import sys, threading
from labkit.lab.travel import unpack
unpack(sys.stdin.buffer.read()).run(threading.Event(), lambda *_: print("ready", flush=True))
"""


class Gate:
    """Jobs wait here."""

    def __init__(self) -> None:
        self._changed, self._free = threading.Condition(), float("inf")

    def hold(self) -> None:
        """Let none through."""
        self._free = 0

    def let(self, jobs: float = float("inf")) -> None:
        """Let so many more through, or all there are."""
        with self._changed:
            self._free += jobs
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0)
            self._free -= 1


class World(Imports):
    """All services of the story in threads, until the block ends."""

    def __init__(self, cluster: Cluster, dsn: str) -> None:
        super().__init__(cluster, dsn)
        self.gate = Gate()
        """Where importers wait with each job, when its rows are stored, and before that is reported."""
        self.counting = Gate()
        """Where the store waits with each report."""
        self.store = replace(self.store, update=self.count)
        importer = self.enter_context(closing(Importer(dsn, self.report, self.told)))
        self.serve(Consumer(self.jobs, importer, fresh_group(), order="key"))
        self.serve(self.store.consumer("one", commit_interval=0.02))
        self.main = self.front()
        self.callback(self.open_gates)

    def open_gates(self) -> None:
        self.gate.let()
        self.counting.let()

    def count(self, value: Progress | None, command: Command[ImportKey, JobFinished]) -> Progress:
        self.counting.wait()
        return advance(value, command)

    def report(self, job: Job) -> None:
        self.gate.wait()
        self.reports(job)

    def front(self, **options: Any) -> ContactsJobs:
        """Another service with a page."""
        return super().front(**{"largest": 2_000_000, "at_once": 4, **options})

    @contextmanager
    def notifying(self, front: ContactsJobs, **options: Any) -> Iterator[None]:
        """The WebSocket service of that page, in a process, which is killed when the block ends."""
        service = NotificationService(front.notifications_port, self.notices, SECRET, (front.url,), **options)
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
