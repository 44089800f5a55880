"""A broker that makes every topic a client asks for. That is Kafka's default; the embedded broker has it off."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress

import pytest
from confluent_kafka import Producer as StockProducer
from consuming import fresh_group
from lab_helpers import Order, orders, values
from processes import wait_until

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import DeliveryFailed, LabkitError
from labkit.kafka.lag import lag
from labkit.kafka.producer import Producer
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import dead_letters_topic
from labkit.patterns.retries import RetryingConsumer, retry_topics
from labkit.runtime.broker import Broker, prepare
from labkit.runtime.child import Child


@pytest.fixture(scope="module")
def creating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The running broker."""
    kafka, folder = prepare(), tmp_path_factory.mktemp("creating") / "broker"
    broker = Broker.create(folder, kafka, extra="auto.create.topics.enable=true\n")
    with Child(kafka.command(folder), cwd=folder, output=broker.log) as child:
        broker.wait_until_ready(lambda: child.poll() is None)
        yield broker.cluster


class Stock:
    """A client of somebody else: it asks for its topic as often as labkit's clients do, and the broker makes it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.topic = cluster, unmade()
        self.client = StockProducer(
            {"bootstrap.servers": cluster.bootstrap, "topic.metadata.refresh.interval.ms": 1000, "log_level": 0}
        )
        self.client.produce(self.topic, b"{}")
        assert self.client.flush(20) == 0

    def wait_for_refreshes(self, count: int = 2) -> None:
        """Wait until its deleted topic has come back this many times: so often have other clients asked as well."""
        for _ in range(count):
            self.cluster.delete_topics([self.topic])
            wait_until(lambda: self.topic in self.cluster.topics(), 30, "the topic to come back")


def unmade() -> str:
    """The name of a topic that nobody has made."""
    return f"unmade-{uuid.uuid4().hex[:12]}"


def test_a_send_to_a_topic_nobody_made_is_refused(creating: Cluster) -> None:
    first, second = unmade(), unmade()
    sender = Producer(creating)
    for name in (first, second):  # the first record of a producer asks for its topic in a way of its own
        sender.send(name, b"{}")
        with pytest.raises(DeliveryFailed):
            sender.flush()
    assert creating.topics().keys().isdisjoint({first, second})


def test_no_question_about_a_topic_makes_it(creating: Cluster) -> None:
    topic = Topic(creating, unmade(), 1, int)
    for question in (creating.topic_id, creating.topic_config):
        with pytest.raises(LabkitError):
            question(topic.name)
    assert lag(creating, fresh_group(), [topic.name]) == {}
    with Reader(topic) as reader, suppress(LabkitError):
        reader.poll(1.0)
    Stock(creating).wait_for_refreshes(1)
    assert topic.name not in creating.topics()


@pytest.mark.long
def test_what_a_closed_lab_deleted_stays_away(creating: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", creating.bootstrap)
    stock = Stock(creating)

    def refuse(record: object) -> None:
        raise ValueError("no")

    with Lab("creating") as lab:
        source = lab.topic("orders", 2, Order)
        lab.deploy("shop", RetryingConsumer(source, refuse, retry=retry_topics(0.1)))
        lab.load(source, orders(10), rate=1000)
        source.send(Order(10))  # from the notebook's own process, which goes on after the lab is closed
        source.flush()
        source.deliver([(Order(11), None, None)])
        letters = dead_letters_topic(source, lab.run.name("shop"))
        wait_until(lambda: len(values(letters)) == 12, 30, "all to be dead letters")
    stock.wait_for_refreshes()
    assert [name for name in creating.topics() if lab.run.id in name] == []
