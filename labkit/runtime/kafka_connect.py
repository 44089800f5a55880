"""Kafka Connect: a worker of one owner, which runs connectors. They are put there, and looked at, by REST."""

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
from labkit.runtime import slots
from labkit.runtime.broker import HOST, LOGGING, free_ports, log_tail, wait_until_ready
from labkit.runtime.child import Child
from labkit.runtime.connectors import MIRROR, POSTGRES, Connector, with_fix
from labkit.runtime.jars import connect_jars
from labkit.runtime.java import find_java
from labkit.runtime.server import Server

MAIN = "org.apache.kafka.connect.cli.ConnectDistributed"
ANSWER = 240.0  # seconds for a start on a busy machine
REQUEST = 10.0  # seconds for one answer
LOOK = 0.05  # seconds between two looks: nothing tells when a connector has changed its state
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
    """How a connector stands: running, failed (its `error` says why), starting, paused or stopped."""

    name: str
    state: str
    tasks: str
    """How many of them run: "1 of 1"."""
    error: str = ""
    """What it failed with last, in one line, with the fix where that is known."""


class KafkaConnect(Server):
    """One distributed worker (some 170 MB), alone in its group, with Debezium and MirrorMaker. It listens on
    127.0.0.1 only.

    `prefix` begins the names of its group and its three topics. Connectors and what they have read are in those topics:
    a worker that is started again goes on with them.
    """

    name, kind = "Kafka Connect", "labkit-connect"
    needs = 250

    def __init__(self, cluster: Cluster, prefix: str) -> None:
        if cluster.security:
            raise LabkitError(
                f"Kafka Connect runs here only on a Kafka without a login, and {cluster.bootstrap} wants one: use the "
                "embedded one"
            )
        self.cluster, self.prefix = cluster, prefix
        self._cluster_id = cluster.describe().cluster_id
        self._java, self._jars = find_java(), connect_jars()
        self._captures: dict[tuple[str | None, ...], Connector] = {}  # all whose slot may be there, by `_source_of`
        self._mirrored: dict[str, set[tuple[str, str, str]]] = {}  # source, target and topic, by the connector's name
        self._writers: set[str] = set()  # connectors that write to the worker's own Kafka
        super().__init__()

    @property
    def url(self) -> str:
        """Where its REST interface is."""
        return f"http://{HOST}:{self.port}"

    @property
    def memory(self) -> int:
        """Bytes of memory that it holds; 0 while it is down."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def start(self, connector: Connector, timeout: float = 60.0) -> None:
        """Have it run this connector, in the place of another one of its name. Returns once it and its task run.

        Raises LabkitError when it fails, with its own error and, where that is known, the fix; when what it is to read
        or write is not there; Unavailable when it does not run within `timeout` seconds.
        """
        until = time.monotonic() + timeout
        if connector.config["connector.class"] == POSTGRES:
            slots.check(connector)
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
        """Take a connector away. What it has read stays known, and one of its name goes on there; but not of a capture,
        as its slot in PostgreSQL goes with it: the next one reads all rows anew."""
        until = time.monotonic() + timeout
        if not self._captures_of(name) and self._find(f"/connectors/{name}", until) is None:
            raise LabkitError(f"{self.name} has no connector {name!r}: `status()` says which it has")
        self._take_away(name, until)
        if left := self._captures_of(name):
            fixes = "; ".join(slots.how_to_drop(self._captures[one]) for one in left)
            raise LabkitError(
                f"connector {name} is stopped, but its slot cannot be dropped now, and PostgreSQL keeps its log for "
                f"it: stop it once more when PostgreSQL is up, or {fixes}"
            )

    def status(self, timeout: float = REQUEST) -> list[ConnectorStatus]:
        """All its connectors, by name. Raises Unavailable while it does not answer."""
        told = self._ask("GET", "/connectors?expand=status", timeout=timeout)
        return [_status(name, told[name]["status"]) for name in sorted(told)]

    def close(self) -> None:
        """End it and remove its files; also the slots that its captures have in PostgreSQL. May be called again: what
        could not be dropped is tried once more."""
        super().close()
        self._drop(list(self._captures))

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700)
        (self.port,) = free_ports(1)
        settings = SETTINGS.format(bootstrap=self.cluster.bootstrap, prefix=self.prefix, host=HOST, port=self.port)
        (self.folder / "worker.properties").write_text(settings)
        (self.folder / "log4j2.properties").write_text(LOGGING)

    def _launch(self) -> Child:
        self.cluster.describe()  # or it would wait a minute for a Kafka that is away
        # A worker that starts reads its topics to their ends, and waits there for what a killed one has left open.
        group = f"{self.prefix}connect"
        end_transactions(self.cluster, [f"connect-cluster-{group}", *(f"{group}-{name}-0" for name in self._writers)])
        command = self._java.command([*JVM, *self._java.silence], self._jars, MAIN, "worker.properties")
        return Child(command, cwd=self.folder, output=self.log)

    def _wait_until_ready(self, child: Child) -> None:
        wait_until_ready(self.name, self.log, self._answers, lambda: child.poll() is None, ANSWER)

    def _answers(self) -> bool:
        try:
            self._ask("GET", "/health")
            # Whoever took the port before our worker did may be one too.
            return bool(self._ask("GET", "/")["kafka_cluster_id"] == self._cluster_id)
        except (LabkitError, ValueError, KeyError, TypeError):  # or anything that speaks HTTP
            return False

    def _find(self, path: str, until: float) -> dict[str, Any] | None:
        """What is known of a connector; None if there is none."""
        try:
            return dict(self._insist("GET", path, until))
        except _Missing:
            return None

    def _check_home(self, connector: Connector) -> None:
        """Raises LabkitError for a capture into another Kafka than the worker's: it is not known to work."""
        for topic in connector.topics:
            if topic.cluster != self.cluster and topic.cluster.describe().cluster_id != self._cluster_id:
                raise LabkitError(
                    f"{connector.name} would write to Kafka at {topic.cluster.bootstrap}, and a capture writes to its "
                    f"worker's Kafka, {self.cluster.bootstrap}: capture into a topic there, and mirror that"
                )

    def _target_of(self, connector: Connector) -> str:
        """The id of the cluster that it writes to."""
        to = connector.config.get("producer.override.bootstrap.servers", self.cluster.bootstrap)
        return self._cluster_id if to == self.cluster.bootstrap else Cluster(to).describe().cluster_id

    def _copies_of(self, connector: Connector, target: str) -> set[tuple[str, str, str]]:
        """What a mirror copies: source, target and topic. Raises LabkitError for one that would copy copies."""
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
        """End a connector; of a capture also what it has read, and its slot, which stays in `_captures` until it is
        gone."""
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
            if slots.drop(self._captures[one]):
                del self._captures[one]

    def _remove(self, path: str, until: float) -> None:
        with suppress(_Missing):  # gone by a request whose answer did not come
            self._insist("DELETE", path, until)
        while self._find(f"{path}/status", until) is not None:
            self._wait(until, f"connector {path.rpartition('/')[2]} does not end")

    def _wait(self, until: float, what: str) -> None:
        """Between two looks. Raises Unavailable when the worker has ended, or there is no time left."""
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
        """Ask until the worker can, and answers: what it is asked may be asked again."""
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
        if status in (409, 500, 503, 504):  # it is joining its group, or gets its connectors assigned
            raise Unavailable(f"{self.name} cannot do it now: {_one_line(said)}")
        raise LabkitError(f"{self.name} refuses this: {with_fix(_one_line(said))}")


