"""Connectors for Kafka Connect, as data: a PostgreSQL table that becomes a topic, and topics copied to another cluster.

Both write exactly once: the position up to which a connector has read goes into one transaction with its records.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic

POSTGRES = "io.debezium.connector.postgresql.PostgresConnector"
MIRROR = "org.apache.kafka.connect.mirror.MirrorSourceConnector"
BYTES = "org.apache.kafka.connect.converters.ByteArrayConverter"
LONGEST_SLOT = 63  # characters that PostgreSQL keeps of a name
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

BACK = "200"  # ms at most between two attempts to reach a Kafka that was away

_EXACTLY_ONCE = {
    "tasks.max": "1",
    "exactly.once.support": "required",
    "producer.override.linger.ms": "0",
    # While Kafka is away a transaction waits for it: if Kafka aborts the transaction, the task ends for good. A worker
    # ends at once what a killed one before it has left open.
    "producer.override.transaction.timeout.ms": "600000",
    "producer.override.reconnect.backoff.max.ms": BACK,
}


@dataclass(frozen=True)
class Connector:
    """A name, and the settings that Kafka Connect takes by REST."""

    name: str
    config: Mapping[str, str] = field(repr=False)  # may hold a password
    topics: tuple[Topic[Any], ...] = ()
    """The topics that must exist before it starts."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise LabkitError(
                f"{self.name!r} cannot be a connector's name: use lower-case letters, digits and '-', as name=…"
            )


def capture(dsn: str, table: str, topic: Topic[Any], key: str = "id", name: str = "") -> Connector:
    """Change data capture by Debezium: sends the rows of a PostgreSQL table, then each change of them, to `topic`.

    The key of a record is the text of the column `key`, the table's primary key. The value is Debezium's event: `op`
    (r: a row that was there, c: created, u: updated, d: deleted), `before` and `after` by column, `source`. A deletion
    is followed by a tombstone.

    Raises LabkitError for names that make no sense. The table is looked at when the connector is started.
    """
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    schema, _, short = table.rpartition(".")
    for what in (schema or "public", short, key):
        if not COLUMN.fullmatch(what):
            raise LabkitError(f"{what!r} cannot be captured: use names of letters, digits and '_', the schema in front")
    try:
        given = conninfo_to_dict(dsn)
    except ProgrammingError as error:
        raise LabkitError(f"the dsn is no connection string: {error}") from error
    slot = slot_name(topic.name)
    login = {name: str(given[part]) for name, part in _LOGIN.items() if given.get(part)}
    own = {
        "connector.class": POSTGRES,
        "database.port": "5432",
        **login,
        "plugin.name": "pgoutput",
        "slot.name": slot,
        "publication.name": slot,
        "publication.autocreate.mode": "filtered",
        "publish.via.partition.root": "true",  # else changes of a partitioned table have the names of its partitions
        "table.include.list": rf"{schema or 'public'}\.{short}",
        "snapshot.mode": "initial",
        "tombstones.on.delete": "true",
        "decimal.handling.mode": "string",  # else they are bytes in base64
        "poll.interval.ms": "5",
        # Try often: after a fault the slot is soon free, and PostgreSQL soon back.
        "slot.max.retries": "60",
        "slot.retry.delay.ms": "500",
        "retriable.restart.connector.wait.ms": "500",
        "topic.prefix": slot,
        "transforms": "key,route",
        "transforms.key.type": "org.apache.kafka.connect.transforms.ExtractField$Key",
        "transforms.key.field": key,
        "transforms.route.type": "org.apache.kafka.connect.transforms.RegexRouter",
        "transforms.route.regex": ".*",
        "transforms.route.replacement": topic.name,
        "key.converter": "org.apache.kafka.connect.storage.StringConverter",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter.schemas.enable": "false",
    }
    return Connector(name or f"capture-{topic.short}", {**_EXACTLY_ONCE, **own}, (topic,))


_LOGIN = {
    "database.hostname": "host",
    "database.port": "port",
    "database.user": "user",
    "database.password": "password",
    "database.dbname": "dbname",
    "database.sslmode": "sslmode",
}


