"""The brokers of a lab's Kafka: their faults, who leads which partition, and a connection that can be cut."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.lab.board.panels import Panel, replica_panels
from labkit.lab.faults.connection import ConnectionFaults
from labkit.lab.faults.servers import ServerFaults
from labkit.lab.history import History
from labkit.runtime.which_kafka import Connection


class Brokers:
    """The part of a Lab that knows its brokers: a shared one, one of its own, or three."""

    connection: Connection
    brokers: tuple[ServerFaults, ...]
    """Faults of each broker."""

    def _know_brokers(self, notebook: str, history: History) -> None:
        self._shared = "this Kafka is shared with other notebooks and `make lab`. "
        self._shared += f"One of your own to break: Lab({notebook!r}, cluster='private')"
        own = self.connection.brokers
        self.brokers = tuple(ServerFaults(one.name, one, history, needed=len(own) == 1) for one in own)
        if not own:
            self.brokers = (ServerFaults("Kafka", None, history, self._shared),)
        broker = self.connection.broker
        self._proxied = [] if broker is None else [ConnectionFaults(broker.proxy, history)]

    @property
    def broker(self) -> ServerFaults:
        """Faults of the broker. Raises LabkitError where there are several."""
        if len(self.brokers) > 1:
            raise LabkitError(
                f"this lab has {len(self.brokers)} brokers: take one of lab.brokers, or lab.leader(topic, partition)"
            )
        return self.brokers[0]

    def leader(self, topic: Topic[Any], partition: int = 0) -> ServerFaults:
        """Faults of the broker that leads this partition: clients write and read its records there. When a broker dies,
        Kafka notices that some seconds later, and calls it the leader until then.

        Raises LabkitError for a partition that is not there, or has no leader; ClusterUnreachable.
        """
        self._check_open(topic)
        found = self.connection.cluster.partitions(topic.name)
        if partition not in found:
            raise LabkitError(f"{topic.short} has partitions 0 to {len(found) - 1}, not {partition!r}")
        if (leader := found[partition].leader) < 0:
            raise LabkitError(
                f"{topic.short}/{partition} has no leader now: too many of lab.brokers are away, recover() them"
            )
        return self.brokers[leader - 1] if len(self.brokers) > 1 else self.brokers[0]

    def replicas(self, topic: Topic[Any]) -> list[Panel]:
        """Panels for a board: how many partitions of a topic each broker leads, and how many replicas are in sync.

        Raises LabkitError where there is one broker.
        """
        self._check_open(topic)
        if len(self.brokers) == 1:
            raise LabkitError("replicas are on several brokers: Lab(…, cluster='private', brokers=3) has three")
        return replica_panels(topic, [one.name for one in self.brokers])

    @property
    def proxy(self) -> ConnectionFaults:
        """The connection to this lab's own broker that can be cut, held and slowed down. A pod uses it if its topics
        have its cluster: `replace(topic, cluster=lab.proxy.cluster)`. Board and verdict do not use it.

        Raises LabkitError where the broker is shared, or there are several.
        """
        self._check_open()
        if len(self.brokers) > 1:
            raise LabkitError(
                f"a lab with {len(self.brokers)} brokers has no proxy, as each of them tells clients where the others "
                "are. A lab with one broker has one: Lab(…, cluster='private')"
            )
        if not self._proxied:
            raise LabkitError(self._shared)
        return self._proxied[0]

    def size_on_disk(self, topic: Topic[Any]) -> int:
        """Bytes of a topic's records in Kafka's files, all replicas. Raises LabkitError where Kafka is not this lab's
        own."""
        if not self.connection.brokers:
            raise LabkitError("a lab knows the files of its own Kafka only: Lab(…, cluster='private')")
        total = 0
        for broker in self.connection.brokers:
            for file in broker.folder.glob(f"data/{topic.name}-*/*.log"):
                with suppress(FileNotFoundError):  # Kafka has just deleted it
                    total += file.stat().st_size
        return total

    def _check_open(self, *things: object) -> None:
        raise NotImplementedError
