"""The Kafka Connect of a lab: starts, observes and stops connectors, and breaks their worker."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.lab import runs
from labkit.lab.faults.servers import ServerFaults
from labkit.lab.history import History
from labkit.runtime import replication_slots
from labkit.runtime.connectors import POSTGRES, Connector
from labkit.runtime.kafka_connect import ConnectorStatus, KafkaConnect
from labkit.runtime.server import ServerState

if TYPE_CHECKING:
    import pandas as pd

LOOK = 1.0  # seconds for a look, for the board


class Connect(ServerFaults):
    """A lab's own worker of Kafka Connect, and what can be done to it: kill, freeze, restart, recover. It ends with the
    lab."""

    _stays_in_the_notebook = "connectors are started and stopped in the notebook, not by a handler"

    kind = KafkaConnect

    def __init__(self, name: str, history: History, cluster: Cluster, prefix: str) -> None:
        self.cluster = cluster
        self._worker = KafkaConnect(cluster, prefix)
        self.connectors: list[ConnectorStatus] = []
        """Their states at the last `look`."""
        super().__init__(name, self._worker, history)

    @property
    def memory(self) -> int:
        """Bytes of memory that the worker holds; 0 while it is down."""
        return self._worker.memory

    def start(self, connector: Connector, timeout: float = 60.0) -> None:
        """Run this connector. It replaces a connector of the same name. Returns once it and its task run.

        Raises LabkitError when it fails, with its own error and, if known, the fix; and, before anything is started,
        when its source or its target does not exist.
        """
        self._running("start a connector")
        if connector.config["connector.class"] == POSTGRES:
            replication_slots.collect(connector, runs.learner(), [prefix for prefix, _ in runs.living()])
        self._worker.start(connector, timeout)
        self.look()

    def stop(self, name: str) -> None:
        """Remove the connector of this name. Its position is kept, so a new connector of this name goes on there; but a
        capture reads all rows anew."""
        self._running("stop a connector")
        self._worker.stop(name)
        self.look()

    def status(self) -> pd.DataFrame:
        """Every connector: its state, how many of its tasks run, and its last error with the fix."""
        import pandas as pd

        rows = [(one.name, one.state, one.tasks, one.error) for one in self._look(timeout=10.0)]
        return pd.DataFrame(rows, columns=["connector", "state", "tasks", "last error"]).set_index("connector")

    def look(self, deaths: int = 0) -> None:
        """Note an unexpected death, and the states of its connectors."""
        super().look(deaths)
        self.connectors = self._look(LOOK)

    def status_line(self) -> str:
        """Its state at the last `look`."""
        if self.state is not ServerState.RUNNING:
            return f"{self.name} {self.state.value}"
        each = [f"{one.name} {one.state}{f' ({one.error})' if one.error else ''}" for one in self.connectors]
        return f"{self.name}: {', '.join(each) or 'no connector'}"

    def _look(self, timeout: float) -> list[ConnectorStatus]:
        """The state of every connector; the last known one while the worker does not answer."""
        if self.state is ServerState.RUNNING:
            with suppress(LabkitError):
                return self._worker.status(timeout)
        return [ConnectorStatus(one.name, "unknown", one.tasks, one.error) for one in self.connectors]

    def _running(self, what: str) -> None:
        if self.state is not ServerState.RUNNING:
            raise LabkitError(f"cannot {what}: {self.name} is {self.state.value}: recover it first")

    def __repr__(self) -> str:
        return f"{self.status_line()} · {self.memory / 1e6:,.0f} MB"
