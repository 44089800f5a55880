"""Imports of contacts for a browser: all services, a WebSocket service to be killed, and importers that wait."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from typing import Any

from consuming import fresh_group
from uploading import SECRET, Imports, advance, in_process

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.patterns.aggregation import Command, ImportKey
from labkit.services.contacts import ContactsJobs, Importer, Job, JobFinished, Progress
from labkit.services.notifications import NotificationService


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

    def notifying(self, front: ContactsJobs, **options: Any) -> AbstractContextManager[Any]:
        """The WebSocket service of that page, in a process, which is killed when the block ends."""
        return in_process(NotificationService(front.notifications_port, self.notices, SECRET, (front.url,), **options))
