"""Kafka Connect: a worker of one owner, which runs connectors. Its REST interface takes them, and shows their state."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError, TopicMissing, Unavailable
from labkit.kafka.producer import end_transactions
from labkit.runtime import replication_slots
from labkit.runtime.broker import HOST, LOGGING, free_ports, log_tail
from labkit.runtime.child import Child
from labkit.runtime.connectors import MIRROR, POSTGRES, Connector, with_fix
from labkit.runtime.jars import connect_jars
from labkit.runtime.java import find_java
from labkit.runtime.server import Server

MAIN = "org.apache.kafka.connect.cli.ConnectDistributed"
REQUEST = 10.0  # seconds for one answer
LOOK = 0.05  # seconds between two looks at a connector's state
JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xms48m", "-Xmx192m")

SETTINGS = """\
bootstrap.servers={bootstrap}
group.id={prefix}connect
config.storage.topic={prefix}connect-configs
offset.storage.topic={prefix}connect-offsets
status.storage.topic={prefix}connect-status
# As many replicas as the cluster gives a topic by default.
config.storage.replication.factor=-1
offset.storage.replication.factor=-1
status.storage.replication.factor=-1
offset.storage.partitions=1
status.storage.partitions=1
listeners=http://{host}:{port}
exactly.once.source.support=enabled
# Otherwise Connect scans every class of every jar, which is slow.
plugin.discovery=service_load
# A topic is made on purpose, or not at all.
topic.creation.enable=false
key.converter=org.apache.kafka.connect.converters.ByteArrayConverter
value.converter=org.apache.kafka.connect.converters.ByteArrayConverter
offset.flush.interval.ms=1000
# A worker that comes back after kill -9 gets its tasks as soon as the session of its predecessor is over.
scheduled.rebalance.max.delay.ms=0
session.timeout.ms=6000
heartbeat.interval.ms=500
"""


@dataclass(frozen=True)
class ConnectorStatus:
    """The state of a connector: running, failed (`error` says why), starting, paused or stopped."""

    name: str
    state: str
    tasks: str
    """How many of its tasks run: "1 of 1"."""
    error: str = ""
    """Its last error, in one line, with the fix where that is known."""


class KafkaConnect(Server):
    """One distributed worker (some 170 MB), alone in its group, with Debezium and MirrorMaker. It listens on
    127.0.0.1 only.

    The names of its group and of its three topics begin with `prefix`. These topics hold the connectors, and what they
    have read: a worker that is started again goes on with them.
    """

    name, kind = "Kafka Connect", "labkit-connect"
    needs = 250
    patience = 240.0

    def __init__(self, cluster: Cluster, prefix: str) -> None:
        if cluster.security:
            raise LabkitError(
                f"Kafka Connect runs here only on a Kafka without a login, and {cluster.bootstrap} wants one: use the "
                "embedded Kafka"
            )
        self.cluster, self.prefix = cluster, prefix
        self._cluster_id = cluster.describe().cluster_id
        self._java, self._jars = find_java(), connect_jars()
        self._captures: dict[tuple[str | None, ...], Connector] = {}  # captures whose slot may exist, by `_source_of`
        self._mirrored: dict[str, set[tuple[str, str, str]]] = {}  # source, target and topic, by the connector's name
        self._writers: set[str] = set()  # connectors that write to the worker's own Kafka
        super().__init__()

    @property
    def url(self) -> str:
        """The address of its REST interface."""
        return f"http://{HOST}:{self.port}"

    @property
    def memory(self) -> int:
        """Bytes of memory that the worker holds; 0 while it is down."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def start(self, connector: Connector, timeout: float = 60.0) -> None:
        """Have the worker run this connector, in the place of one with its name. Returns once connector and task run.

        Raises LabkitError when the connector fails, with its own error and, where it is known, the fix; when its table
        or topic does not exist; Unavailable when it does not run within `timeout` seconds.
        """
        until = time.monotonic() + timeout
        if connector.config["connector.class"] == POSTGRES:
            replication_slots.check(connector)
            self._check_home(connector)
        _check_topics(connector)
        target = self._target_of(connector)
        copies = self._copies_of(connector, target)
        source = _source_of(connector)
        path, wanted = f"/connectors/{connector.name}", {**connector.config, "name": connector.name}
        there = self._find(path, until)
        if there is not None and _source_of(replace(connector, config=there["config"])) != source:
            self._take_away(connector.name, until)  # its offsets would say that the new source has been read
            there = None
        if connector.config["connector.class"] == POSTGRES:
            self._captures[source] = connector
        if target == self._cluster_id:
            self._writers.add(connector.name)
        if there is not None and (
            there["config"] != wanted or self._status_of(connector.name).state in ("failed", "paused", "stopped")
        ):
            self._remove(path, until)
            there = None
        if there is None:
            self._insist("PUT", f"{path}/config", until, wanted)
        self._mirrored[connector.name] = copies
        while (status := self._status_of(connector.name)).state != "running":
            if status.state == "failed":
                raise LabkitError(f"connector {connector.name} failed: {status.error}")
            self._wait(until, f"connector {connector.name} does not run, it is {status.state}")

    def stop(self, name: str, timeout: float = 30.0) -> None:
        """Take a connector away. A later one with its name goes on where it has stopped reading. But not a capture: its
        slot in PostgreSQL goes with it, and the next capture reads all rows anew."""
        until = time.monotonic() + timeout
        if not self._captures_of(name) and self._find(f"/connectors/{name}", until) is None:
            raise LabkitError(f"{self.name} has no connector {name!r}: `status()` lists its connectors")
        self._take_away(name, until)
        if left := self._captures_of(name):
            fixes = "; ".join(replication_slots.how_to_drop(self._captures[one]) for one in left)
            raise LabkitError(
                f"connector {name} is stopped, but its slot cannot be dropped now, and PostgreSQL keeps its log for "
                f"it: stop it once more when PostgreSQL is up, or {fixes}"
            )

    def status(self, timeout: float = REQUEST) -> list[ConnectorStatus]:
        """All connectors, by name. Raises Unavailable while the worker does not answer."""
        found = self._ask("GET", "/connectors?expand=status", timeout=timeout)
        return [_status(name, found[name]["status"]) for name in sorted(found)]

    def close(self) -> None:
        """End the worker, remove its files, and drop its captures' slots in PostgreSQL. May be called again, to drop a
        slot that could not be dropped before."""
        super().close()
        self._drop(list(self._captures))

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700)
        (self.port,) = free_ports(1)
        settings = SETTINGS.format(bootstrap=self.cluster.bootstrap, prefix=self.prefix, host=HOST, port=self.port)
        (self.folder / "worker.properties").write_text(settings)
        (self.folder / "log4j2.properties").write_text(LOGGING)

    def _launch(self) -> Child:
        self.cluster.describe()  # or the worker would wait a minute for a Kafka that is away
        # A new worker reads its topics to their ends, and would wait for transactions that a killed one left open.
        group = f"{self.prefix}connect"
        end_transactions(self.cluster, [f"connect-cluster-{group}", *(f"{group}-{name}-0" for name in self._writers)])
        command = self._java.command([*JVM, *self._java.silence], self._jars, MAIN, "worker.properties")
        return Child(command, cwd=self.folder, output=self.log)

    def _answers(self) -> bool:
        try:
            self._ask("GET", "/health")
            # Whoever took the port before our worker did may be a worker too.
            return bool(self._ask("GET", "/")["kafka_cluster_id"] == self._cluster_id)
        except (LabkitError, ValueError, KeyError, TypeError):  # or anything that speaks HTTP
            return False

    def _find(self, path: str, until: float) -> dict[str, Any] | None:
        """The worker's answer about a connector; None if there is no such connector."""
        try:
            return dict(self._insist("GET", path, until))
        except _Missing:
            return None

    def _check_home(self, connector: Connector) -> None:
        """Raises LabkitError for a capture into another Kafka than the worker's: nobody has made it work."""
        for topic in connector.topics:
            if topic.cluster != self.cluster and topic.cluster.describe().cluster_id != self._cluster_id:
                raise LabkitError(
                    f"{connector.name} would write to Kafka at {topic.cluster.bootstrap}, and a capture writes to its "
                    f"worker's Kafka, {self.cluster.bootstrap}: capture into a topic there, and mirror that"
                )

    def _target_of(self, connector: Connector) -> str:
        """The id of the cluster to which a connector writes."""
        to = connector.config.get("producer.override.bootstrap.servers", self.cluster.bootstrap)
        return self._cluster_id if to == self.cluster.bootstrap else Cluster(to).describe().cluster_id

    def _copies_of(self, connector: Connector, target: str) -> set[tuple[str, str, str]]:
        """What a mirror copies: source, target and topic. Raises LabkitError for a mirror that would copy copies."""
        if connector.config["connector.class"] != MIRROR or not connector.topics:
            return set()
        source = connector.topics[0].cluster.describe().cluster_id
        if source == target:
            raise LabkitError(
                f"{connector.name} would copy topics to the Kafka that they are in, under the same names, for ever: "
                "a mirror needs two clusters"
            )
        copies = {(source, target, topic.name) for topic in connector.topics}
        reverse = {(target, source, topic.name) for topic in connector.topics}
        for name, others in self._mirrored.items():
            if name != connector.name and others & reverse:
                raise LabkitError(
                    f"{name} copies topics of {connector.name} the other way, and the two would copy copies for ever: "
                    f"mirror a topic one way only, or stop {name} before"
                )
        return copies

    def _captures_of(self, name: str) -> list[tuple[str | None, ...]]:
        return [one for one in self._captures if one[0] == name]

    def _take_away(self, name: str, until: float) -> None:
        """End a connector. If it is a capture, forget what it has read, and drop its slot, which stays in `_captures`
        until it is dropped."""
        path, captures = f"/connectors/{name}", self._captures_of(name)
        if self._find(path, until) is not None:
            if captures:
                self._insist("PUT", f"{path}/stop", until)
                while self._status_of(name).state != "stopped":
                    self._wait(until, f"connector {name} does not stop")
                self._insist("DELETE", f"{path}/offsets", until)
            self._remove(path, until)
        self._mirrored.pop(name, None)
        self._writers.discard(name)
        self._drop(captures)

    def _drop(self, captures: Iterable[tuple[str | None, ...]]) -> None:
        for one in captures:
            if replication_slots.drop(self._captures[one]):
                del self._captures[one]

    def _remove(self, path: str, until: float) -> None:
        with suppress(_Missing):  # removed by an earlier request, whose answer was lost
            self._insist("DELETE", path, until)
        while self._find(f"{path}/status", until) is not None:
            self._wait(until, f"connector {path.rpartition('/')[2]} does not end")

    def _wait(self, until: float, what: str) -> None:
        """Wait until the next look. Raises Unavailable when the worker has ended, or no time is left."""
        if self._child.poll() is not None:
            raise Unavailable(f"{what}: {self.name} has ended, recover it first")
        if time.monotonic() > until:
            raise Unavailable(f"{what}, and the time is over. The log of {self.name} says:\n{log_tail(self.log)}")
        time.sleep(LOOK)

    def _status_of(self, name: str) -> ConnectorStatus:
        try:
            return _status(name, self._ask("GET", f"/connectors/{name}/status"))
        except (_Missing, Unavailable):
            return ConnectorStatus(name, "starting", "0 of 0")

    def _insist(self, method: str, path: str, until: float, body: object = None) -> Any:
        """Ask again until the worker answers and can do it. Only for requests that may be repeated."""
        while True:
            try:
                return self._ask(method, path, body)
            except Unavailable:
                if time.monotonic() > until or self._child.poll() is not None:
                    raise
            time.sleep(LOOK)

    def _ask(self, method: str, path: str, body: object = None, timeout: float = REQUEST) -> Any:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request(
                method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            fix = "recover it first" if self._child.poll() is not None else "it may be busy: try again"
            raise Unavailable(f"{self.name} does not answer at {self.url} ({type(error).__name__}): {fix}") from error
        finally:
            connection.close()
        if status // 100 == 2:
            return json.loads(text) if text else None
        try:
            said = str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError):
            said = text.decode(errors="replace")
        if status == 404:
            raise _Missing(f"{self.name}: {_one_line(said)}")
        if status in (409, 500, 503, 504):  # the worker joins its group, or assigns its connectors
            raise Unavailable(f"{self.name} cannot do this now: {_one_line(said)}")
        raise LabkitError(f"{self.name} refuses this: {with_fix(_one_line(said))}")


