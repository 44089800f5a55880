"""How one broker is made: its folder, its settings, the command that runs it, and when it is ready.

`shared` and `private` decide who owns the process, and how long it lives.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import random
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.runtime.child import Child
from labkit.runtime.home import CACHE, cache_dir, locked
from labkit.runtime.jars import KAFKA, jar_files
from labkit.runtime.java import Java, find_java

HOST = "127.0.0.1"
# Below the ports that systems hand out by themselves. So no client's own port can be the one that a broker wants back
# after a restart, and a client that tries to reach a dead broker cannot end up connected to itself.
PORTS = range(20_000, 29_000)
TRIES = 5  # to start on ports that nobody else takes first
NODE = 1
DAY = 86_400.0
START_SECONDS = 120.0  # on a slow machine without the AOT cache, or a busy one after kill -9; 0.6 s is usual

PROPERTIES = f"""\
process.roles=broker,controller
node.id={NODE}
controller.quorum.voters={NODE}@{HOST}:{{controller_port}}
listeners=PLAINTEXT://{HOST}:{{port}},CONTROLLER://{HOST}:{{controller_port}}
advertised.listeners=PLAINTEXT://{HOST}:{{port}}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
# Relative, as are all paths of a broker: Java reads this file as Latin-1 with escapes, Kafka splits values at commas.
log.dirs=data
auto.create.topics.enable=false
num.partitions=4
# One node: one replica of everything.
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
# A transaction is aborted soon after its timeout; by default up to 10 s later.
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
# The first member of a group does not wait for others.
group.initial.rebalance.delay.ms=0
# The default of 128 MB is zeroed at every start.
log.cleaner.dedupe.buffer.size=16777216
# The cleaner looks often for topics to compact; by default every 15 s.
log.cleaner.backoff.ms=250
# After kill -9 the broker is let back in when its predecessor's session is over: 4.4 s after its start, 12 s with the
# default session of 9 s. A session must not be much shorter. When the machine halts for longer, the broker is fenced
# and all partitions change leaders; on a busy machine that work makes the broker late again.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
"""

# The controller alone, on the data of a killed broker, which it misses after half a second.
CONTROLLER = f"""\
process.roles=controller
node.id={NODE}
controller.quorum.voters={NODE}@{HOST}:{{controller_port}}
listeners=CONTROLLER://{HOST}:{{controller_port}}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT
log.dirs=../data
broker.session.timeout.ms=500
broker.heartbeat.interval.ms=250
"""
# What a controller logs: that it is in charge, and for each broker whether it is fenced.
ACTIVE, FENCED, UNFENCED = "Becoming the active controller", ("fenced=true", "fenced=1"), ("fenced=false", "fenced=-1")

LOGGING = """\
status=error
appender.c.type=Console
appender.c.name=c
appender.c.layout.type=PatternLayout
appender.c.layout.pattern=%d{yyyy-MM-dd HH:mm:ss.SSS} %p %c{1} %m%n
rootLogger.level=WARN
rootLogger.appenderRef.c.ref=c
"""


LOGGING_FENCED = """\
logger.f.name=org.apache.kafka.controller
logger.f.level=INFO
"""


class PortTaken(LabkitError):
    """Another process took the port between its choice and the start of the broker."""


class NoAotCache(LabkitError):
    """Java recorded a broker and wrote no cache. The next time it would not either."""


@dataclass(frozen=True)
class Kafka:
    """Kafka on this machine, prepared: the Java, the checked jars, the formatted template and the AOT cache if any."""

    java: Java
    jars: tuple[Path, ...]
    home: Path

    @property
    def template(self) -> Path:
        """A formatted data folder, without the ids that tell one cluster from another."""
        return self.home / f"template-{KAFKA}"

    @cached_property
    def flags(self) -> list[str]:
        """The flags of every JVM: a fast start and little memory rather than throughput, and no warnings."""
        return [
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-Xmx512m",
            "-Xms256m",  # with room for young objects, so that a start needs no collection
            "-Xmn160m",
            *self.java.silence,
        ]

    @cached_property
    def aot_cache(self) -> Path:
        """The path of the AOT cache for exactly this Java, these flags and these jars, made or not."""
        outside = [os.environ.get(name, "") for name in ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")]
        jars = [f"{jar} {jar.stat().st_size} {jar.stat().st_mtime_ns}" for jar in self.jars]
        system = os.uname()
        facts = [self.java.identity, system.sysname, system.machine, *self.flags, *outside, *jars]
        return self.home / f"{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:24]}.aot"

    @property
    def aot_failed(self) -> Path:
        """The file that says why Java made no AOT cache, if it made none."""
        return self.aot_cache.with_suffix(".failed")

    def lacks_aot_cache(self) -> bool:
        """Whether to make an AOT cache: Java can, there is none, and the last attempt did not fail within a day."""
        if self.java.version < 25 or self.aot_cache.exists():
            return False
        try:
            return time.time() - self.aot_failed.stat().st_mtime > DAY
        except OSError:
            return True

    def command(self, folder: Path, extra: list[str] | None = None) -> list[str]:
        """The command of the broker in `folder`, to be run in that folder. `extra` are JVM flags in the place of those
        for the AOT cache."""
        if extra is None:
            extra = [f"-XX:AOTCache={self.aot_cache}"] if self.aot_cache.exists() else []
        return self._java([*extra, "-XX:ErrorFile=hs_err.log", mark_of(folder)], "kafka.Kafka")

    def format_template(self) -> None:
        """Format the template with Kafka's own tool, once for each version of Kafka."""
        with tempfile.TemporaryDirectory(prefix="making-", dir=self.home) as made:
            folder, log = Path(made), Path(made) / "log"
            (folder / "server.properties").write_text(PROPERTIES.format(port=9092, controller_port=9093))
            (folder / "log4j2.properties").write_text(LOGGING)
            command = self._java([], "kafka.tools.StorageTool", "format", "-t", new_uuid(), "-c")
            with Child(command, cwd=folder, output=log) as tool:
                code = tool.wait(START_SECONDS)
            if code:
                raise LabkitError(f"Kafka could not format a data folder:\n{log_tail(log)}")
            (folder / "data" / "meta.properties").unlink()
            os.rename(folder / "data", self.template)

    def build_aot_cache(self) -> None:
        """Run a broker that records which classes it uses, do a little work with it, and let Java write the cache.

        Raises NoAotCache when Java writes none.
        """
        with tempfile.TemporaryDirectory(prefix="making-", dir=self.home) as made:
            folder, cache = Path(made) / "broker", Path(made) / "cache.aot"
            broker = Broker.create(folder, self)
            command = self.command(folder, [f"-XX:AOTCacheOutput={cache}"])
            with Child(command, cwd=folder, output=broker.log) as training:
                broker.wait_until_ready(lambda: training.poll() is None)
                _exercise(broker.cluster)
                training.terminate()
                training.wait(START_SECONDS)
            if not cache.exists():
                raise NoAotCache(f"Java made no AOT cache:\n{log_tail(broker.log)}")
            os.rename(cache, self.aot_cache)

    def _java(self, extra: list[str], main: str, *arguments: str) -> list[str]:
        return self.java.command([*self.flags, *extra], self.jars, main, *arguments, "server.properties")


