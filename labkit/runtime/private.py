"""A broker of one owner, who may do to it what nobody may do to a shared one: kill it, freeze it, start it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from labkit.kafka.cluster import Cluster
from labkit.runtime.broker import HOST, Broker, free_ports, prepare
from labkit.runtime.child import Child
from labkit.runtime.proxy import Proxy
from labkit.runtime.server import Server

# A second door. Who comes in by it is told to come back to the proxy's port, whatever broker he looks for.
PROXIED = f"""\
listeners=PLAINTEXT://{HOST}:{{port}},CONTROLLER://{HOST}:{{controller_port}},PROXIED://{HOST}:{{inner}}
advertised.listeners=PLAINTEXT://{HOST}:{{port}},PROXIED://{HOST}:{{proxy}}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT
"""


class PrivateBroker(Server):
    """One embedded broker (0.9 s once everything is prepared; again in some 7 s after a kill).

    `cluster` reaches it directly, `proxy.cluster` by a connection that can be broken.
    """

    name, kind = "Kafka", "private"
    needs = 330

    def __init__(self) -> None:
        self._kafka = prepare()
        super().__init__()
        self.cluster: Cluster = self._broker.cluster
        self.cluster_id: str = self._broker.cluster_id

    @property
    def log(self) -> Path:
        """What it logs: warnings and errors."""
        return self._broker.log

    def close(self) -> None:
        """End it and remove its data. May be called again."""
        super().close()
        if hasattr(self, "proxy"):
            self.proxy.close()

    def _make(self) -> None:
        inner, proxy = free_ports()
        self.proxy = Proxy(proxy, to=inner)
        made = Broker.create(self.folder, self._kafka)
        ports = {"port": made.port, "controller_port": made.controller_port, "inner": inner, "proxy": proxy}
        self._broker = replace(made, extra=PROXIED.format(**ports))
        self._broker.write_settings()

    def _launch(self) -> Child:
        if self._broker.was_killed:
            self._broker.fence(self._kafka)
        return Child(self._kafka.command(self.folder), cwd=self.folder, output=self._broker.log)

    def _wait_until_ready(self, child: Child) -> None:
        self._broker.wait_until_ready(lambda: child.poll() is None)