def dsn_of(connector: Connector) -> str:
    """The connection string of the PostgreSQL that a connector captures."""
    from psycopg.conninfo import make_conninfo

    return make_conninfo("", **{part: connector.config.get(name) for name, part in _LOGIN.items()})


def slot_name(topic: str) -> str:
    """The name of slot and publication for a topic; for a lab's topic made of learner, run and topic."""
    parts = topic.split(".")
    if len(parts) == 5:
        del parts[2]  # the notebook: there is no room for it
    name = re.sub(r"[^a-z0-9_]", "_", "_".join(parts).lower())
    return name if len(name) <= LONGEST_SLOT else f"{name[:54]}_{zlib.crc32(name.encode()):08x}"


def mirror(topics: Sequence[Topic[Any]], to: Cluster, name: str = "") -> Connector:
    """MirrorMaker 2: copies these topics, as they grow, to the cluster `to`, under the same names.

    It makes the topics that are missing there, with as many partitions. Raises LabkitError when the topics are not all
    of one cluster, or are of `to`.
    """
    if isinstance(topics, Topic):
        raise LabkitError(f"a mirror copies a list of topics: mirror([{topics.short}], to=…)")
    clusters = {topic.cluster for topic in topics}
    if len(clusters) != 1 or clusters == {to}:
        raise LabkitError("a mirror copies topics of one cluster to another one: give it topics of the cluster to read")
    source = topics[0].cluster
    if source.security or to.security:
        raise LabkitError("a mirror runs here only between clusters without a login")
    own = {
        "connector.class": MIRROR,
        # MirrorMaker stores its position under this alias, so each cluster needs its own.
        "source.cluster.alias": re.sub("[^A-Za-z0-9]+", "-", source.bootstrap),
        "target.cluster.alias": re.sub("[^A-Za-z0-9]+", "-", to.bootstrap),
        "source.cluster.bootstrap.servers": source.bootstrap,
        "target.cluster.bootstrap.servers": to.bootstrap,
        # Records and positions both go to the target, even if the worker's own Kafka is another one.
        **{f"{client}.override.bootstrap.servers": to.bootstrap for client in ("producer", "consumer", "admin")},
        "topics": ",".join(re.escape(topic.name) for topic in topics),
        "replication.policy.class": "org.apache.kafka.connect.mirror.IdentityReplicationPolicy",
        "replication.factor": "-1",
        "sync.topic.acls.enabled": "false",
        "sync.topic.configs.enabled": "false",
        "emit.offset-syncs.enabled": "false",
        "refresh.topics.interval.seconds": "2",
        "offset.lag.max": "0",
        # A request takes all that waits. Else only a few large records cross a link in each round trip.
        "producer.override.batch.size": "1000000",
        "source.consumer.isolation.level": "read_committed",
        "source.consumer.fetch.max.wait.ms": "10",
        "consumer.poll.timeout.ms": "10",
        **{
            f"{client}.reconnect.backoff.max.ms": BACK for client in ("source.consumer", "source.admin", "target.admin")
        },
        **dict.fromkeys(("key.converter", "value.converter", "header.converter"), BYTES),
    }
    return Connector(name or f"mirror-{topics[0].short}", {**_EXACTLY_ONCE, **own}, tuple(topics))


_FIXES = {  # by words of the error
    "password authentication failed|no password|role .* does not exist": "correct user and password in the dsn",
    "(publication|slot) .* does not exist": "stop the connector and start it again: it reads all rows anew",
    "[Uu]nknown field": "name the column of the primary key: capture(…, key=…)",
    "UnknownTopicOrPartition|not present in metadata": "make the topic first: lab.topic(…)",
    "[Cc]onnection (to .* )?refused|terminating connection": "recover PostgreSQL, and start the connector again",
}


def with_fix(error: str) -> str:
    """A connector's error, with the fix where it is known."""
    return next((f"{error}: {fix}" for words, fix in _FIXES.items() if re.search(words, error)), error)
