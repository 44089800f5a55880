"""Kafka Streams in a pod: counts commands by key and notifies of complete ones, to compare with labkit's own pattern.

A pod runs a JVM inside its Python process (JPype). So the process must not fork after that, must close the streams
before it ends, and keeps SIGTERM to itself (`-Xrs`). Every step of a record is Java, put together from method handles:
a Python function called for each record would cost more than the counting.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import psutil

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Measured, Report, Step
from labkit.kafka.errors import LabkitError, error_text
from labkit.kafka.producer import POD
from labkit.kafka.topics import Topic
from labkit.runtime.jars import streams_jars
from labkit.runtime.java import find_java

SESSION = 6.0  # seconds, as labkit's consumers have
TRANSACTION = 5.0  # seconds for which the transaction of a killed pod holds its partitions up, without a successor
PATIENCE = 2.0  # seconds for one answer of the webhook: less than a transaction may last
CLOSING = 5.0  # seconds to finish and leave the group; then the process ends all the same
LOOK = 0.2  # seconds between two looks at the state
JVM = ("-Xrs", "-XX:+UseSerialGC", "-Xmx512m", "-Dlog4j2.level=FATAL", "--enable-native-access=ALL-UNNAMED")
QUICK = ("-XX:TieredStopAtLevel=1",)  # a fast start rather than throughput, as the broker of a lab has
STORE = "counts"


@dataclass(frozen=True)
class StreamsCounter:
    """Counts the records of `commands` by key, exactly once (`exactly_once_v2`), into the compacted topic `output`.

    A key has its total behind its last dash: `YYY-6`. When the count reaches the total, the same record goes to
    `notices`, and to `webhook` by a POST (at least once: the key is its `Idempotency-Key`). A key without a total is
    only counted. A record without a key or a value is passed over, as Kafka Streams does it. Plain data until it runs.
    """

    commands: Topic[Any]
    output: Topic[Any]
    notices: Topic[Any] | None = None
    webhook: str | None = None
    """The URL of an HTTP service that takes notices. As long as it does not answer with 2xx, the pod ends and is
    started again."""
    group: str = ""
    """The `application.id`: the consumer group, and what the names of internal topics begin with. A lab gives it."""
    commit_interval: float = 0.1
    threads: int = 1
    rocksdb: Path | None = None
    """A folder for RocksDB's files; without one, counts are in memory."""
    caching: bool = False
    """Let Kafka Streams pass on only a key's last count before a commit. This is faster, but a job that is reported
    twice may take the count past its total unseen, and then there is no notice."""

    listens: ClassVar = True
    """Its pods are ready once the topology runs."""

    @property
    def sources(self) -> tuple[Topic[Any], ...]:
        return (self.commands,)

    def prepare(self) -> StreamsCounter:
        """Raises LabkitError, with the fix, if this machine cannot run it."""
        if self.commands.cluster.security:
            raise LabkitError("Kafka Streams runs here only on a Kafka without a login: start the embedded one")
        if find_spec("jpype") is None:
            raise LabkitError("Kafka Streams needs JPype: pip install 'labkit[streams]'")
        streams_jars(self.rocksdb is not None)
        return self

    def run(self, stop: threading.Event, report: Report) -> None:
        """Count until `stop` is set, then commit and leave. Raises LabkitError when Kafka Streams ends before that."""
        start_jvm(self.rocksdb is not None)
        from jpype import JClass

        kafka, failures = _kafka().streams, list[str]()
        handler = kafka.errors.StreamsUncaughtExceptionHandler

        def failed(error: Any) -> Any:
            if not failures:  # else Python has failed, which Java cannot describe
                failures.append(str(error.toString()))
                error.printStackTrace()
            return handler.StreamThreadExceptionResponse.SHUTDOWN_CLIENT

        properties = JClass("java.util.Properties")()
        for name, value in self._config().items():
            properties.put(name, value)
        streams = kafka.KafkaStreams(self._topology(failures), properties)
        streams.setUncaughtExceptionHandler(handler @ failed)
        figures = _Figures(streams)
        leave = kafka.CloseOptions.GroupMembershipOperation.LEAVE_GROUP
        closing = kafka.CloseOptions.timeout(JClass("java.time.Duration").ofMillis(int(CLOSING * 1000)))
        try:
            streams.start()
            while not stop.wait(LOOK):
                state = str(streams.state())
                if state in ("PENDING_ERROR", "ERROR"):
                    raise LabkitError(f"Kafka Streams ended: {failures[0] if failures else state}")
                if state == "RUNNING":
                    figures.report_to(report)
        finally:
            streams.close(closing.withGroupMembershipOperation(leave))

    def _config(self) -> dict[str, str]:
        return {
            "application.id": self.group,
            "bootstrap.servers": self.commands.cluster.bootstrap,
            "processing.guarantee": "exactly_once_v2",
            "commit.interval.ms": f"{self.commit_interval * 1000:.0f}",
            "num.stream.threads": str(self.threads),
            "state.dir": str((self.rocksdb or Path()) / _pod()),  # each process needs its own folder
            "statestore.cache.max.bytes": str(64 << 20),
            "default.key.serde": "org.apache.kafka.common.serialization.Serdes$StringSerde",
            "default.value.serde": "org.apache.kafka.common.serialization.Serdes$ByteArraySerde",
            "acceptable.recovery.lag": str(2**62),  # a new pod gets its share at once, not after a warm-up
            # A restarted pod takes its partitions back without a rebalance.
            "group.instance.id": _pod(),
            "session.timeout.ms": f"{SESSION * 1000:.0f}",
            "heartbeat.interval.ms": "1000",
            "transaction.timeout.ms": f"{TRANSACTION * 1000:.0f}",
        }

    def _topology(self, failures: list[str]) -> Any:
        kafka, (to_text, is_total) = _kafka().streams, _functions()
        string = _kafka().common.serialization.Serdes.String()
        texts = kafka.kstream.Produced.with_(string, string)
        stores = kafka.state.Stores
        new_store = stores.inMemoryKeyValueStore if self.rocksdb is None else stores.persistentKeyValueStore
        kept = kafka.kstream.Materialized.as_(new_store(STORE))
        kept = kept.withCachingEnabled() if self.caching else kept.withCachingDisabled()
        builder = kafka.StreamsBuilder()
        counts = builder.stream(self.commands.name).groupByKey().count(kept).toStream().mapValues(to_text)
        counts.to(self.output.name, texts)
        complete = counts.filter(is_total)
        if self.notices is not None:
            complete.to(self.notices.name, texts)
        if (url := self.webhook) is not None:

            def notify_webhook(key: Any, _: Any) -> None:
                try:
                    notify(url, str(key))
                except Exception as error:
                    failures.append(error_text(error))
                    raise

            complete.foreach(notify_webhook)
        return builder.build()