def prepare() -> Kafka:
    """Prepare all that a broker needs on this machine: 50 ms, but 20 s the first time, with a line that says so.

    Raises LabkitError when there is no suitable Java, or the jars can be neither found nor fetched.
    """
    home = cache_dir() / "kafka"
    if ":" in str(home):
        raise LabkitError(
            f"Java cannot use labkit's folder {cache_dir()}, as a ':' ends a path. Set {CACHE} to a folder without one."
        )
    home.mkdir(exist_ok=True)
    kafka = Kafka(find_java(), tuple(jar_files()), home)
    if kafka.template.exists() and not kafka.lacks_aot_cache():
        return kafka
    from rich.console import Console

    console = Console()
    with (
        locked(home / "lock"),
        console.status(f"Preparing Apache Kafka {KAFKA} on Java {kafka.java.version} (once)"),
    ):
        for unfinished in home.glob("making-*/"):  # left by a killed process
            shutil.rmtree(unfinished, ignore_errors=True)
        if not kafka.template.exists():
            kafka.format_template()
        if kafka.lacks_aot_cache():
            try:
                kafka.build_aot_cache()
            except NoAotCache as error:
                kafka.aot_failed.write_text(str(error))  # trying each time would cost more than it saves
            except Exception as error:  # whatever it was: the broker starts without the cache, too, in 2 s
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                console.print(
                    f"The AOT cache could not be made now; the next start tries again. {reason}", markup=False
                )
            for old in sorted(home.glob("*.aot"), key=lambda path: path.stat().st_mtime)[:-12]:
                old.unlink()  # 65 MB each, for Javas that may be gone
    return kafka