class _Missing(LabkitError):
    """There is no such connector."""


def _check_topics(connector: Connector) -> None:
    """Raises TopicMissing: Connect would wait without a word."""
    for topic in connector.topics:
        if not topic.cluster.topic_ids([topic.name]):
            raise TopicMissing(
                f"topic {topic.name} does not exist at {topic.cluster.bootstrap}: make it before connector "
                f"{connector.name} needs it, as lab.topic(…) does"
            )


def _source_of(connector: Connector) -> tuple[str | None, ...]:
    """What a capture reads: of its name, another source is begun anew."""
    settings = ("database.hostname", "database.port", "database.dbname", "table.include.list", "slot.name")
    return connector.name, *map(connector.config.get, settings)


def _status(name: str, told: dict[str, Any]) -> ConnectorStatus:
    tasks = told["tasks"]
    states = [told["connector"]["state"], *(task["state"] for task in tasks)]
    running = sum(task["state"] == "RUNNING" for task in tasks)
    if "FAILED" in states:
        state = "failed"
    elif tasks and set(states) == {"RUNNING"}:
        state = "running"
    else:
        state = states[0].lower() if states[0] in ("PAUSED", "STOPPED") else "starting"
    traces = [one["trace"] for one in (told["connector"], *tasks) if one.get("trace")]
    error = with_fix(_root_of(traces[0])) if traces else ""
    return ConnectorStatus(name, state, f"{running} of {len(tasks)}", error)


def _root_of(trace: str) -> str:
    """What a stack trace of Java's begins with: the innermost error, in one line."""
    lines = trace.splitlines() or [""]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    return _one_line(re.sub(r"^(?:[\w$]+\.)+", "", [lines[0], *causes][-1]))


def _one_line(text: str, most: int = 300) -> str:
    text = text.partition("You can also find the above list of errors")[0]  # at a URL that does not help
    return " ".join(text.split())[:most]
