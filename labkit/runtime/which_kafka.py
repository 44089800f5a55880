"""Which Kafka to use: the one that is named, else the compose file's, else the embedded one."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from labkit.closing import Closing
from labkit.kafka.clients import forget
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.runtime.jars import JarsMissing

if TYPE_CHECKING:
    from labkit.runtime.private_broker import BrokerServer, PrivateBroker, PrivateCluster
    from labkit.runtime.shared_broker import Lease

BOOTSTRAP = "KAFKA_BOOTSTRAP_SERVERS"
CLIENT_CONFIG = "KAFKA_CLIENT_CONFIG"
COMPOSE = Cluster("127.0.0.1:29092")
COMPOSE_CLUSTER_ID = (
    "labkit-compose-000000A"  # 16 bytes in base64url, as Kafka wants it; docker-compose.yml has the same
)
PATIENCE = 6.0  # seconds for a cluster that was named, perhaps far away, with TLS and a login


@dataclass(frozen=True)
class Connection(Closing):
    """A cluster that has answered, and its origin. Close the connection to let go of a shared embedded broker."""

    cluster: Cluster
    origin: Literal["external", "compose", "embedded", "private"]
    cluster_id: str
    lease: Lease | None = field(default=None, repr=False)
    """The lease on the embedded broker, by which to pin or stop it; None for other origins."""
    broker: PrivateBroker | None = field(default=None, repr=False)
    """The broker that nobody else uses, if it is the only one; None for other origins."""
    several: PrivateCluster | None = field(default=None, repr=False)
    """The brokers that nobody else uses, if there are several; None for other origins."""

    @property
    def brokers(self) -> tuple[BrokerServer, ...]:
        """The brokers that nobody else uses."""
        if self.several is not None:
            return self.several.brokers
        return () if self.broker is None else (self.broker,)

    def close(self) -> None:
        """Let go. May be called again."""
        if self.brokers:
            forget(self.cluster)
        if self.broker is not None:
            forget(self.broker.proxy.cluster)
        for held in (self.lease, self.broker, self.several):
            if held is not None:
                held.close()

    def deaths(self) -> int:
        """How often a shared embedded broker has died and been started again. Raises LabkitError if nobody knows."""
        return 0 if self.lease is None else self.lease.deaths()


def connect() -> Connection:
    """The first Kafka that answers.

    1. `KAFKA_BOOTSTRAP_SERVERS`, with the client settings in the file `KAFKA_CLIENT_CONFIG`. If it is set, nothing else
       is tried: ClusterUnreachable names the address.
    2. The broker of labkit's docker-compose.yml, known by its cluster id.
    3. The embedded broker, shared with the other processes of this user, and started if need be.

    Raises LabkitError when there is none.
    """
    if found := outside():
        return found
    from labkit.runtime.shared_broker import shared_broker

    try:
        return _embedded(shared_broker())
    except JarsMissing as error:
        raise JarsMissing(
            f"{error}\n"
            "Instead of the embedded broker you can\n"
            "  · start one with Docker: docker compose up -d\n"
            f"  · name one that runs: {BOOTSTRAP}=host:port"
        ) from error


def private(brokers: int = 1) -> Connection:
    """An embedded broker for this process alone, or a cluster of several, whose faults harm nobody else.

    Raises LabkitError when it cannot be started.
    """
    from labkit.runtime.private_broker import PrivateBroker, PrivateCluster

    if brokers > 1:
        several = PrivateCluster(brokers)
        return Connection(several.cluster, "private", several.cluster_id, several=several)
    broker = PrivateBroker()
    return Connection(broker.cluster, "private", broker.cluster_id, broker=broker)


def running() -> Connection | None:
    """What `connect` would return, if it runs already, else None. Starts nothing.

    Raises LabkitError when a cluster is named and does not answer.
    """
    if found := outside():
        return found
    from labkit.runtime.shared_broker import attach

    lease = attach()
    return None if lease is None else _embedded(lease)


def is_named() -> bool:
    """Whether a cluster is named, so that no other is tried."""
    return bool(os.environ.get(BOOTSTRAP) or os.environ.get(CLIENT_CONFIG))


def outside() -> Connection | None:
    """The Kafka that others use too: the one that is named, else the compose file's. Raises LabkitError when the named
    one does not answer."""
    if is_named():
        return _external()
    return Connection(COMPOSE, "compose", COMPOSE_CLUSTER_ID) if composed() else None


def _embedded(lease: Lease) -> Connection:
    return Connection(lease.cluster, "embedded", lease.cluster_id, lease)


def _external() -> Connection:
    file = os.environ.get(CLIENT_CONFIG)
    settings = read_client_config(Path(file).expanduser()) if file else {}
    in_file = settings.pop("bootstrap.servers", "")
    bootstrap = os.environ.get(BOOTSTRAP) or in_file
    if not bootstrap:
        raise LabkitError(f"{CLIENT_CONFIG} is set, but no address is: set {BOOTSTRAP}, or bootstrap.servers in {file}")
    cluster = Cluster(bootstrap, tuple(settings.items()))
    try:
        return Connection(cluster, "external", cluster.describe(PATIENCE).cluster_id)
    except ClusterUnreachable as error:
        source = BOOTSTRAP if os.environ.get(BOOTSTRAP) else CLIENT_CONFIG
        raise ClusterUnreachable(
            f"{source} says that Kafka is at {bootstrap}, but: {error}\n"
            f"Correct it ({CLIENT_CONFIG} is {file or 'not set'}), or unset it to use the embedded broker."
        ) from error


def composed() -> bool:
    """Whether the broker of docker-compose.yml answers."""
    host, port = COMPOSE.bootstrap.split(":")
    try:
        socket.create_connection((host, int(port)), 0.5).close()
        return COMPOSE.describe(2.0).cluster_id == COMPOSE_CLUSTER_ID
    except (OSError, ClusterUnreachable):
        return False


def read_client_config(path: Path) -> dict[str, str]:
    """Client settings from a properties file, for librdkafka: `name=value` lines, comments with `#` or `!`.

    A Java client's `sasl.jaas.config` becomes `sasl.username` and `sasl.password`; serializers, which are Java classes,
    are left out. Raises LabkitError naming file and line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LabkitError(f"{CLIENT_CONFIG} names {path}, which cannot be read: {reason}") from error
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text[0] in "#!":
            continue
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise LabkitError(f"{path}, line {number}: expected name=value, as in security.protocol=SASL_SSL")
        settings[name.strip()] = value.strip()
    jaas = settings.pop("sasl.jaas.config", None)
    if jaas is not None:
        # A quoted value ends at the kind of quote it began with; the other kind, or an escaped quote, may be in it.
        quoted = re.findall(r"""\b(username|password)\s*=\s*(["'])((?:\\.|(?!\2).)*)\2""", jaas)
        login = {name: re.sub(r"\\(.)", r"\1", value) for name, _, value in quoted}
        if len(login) != 2:
            raise LabkitError(f"{path}: sasl.jaas.config has no login: set sasl.username and sasl.password instead")
        settings = {"sasl.username": login["username"], "sasl.password": login["password"]} | settings
    return {name: value for name, value in settings.items() if not name.endswith(("serializer", "deserializer"))}
