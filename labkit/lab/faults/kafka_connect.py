"""The Kafka Connect of a lab: connectors are started, looked at and stopped here, and their worker can be broken."""

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

LOOK = 1.0  # seconds that a look for the board may take


class Connect(ServerFaults):
    """A lab's own worker of Kafka Connect, and what can be done to it: kill, freeze, restart, recover. It ends with the
    lab."""

    _stays_in_the_notebook = "connectors are started and stopped in the notebook, not by a handler"

    kind = KafkaConnect

    def __init__(self, name: str, history: History, cluster: Cluster, prefix: str) -> None:
        self.cluster = cluster
        self._worker = KafkaConnect(cluster, prefix)
        self.connectors: list[ConnectorStatus] = []
        """As they stood at the last `look`."""
        super().__init__(name, self._worker, history)

    @property
    def memory(self) -> int:
        """Bytes of memory that the worker holds; 0 while it is down."""
        return self._worker.memory

    def start(self, connector: Connector, timeout: float = 60.0) -> None:
        """Run this connector, in the place of another one of its name. Returns once it and its task run.

        Raises LabkitError when it fails, with its own error and, where that is known, the fix; and before anything is
        started when what it is to read or write is not there.
        """
        self._running("start a connector")
        if connector.config["connector.class"] == POSTGRES:
            replication_slots.collect(connector, runs.learner(), [prefix for prefix, _ in runs.living()])
        self._worker.start(connector, timeout)
        self.look()

    def stop(self, name: str) -> None:
        """Take the connector of this name away. What it has read stays known: one of its name goes on there, unless it
        is a capture, which would read all rows anew."""
        self._running("stop a connector")
        self._worker.stop(name)
        self.look()

    def status(self) -> pd.DataFrame:
        """Every connector: its state, how many of its tasks run, and its last error with the fix."""
        import pandas as pd

        rows = [(one.name, one.state, one.tasks, one.error) for one in self._look(timeout=10.0)]
        return pd.DataFrame(rows, columns=["connector", "state", "tasks", "last error"]).set_index("connector")

    def look(self, deaths: int = 0) -> None:
        """Note a death that nobody ordered, and how its connectors stand."""
        super().look(deaths)
        self.connectors = self._look(LOOK)

    def status_line(self) -> str:
        """How it stood when it was last looked at."""
        if self.state is not ServerState.RUNNING:
            return f"{self.name} {self.state.value}"
        each = [f"{one.name} {one.state}{f' ({one.error})' if one.error else ''}" for one in self.connectors]
        return f"{self.name}: {', '.join(each) or 'no connector'}"

    def _look(self, timeout: float) -> list[ConnectorStatus]:
        """Every connector as it stands; as it stood last while the worker does not answer."""
        if self.state is ServerState.RUNNING:
            with suppress(LabkitError):
                return self._worker.status(timeout)
        return [ConnectorStatus(one.name, "unknown", one.tasks, one.error) for one in self.connectors]

    def _running(self, what: str) -> None:
        if self.state is not ServerState.RUNNING:
            raise LabkitError(f"cannot {what}: {self.name} is {self.state.value}: recover it first")

    def __repr__(self) -> str:
        return f"{self.status_line()} · {self.memory / 1e6:,.0f} MB"