class _Missing(LabkitError):
    """There is no such connector."""


def _check_topics(connector: Connector) -> None:
    """Raises TopicMissing if a topic does not exist: Connect would wait for it without a word."""
    for topic in connector.topics:
        if not topic.cluster.topic_ids([topic.name]):
            raise TopicMissing(
                f"topic {topic.name} does not exist at {topic.cluster.bootstrap}, and connector {connector.name} needs "
                "it: make it before, as lab.topic(…) does"
            )


def _source_of(connector: Connector) -> tuple[str | None, ...]:
    """What a capture reads. A capture with the same name and another source begins anew."""
    settings = ("database.hostname", "database.port", "database.dbname", "table.include.list", "slot.name")
    return connector.name, *map(connector.config.get, settings)


def _status(name: str, found: dict[str, Any]) -> ConnectorStatus:
    tasks = found["tasks"]
    states = [found["connector"]["state"], *(task["state"] for task in tasks)]
    running = sum(task["state"] == "RUNNING" for task in tasks)
    if "FAILED" in states:
        state = "failed"
    elif tasks and set(states) == {"RUNNING"}:
        state = "running"
    else:
        state = states[0].lower() if states[0] in ("PAUSED", "STOPPED") else "starting"
    traces = [one["trace"] for one in (found["connector"], *tasks) if one.get("trace")]
    error = with_fix(_root_of(traces[0])) if traces else ""
    return ConnectorStatus(name, state, f"{running} of {len(tasks)}", error)


def _root_of(trace: str) -> str:
    """The innermost error of a Java stack trace, in one line."""
    lines = trace.splitlines() or [""]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    return _one_line(re.sub(r"^(?:[\w$]+\.)+", "", [lines[0], *causes][-1]))


def _one_line(text: str) -> str:
    text = text.partition("You can also find the above list of errors")[0]  # at a URL that does not help
    return " ".join(text.split())[:300]
