"""What a cluster is, how it is set, and what it allows this client, as far as a client can tell."""

from __future__ import annotations

import logging
import re
import threading
import time
from contextlib import suppress

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]

from labkit.kafka.cluster import ANSWER, FORBIDDEN, PASSING, Cluster
from labkit.kafka.errors import LabkitError, TopicMissing

PATIENCE = 10.0  # seconds for a step of a transaction

# By what one tells a release: the first version of a request that only this one and newer ones know. Newest first.
_RELEASES = {
    ("Fetch", 18): "4.1 or newer",
    ("Produce", 12): "4.0",
    ("Fetch", 17): "3.9",
    ("Produce", 11): "3.8",
    ("Fetch", 16): "3.7",
    ("Fetch", 15): "3.5 or 3.6",
}
OLDER = "older than 3.5"


class Refused(LabkitError):
    """Kafka did not do what it was asked for; `is_forbidden` if that was for lack of a right."""

    def __init__(self, what: str, error: KafkaError) -> None:
        super().__init__(f"{what}: {error.str()}")
        self.is_forbidden = error.code() in FORBIDDEN


def release(cluster: Cluster) -> str:
    """The release of Kafka, by the requests that its brokers know: none of them says its version.

    librdkafka tells these requests in its log only. It takes no right to ask. Raises ClusterUnreachable.
    """
    told = _Told()
    client = AdminClient(cluster.config({"debug": "feature", "log_level": 7}), logger=told.logger)
    cluster.ask(lambda _: client.list_topics(timeout=ANSWER))
    client.poll(0.0)  # its log is handed out by this
    return next((name for (ask, version), name in _RELEASES.items() if told.newest.get(ask, 0) >= version), OLDER)


class _Told(logging.Handler):
    """Takes from librdkafka's log the newest version of each request that the broker knows."""

    def __init__(self) -> None:
        super().__init__()
        self.newest: dict[str, int] = {}
        self.logger = logging.Logger("labkit.librdkafka")  # nobody else's: it is in no tree of loggers
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"ApiKey (\w+) \(\d+\) Versions \d+\.\.(\d+)", record.getMessage()):
            self.newest[found[1]] = int(found[2])


def broker_settings(cluster: Cluster) -> dict[str, str]:
    """All settings of one broker, by name; none if this login may not read them. Raises ClusterUnreachable."""
    resource = ConfigResource(ConfigResource.Type.BROKER, str(min(cluster.describe().brokers)))

    def asked(client: AdminClient) -> dict[str, str]:
        try:
            answer = client.describe_configs([resource], request_timeout=ANSWER)[resource].result(ANSWER + 1)
        except KafkaException as error:
            if error.args[0].code() not in FORBIDDEN:
                raise
            return {}
        return {entry.name: entry.value for entry in answer.values() if entry.value is not None}

    return cluster.ask(asked)


def replication(cluster: Cluster, topic: str) -> tuple[int, int] | None:
    """How many replicas a topic has, and how many of them have to confirm a record; None if it is not to be seen."""
    with suppress(TopicMissing):
        replicas = cluster.partitions(topic)[0].replicas
        return len(replicas), int(cluster.topic_config(topic)["min.insync.replicas"])
    return None


def commit_an_offset(cluster: Cluster, group: str, topic: str) -> None:
    """Commit an offset as this group. Raises Refused."""
    told: list[KafkaError | None] = []
    own = {"group.id": group, "enable.auto.commit": False, "on_commit": lambda error, _: told.append(error)}
    client = Consumer(cluster.config(own))
    until = time.monotonic() + PATIENCE
    try:
        while True:
            client.commit(offsets=[TopicPartition(topic, 0, 0)], asynchronous=True)
            while not told and time.monotonic() < until:
                message = client.poll(0.1)
                if message is not None and (error := message.error()) is not None and error.code() in FORBIDDEN:
                    told.append(error)  # to ask for the coordinator is forbidden, and the commit would wait for it
            error = told.pop() if told else KafkaError(KafkaError._TIMED_OUT)
            if error is None:
                return
            if error.code() not in PASSING or time.monotonic() > until:  # the first group of a cluster has to wait
                raise Refused(f"group {group} could not commit", error)
    finally:
        # Not waited for: for a coordinator that does not come this takes 45 s.
        threading.Thread(target=client.close, name="end of a client", daemon=True).start()


def make_a_transaction(cluster: Cluster, transactional_id: str, topic: str) -> None:
    """Write a record in a transaction, and commit it. Raises Refused."""
    client = Producer(cluster.config({"transactional.id": transactional_id, "transaction.timeout.ms": 10_000}))
    try:
        client.init_transactions(PATIENCE)
        client.begin_transaction()
        client.produce(topic, b"doctor")
        client.commit_transaction(PATIENCE)
    except KafkaException as error:
        raise Refused("no transaction can be made", error.args[0]) from error