@dataclass(frozen=True)
class Broker:
    """One broker's folder (settings, data, log) and where it answers."""

    folder: Path
    cluster_id: str
    port: int
    controller_port: int
    extra: str = ""
    """More lines of settings; the last line of a name wins."""
    node: int = NODE

    @property
    def cluster(self) -> Cluster:
        return Cluster(f"{HOST}:{self.port}")

    @property
    def log(self) -> Path:
        return self.folder / "broker.log"

    @classmethod
    def create(
        cls,
        folder: Path,
        kafka: Kafka,
        ports: tuple[int, ...] | None = None,
        extra: str = "",
        cluster_id: str = "",
        node: int = NODE,
    ) -> Broker:
        """Make `folder` with the settings and the empty, formatted data of a new cluster, or of one of its brokers."""
        port, controller_port = ports or free_ports()
        broker = cls(folder, cluster_id or new_uuid(), port, controller_port, extra, node)
        folder.mkdir(mode=0o700)
        shutil.copytree(kafka.template, folder / "data")
        meta = f"version=1\ncluster.id={broker.cluster_id}\nnode.id={node}\ndirectory.id={new_uuid()}\n"
        (folder / "data" / "meta.properties").write_text(meta)
        (folder / "log4j2.properties").write_text(LOGGING)
        broker.write_settings()
        return broker

    def write_settings(self) -> None:
        text = PROPERTIES.format(port=self.port, controller_port=self.controller_port)
        (self.folder / "server.properties").write_text(text + self.extra)

    @property
    def was_killed(self) -> bool:
        """Whether the broker ran, and did not end in good order."""
        return self.log.exists() and not (self.folder / "data" / ".kafka_cleanshutdown").exists()

    def fence(self, kafka: Kafka) -> None:
        """Let the controller miss a killed broker, before the broker starts again: 2 s. Raises LabkitError.

        Kafka loads transactions as soon as it starts, while it still believes in the leaders of before. Soon it misses
        these leaders. Then Kafka 4.3 takes the partitions of a transaction that was being committed for deleted ones,
        and notes the commit as complete, though no partition has the marker: readers of committed records wait there
        for ever. If there are no leaders to begin with, Kafka loads transactions once there are leaders again.
        """
        folder = self.folder / "fencing"
        folder.mkdir(exist_ok=True)
        (folder / "server.properties").write_text(CONTROLLER.format(controller_port=self.controller_port))
        (folder / "log4j2.properties").write_text(LOGGING + LOGGING_FENCED)
        log = folder / "controller.log"
        log.write_text("")
        deadline = time.monotonic() + START_SECONDS
        with Child(kafka.command(folder), cwd=folder, output=log) as controller:
            while not _is_fenced(log.read_text(errors="replace")):
                if controller.poll() is not None or time.monotonic() > deadline:
                    raise LabkitError(f"Kafka's controller did not start after a kill. Its log says:\n{log_tail(log)}")
                time.sleep(0.01)  # there is no event for what another process writes
            controller.terminate()
            controller.wait(START_SECONDS)

    def wait_until_ready(self, lives: Callable[[], bool]) -> None:
        """Wait until the broker answers, and is in its cluster. `lives` tells whether its process still runs.

        Raises as `wait_until_ready` does.
        """
        name = f"the embedded Kafka broker at {self.cluster.bootstrap}"
        wait_until_ready(name, self.log, self.answers, lives, START_SECONDS)

    def answers(self) -> bool:
        """Whether the broker answers now, and is in its cluster."""
        try:
            socket.create_connection((HOST, self.port), 1).close()
            found = self.cluster.describe(2)
        except (OSError, ClusterUnreachable):
            return False
        # Whoever took the port before our broker did may be a Kafka too.
        return self.node in found.brokers and found.cluster_id == self.cluster_id