class _Figures:
    """The figures of running streams, for telemetry."""

    def __init__(self, streams: Any) -> None:
        self._streams, self._process = streams, psutil.Process()
        self._processed: list[Any] = []  # a counter for each thread
        self._held: set[tuple[str, int]] = set()
        self._started = 0.0

    def report_to(self, report: Report) -> None:
        """Report partitions, records, memory, and how long the start took."""
        if not self._processed:
            self._started = time.time() - self._process.create_time()
            named = ((str(one.getKey().name()), one.getValue()) for one in self._streams.metrics().entrySet())
            self._processed = [one for name, one in named if name == "process-total"]
        held = {
            (str(one.topic()), int(one.partition()))
            for thread in self._streams.metadataForLocalThreads()
            for task in thread.activeTasks()
            for one in task.topicPartitions()
        }
        if gone := self._held - held:
            report(Step.REVOKED, sorted(gone))
        if come := held - self._held:
            report(Step.ASSIGNED, [(topic, number, None) for topic, number in sorted(come)])
        self._held = held
        counts = {"counted": int(sum(float(one.metricValue()) for one in self._processed))}
        gauges = {"memory MB": self._process.memory_info().rss / 1e6, "start s": self._started}
        report(Step.MEASURED, Measured(counts, gauges))


def internal_topics(cluster: Cluster, group: str) -> list[str]:
    """The topics that Kafka Streams has made for itself, for the counter with this group."""
    return sorted({f"{group}-{STORE}-changelog", f"{group}-{STORE}-repartition"} & cluster.topics().keys())


def notify(url: str, key: str) -> None:
    """Notify the service at `url` that the request of this key is complete. Raises LabkitError unless it takes it."""
    request, _, total = key.rpartition("-")
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    try:
        body = json.dumps({"id": key, "request": request, "total": int(total)})
        connection.request("POST", address.path or "/", body, headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise LabkitError(f"the webhook {url} does not answer: {type(error).__name__}") from error
    finally:
        connection.close()
    if status // 100 != 2:
        raise LabkitError(f"the webhook {url} answers {status}")


def _pod() -> str:
    return os.environ.get(POD) or f"process-{os.getpid()}"


def start_jvm(rocksdb: bool, flags: Sequence[str] = QUICK) -> None:
    """Start this process's JVM, with Kafka Streams. A process can have only one: a second call changes nothing."""
    import jpype

    if jpype.isJVMStarted():
        return
    (library,) = (find_java().path.parents[1] / "lib" / "server").glob("libjvm.*")
    jpype.startJVM(str(library), *JVM, *flags, classpath=streams_jars(rocksdb), convertStrings=False, interrupt=False)


def _kafka() -> Any:
    from jpype import JPackage

    return JPackage("org").apache.kafka


def _functions() -> tuple[Any, Any]:
    """Two functions of Java, without a compiler: count → text, and whether a key ends with a dash and this text."""
    from jpype import JClass

    java, kstream = JClass("java.lang.invoke.MethodHandles"), _kafka().streams.kstream
    lookup, signature = java.publicLookup(), JClass("java.lang.invoke.MethodType").methodType
    string, boolean = JClass("java.lang.String").class_, JClass("java.lang.Boolean").TYPE
    to_text = lookup.findVirtual(JClass("java.lang.Object").class_, "toString", signature(string))
    behind_a_dash = lookup.findVirtual(string, "concat", signature(string, string)).bindTo("-")
    ends_with = lookup.findVirtual(string, "endsWith", signature(boolean, string))
    is_total = java.filterArguments(ends_with, 1, behind_a_dash)
    function = JClass("java.lang.invoke.MethodHandleProxies").asInterfaceInstance
    return function(kstream.ValueMapper.class_, to_text), function(kstream.Predicate.class_, is_total)
