"""Kafka of one owner, who may do to it what nobody may do to a shared one: kill it, freeze it, start it again.

It is one broker, or several that make one cluster.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Self

from labkit.kafka.cluster import Cluster
from labkit.runtime.broker import HOST, TRIES, Broker, Kafka, PortTaken, free_ports, new_uuid, prepare
from labkit.runtime.child import Child
from labkit.runtime.proxy import Proxy
from labkit.runtime.server import Server, ServerState, warn_if_memory_is_short

# A second listener. Its clients are told to connect through the proxy, whichever broker they ask for.
PROXIED = f"""\
listeners=PLAINTEXT://{HOST}:{{port}},CONTROLLER://{HOST}:{{controller_port}},PROXIED://{HOST}:{{inner}}
advertised.listeners=PLAINTEXT://{HOST}:{{port}},PROXIED://{HOST}:{{proxy}}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT
"""

# One of several, which all are broker and controller. Each has a replica of every partition, and a majority of replicas
# must have a record before a client that asks for all of them hears that it is stored.
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

    def _wait_until_ready(self, child: Child) -> None:
        self._broker.wait_until_ready(lambda: child.poll() is None)


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
        """End it and remove its data. May be called again."""
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


class PrivateCluster:
    """Several embedded brokers that make one cluster; it works as long as a majority of them does.

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
            except PortTaken:  # they know each other by their ports: all are chosen anew
                if attempt == TRIES:
                    raise

    @property
    def cluster(self) -> Cluster:
        """It is reached by each of them."""
        return Cluster(",".join(f"{HOST}:{port}" for port in self.ports[: self.size]))

    def close(self) -> None:
        """End all of them and remove their data. May be called again."""
        for broker in self.brokers:
            broker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def works_with(self, one: ClusterBroker) -> bool:
        """Whether there is a majority once this one runs. Until all have been started, it is waited for."""
        others = [broker for broker in self.brokers if broker is not one and broker.state is ServerState.RUNNING]
        return not self.brokers or len(others) + 1 >= self.majority

    def _start(self) -> None:
        """All at once, as none is ready before a majority is."""
        self.cluster_id, self.ports, self.given_up = new_uuid(), free_ports(2 * self.size), threading.Event()
        made: list[ClusterBroker] = []
        failed: list[BaseException] = []

        def start(node: int) -> None:
            try:
                made.append(ClusterBroker(self, node))
            except BaseException as error:
                failed.append(error)
                self.given_up.set()  # the others wait for it

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

    Killed and started again, it needs no fencing: the others have missed it, and have other leaders.
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

    def _wait_until_ready(self, child: Child) -> None:
        if not self.waits_for:  # else nobody answers until another one is started
            self._broker.wait_until_ready(lambda: child.poll() is None and not self._all.given_up.is_set())
