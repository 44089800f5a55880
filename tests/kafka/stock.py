"""A broker as somebody else has set it up: Kafka 4.3.1 or 3.9.1, on the settings that it is handed out with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import wait_until

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import ClusterUnreachable
from labkit.runtime.broker import HOST, LOGGING, free_ports, log_tail, new_uuid
from labkit.runtime.child import Child
from labkit.runtime.home import cache_dir
from labkit.runtime.jars import KAFKA, jar_files, read_list
from labkit.runtime.java import find_java

OLD = "3.9.1"  # its list is made as the others are: what its POM needs at run time, and what it logs with
START = 120.0

# What `config/kraft/server.properties` of both says for one node, all but the addresses.
STOCK = """\
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
"""
ADDRESSES = f"""\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{HOST}:{{controller}}
listeners=PLAINTEXT://{HOST}:{{port}},CONTROLLER://{HOST}:{{controller}}
advertised.listeners=PLAINTEXT://{HOST}:{{port}}
controller.listener.names=CONTROLLER
log.dirs=data
"""


@contextmanager
def stock_broker(folder: Path, version: str, settings: str = STOCK) -> Iterator[Cluster]:
    """Start it in `folder`; it ends with the context. Without `settings` it has Kafka's defaults, meant for three."""
    folder.mkdir()
    port, controller = free_ports()
    (folder / "server.properties").write_text(ADDRESSES.format(port=port, controller=controller) + settings)
    (folder / "log4j2.properties").write_text(LOGGING)
    jars, java, log = _jars(version), find_java(), folder / "broker.log"
    flags = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx512m", *java.silence]
    formatting = java.command(flags, jars, "kafka.tools.StorageTool", "format", "-t", new_uuid(), "-c")
    with Child([*formatting, "server.properties"], cwd=folder, output=log) as tool:
        assert tool.wait(START) == 0, log_tail(log)
    cluster = Cluster(f"{HOST}:{port}")
    command = java.command(flags, jars, "kafka.Kafka", "server.properties")
    with Child(command, cwd=folder, output=log) as child:
        wait_until(lambda: child.poll() is not None or _answers(cluster), START, "the broker")
        assert child.poll() is None, log_tail(log)
        yield cluster


def _jars(version: str) -> list[Path]:
    if version == KAFKA:
        return jar_files()
    return jar_files(
        cache_dir() / "jars" / f"kafka-{version}", read_list(Path(__file__).with_name(f"kafka-{version}.jars"))
    )


def _answers(cluster: Cluster) -> bool:
    try:
        return bool(cluster.describe(2).brokers)
    except ClusterUnreachable:
        return False
