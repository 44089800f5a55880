"""A broker of one owner, who may do to it what nobody may do to a shared one: kill it, freeze it, start it again."""

from __future__ import annotations

from pathlib import Path

from labkit.kafka.cluster import Cluster
from labkit.runtime.broker import Broker, prepare
from labkit.runtime.child import Child
from labkit.runtime.server import Server


class PrivateBroker(Server):
    """One embedded broker (0.9 s once everything is prepared; again in some 4 s after a `restart`)."""

    name, kind = "Kafka", "private"

    def __init__(self) -> None:
        self._kafka = prepare()
        super().__init__()
        self.cluster: Cluster = self._broker.cluster
        self.cluster_id: str = self._broker.cluster_id

    @property
    def log(self) -> Path:
        """What it logs: warnings and errors."""
        return self._broker.log

    def _make(self) -> None:
        self._broker = Broker.create(self.folder, self._kafka)

    def _launch(self) -> Child:
        return Child(self._kafka.command(self.folder), cwd=self.folder, output=self._broker.log)

    def _wait_until_ready(self, child: Child) -> None:
        self._broker.wait_until_ready(lambda: child.poll() is None)