def _is_fenced(log: str) -> bool:
    """Whether a controller that logs this is in charge, and believes in no broker: it has missed the broker, or never
    let it in."""
    return ACTIVE in log and max(map(log.rfind, FENCED)) >= max(map(log.rfind, UNFENCED))


def mark_of(folder: Path) -> str:
    """The argument by which one finds the process of the broker in `folder`."""
    return f"-Dlabkit.folder={folder}"


def free_ports(count: int = 2) -> tuple[int, ...]:
    """So many ports that nobody has now. Somebody may take one before a broker binds it: see PortTaken."""
    candidates = iter(random.sample(PORTS, len(PORTS)))
    found = tuple(itertools.islice(filter(is_free, candidates), count))
    if len(found) == count:
        return found
    raise LabkitError(f"no free port between {PORTS.start} and {PORTS.stop} on {HOST}")


def held_port() -> socket.socket:
    """A socket that holds a free port: see `take_port`."""
    while True:
        with suppress(PortTaken):  # meanwhile, or by connections that were closed a moment ago
            return take_port(free_ports()[0])


def take_port(port: int) -> socket.socket:
    """A socket that is bound to this port and never listens: others may listen there if they share the port
    (SO_REUSEPORT), and nobody else gets it. Raises PortTaken."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        held.bind((HOST, port))
    except OSError as error:
        held.close()
        raise PortTaken(f"somebody else took port {port} first") from error
    return held


def is_free(port: int) -> bool:
    """Whether nobody has this port on the loopback interface right now."""
    with socket.socket() as probe:
        # As Java does it: connections that were closed a moment ago do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def new_uuid() -> str:
    """A random id as Kafka writes it: 22 characters of URL-safe base64. A leading dash would look like an option."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text


def log_tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, or a note that there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 100_000))
            return b"\n".join(file.read().splitlines()[-lines:]).decode(errors="replace")
    except OSError:
        return f"(no log at {path})"


def wait_until_ready(
    name: str, log: Path, answers: Callable[[], bool], lives: Callable[[], bool], seconds: float
) -> None:
    """Wait until a new server answers. `lives` tells whether its process still runs.

    Raises LabkitError, with the last lines of the log, when the server has ended, or does not answer within `seconds`;
    PortTaken when it has ended because somebody took its port.
    """
    until = time.monotonic() + seconds
    while not answers():
        if not lives():
            kind = PortTaken if "Address already in use" in log_tail(log, 400) else LabkitError
            raise kind(f"{name} ended at once. Its log says:\n{log_tail(log)}")
        if time.monotonic() > until:
            raise LabkitError(f"{name} did not answer within {seconds:g} s. Its log says:\n{log_tail(log)}")
        time.sleep(0.01)  # there is no event for a port that another process opens


def _exercise(cluster: Cluster) -> None:
    """Do what labs do most, so that its classes get into the AOT cache: a topic, records, a group, its offsets."""
    from labkit.kafka.consumer import Consumer
    from labkit.kafka.topics import Topic

    topic = Topic(cluster, "training", 4, dict)
    topic.create()
    for number in range(1000):
        topic.send({"number": number}, key=str(number % 10))
    topic.flush()
    stop, left = threading.Event(), iter(range(999))

    def handle(_record: object) -> None:
        if next(left, None) is None:
            stop.set()

    bound = threading.Timer(10, stop.set)
    bound.start()
    Consumer(topic, handle, group="training").run(stop)
    bound.cancel()
    cluster.delete_groups(["training"])
    cluster.delete_topics([topic.name])
