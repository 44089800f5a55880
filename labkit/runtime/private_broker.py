"""A Kafka of one owner, who may kill it, freeze it and start it again, which nobody may do to a shared one.

It is one broker, or several that make one cluster.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from labkit.closing import Closing
from labkit.kafka.cluster import Cluster
from labkit.runtime.broker import HOST, TRIES, Broker, Kafka, PortTaken, free_ports, new_uuid, prepare
from labkit.runtime.child import Child
from labkit.runtime.proxy import Proxy
from labkit.runtime.server import Server, ServerState, warn_if_memory_is_short

# A second listener. It tells its clients to connect through the proxy.
PROXIED = f"""\
listeners=PLAINTEXT://{HOST}:{{port}},CONTROLLER://{HOST}:{{controller_port}},PROXIED://{HOST}:{{inner}}
advertised.listeners=PLAINTEXT://{HOST}:{{port}},PROXIED://{HOST}:{{proxy}}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT
"""

# One of several, each broker and controller. Each has a replica of every partition. With acks=all, a record is
# confirmed once a majority of the replicas has it.
MEMBER = """\
node.id={node}
controller.quorum.voters={voters}
default.replication.factor={size}
min.insync.replicas={majority}
offsets.topic.replication.factor={size}
transaction.state.log.replication.factor={size}
transaction.state.log.min.isr={majority}
share.coordinator.state.topic.replication.factor={size}
share.coordinator.state.topic.min.isr={majority}
"""
EACH_MB = 330  # of memory


class BrokerServer(Server):
    """A broker as a server of one owner."""

    kind = "private"
    _kafka: Kafka
    _broker: Broker

    @property
    def log(self) -> Path:
        return self._broker.log

    def _launch(self) -> Child:
        return Child(self._kafka.command(self.folder), cwd=self.folder, output=self._broker.log)

    def _answers(self) -> bool:
        return self._broker.answers()


class PrivateBroker(BrokerServer):
    """One embedded broker, which nobody else uses.

    `cluster` reaches it directly, `proxy.cluster` by a connection that can be broken.
    """

    name, needs = "Kafka", EACH_MB

    def __init__(self) -> None:
        super().__init__()
        self.cluster: Cluster = self._broker.cluster
        self.cluster_id: str = self._broker.cluster_id

    def close(self) -> None:
        """End the broker and remove its data. May be called again."""
        super().close()
        if hasattr(self, "proxy"):
            self.proxy.close()

    def _make(self) -> None:
        self._kafka = prepare()
        inner, proxy = free_ports()
        self.proxy = Proxy(proxy, to=inner)
        made = Broker.create(self.folder, self._kafka)
        ports = {"port": made.port, "controller_port": made.controller_port, "inner": inner, "proxy": proxy}
        self._broker = replace(made, extra=PROXIED.format(**ports))
        self._broker.write_settings()

    def _launch(self) -> Child:
        if self._broker.was_killed:
            self._broker.fence(self._kafka)
        return super()._launch()


class PrivateCluster(Closing):
    """Several embedded brokers that make one cluster, which works as long as a majority of them does.

    Each is a `Server` of its own, and keeps its data and ports. Raises LabkitError when they cannot be started.
    """

    def __init__(self, size: int = 3) -> None:
        warn_if_memory_is_short(f"{size} brokers", size * EACH_MB)
        self.kafka, self.size, self.majority = prepare(), size, size // 2 + 1
        self.brokers: tuple[ClusterBroker, ...] = ()
        for attempt in range(1, TRIES + 1):
            try:
                self._start()
                return
            except PortTaken:  # the brokers know each other by their ports: choose all ports anew
                if attempt == TRIES:
                    raise

    @property
    def cluster(self) -> Cluster:
        """The cluster, by the addresses of all brokers."""
        return Cluster(",".join(f"{HOST}:{port}" for port in self.ports[: self.size]))

    def close(self) -> None:
        """End all brokers and remove their data. May be called again."""
        for broker in self.brokers:
            broker.close()

    def works_with(self, one: ClusterBroker) -> bool:
        """Whether a majority runs, together with this one. True while all are being started for the first time."""
        others = [broker for broker in self.brokers if broker is not one and broker.state is ServerState.RUNNING]
        return not self.brokers or len(others) + 1 >= self.majority

    def _start(self) -> None:
        """Start all at once, as none is ready before a majority is."""
        self.cluster_id, self.ports, self.given_up = new_uuid(), free_ports(2 * self.size), threading.Event()
        made: list[ClusterBroker] = []
        failed: list[BaseException] = []

        def start(node: int) -> None:
            try:
                made.append(ClusterBroker(self, node))
            except BaseException as error:
                failed.append(error)
                self.given_up.set()  # the others would wait for this one

        try:
            with ThreadPoolExecutor(self.size) as pool:  # whose end waits for all of them
                try:
                    wait([pool.submit(start, node) for node in range(1, self.size + 1)])
                except BaseException:  # an interrupt
                    self.given_up.set()
                    raise
            if failed:
                raise failed[0]
        except BaseException:
            for one in made:
                one.close()
            raise
        self.brokers = tuple(sorted(made, key=lambda one: one.node))


class ClusterBroker(BrokerServer):
    """One of several brokers.

    It needs no fencing when it is started again after a kill: the others have missed it, and have chosen other leaders.
    """

    tries = 1

    def __init__(self, cluster: PrivateCluster, node: int) -> None:
        self.name, self.node, self._all, self._kafka = f"Kafka {node}", node, cluster, cluster.kafka
        super().__init__()

    @property
    def waits_for(self) -> str:
        return "" if self._all.works_with(self) else "a majority"

    def _make(self) -> None:
        size, ports = self._all.size, self._all.ports
        voters = ",".join(f"{number}@{HOST}:{port}" for number, port in enumerate(ports[size:], 1))
        extra = MEMBER.format(node=self.node, voters=voters, size=size, majority=self._all.majority)
        own = ports[self.node - 1 :: size]
        self._broker = Broker.create(self.folder, self._kafka, own, extra, self._all.cluster_id, self.node)

    def _lives(self) -> bool:
        return super()._lives() and not self._all.given_up.is_set()
