"""A connection that can be cut, slowed down and held back: at which step it breaks, and what clients make of it."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import KafkaException
from confluent_kafka import Producer as Client
from consuming import fresh_topic
from lab_helpers import values, wait_ready
from processes import wait_until

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import ClusterUnreachable, DeliveryFailed, LabkitError
from labkit.kafka.lag import end_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic
from labkit.runtime.broker import HOST, free_ports, is_free
from labkit.runtime.private_broker import PrivateBroker
from labkit.runtime.proxy import Proxy
from labkit.runtime.which_kafka import Connection


@pytest.fixture(scope="module")
def lab(state_dir: object) -> Iterator[Lab]:
    """One with a broker to itself."""
    with Lab("proxy", pace=10, cluster="private") as lab:
        yield lab


@pytest.fixture
def proxy(lab: Lab) -> Iterator[Proxy]:
    assert lab.connection.broker is not None
    proxy = lab.connection.broker.proxy
    proxy.recover()
    yield proxy
    proxy.recover()


def connected(proxy: Proxy, topic: Topic[Any], **options: Any) -> Producer:
    """A producer that has sent a first record, 0, through the proxy: from now on only what it sends is asked."""
    made = Producer(proxy.cluster, **options)
    made.send(topic.name, b"0")
    made.flush()
    return made


def records(topic: Topic[Any]) -> int:
    """How many the topic has, as the broker itself says."""
    return sum(end_offsets(topic.cluster, [topic.name]).values())


def is_ended(connection: socket.socket) -> bool:
    """Wait until the other side ends it, in good order or not."""
    connection.settimeout(20)
    try:
        return connection.recv(100) == b""
    except ConnectionError:
        return True


# -- a lost answer -----------------------------------------------------------------------------------------------------


def unanswered(lab: Lab, proxy: Proxy, idempotent: bool) -> tuple[Topic[Any], Producer]:
    """A topic that has a record, and the producer that waits for the broker's answer about it."""
    topic = fresh_topic(lab.cluster)
    producer = connected(proxy, topic, idempotent=idempotent)
    proxy.hold("Produce")
    producer.send(topic.name, b"1")
    producer.poll()
    proxy.wait()
    return topic, producer


@pytest.mark.parametrize(("idempotent", "there"), [(True, [0, 1]), (False, [0, 1, 1])])
def test_what_is_sent_again_after_a_lost_answer(lab: Lab, proxy: Proxy, idempotent: bool, there: list[int]) -> None:
    """The broker drops the duplicate of an idempotent producer, and stores that of another one."""
    topic, producer = unanswered(lab, proxy, idempotent)
    assert records(topic) == 2  # it is in the topic, and its producer does not know
    assert producer.unconfirmed(0) == 1
    proxy.cut()
    proxy.recover()
    producer.flush()
    assert values(topic) == there


@pytest.mark.parametrize("idempotent", [True, False])
def test_a_request_that_was_lost_is_sent_again_and_is_there_once(lab: Lab, proxy: Proxy, idempotent: bool) -> None:
    topic = fresh_topic(lab.cluster)
    producer = connected(proxy, topic, idempotent=idempotent)
    proxy.cut("Produce")
    assert proxy.state == "waits for Produce to cut"
    producer.send(topic.name, b"1")
    producer.poll()
    proxy.wait()
    assert records(topic) == 1
    proxy.recover()
    producer.flush()
    assert values(topic) == [0, 1]


def test_a_commit_whose_answer_is_lost_is_asked_for_again_and_done_once(lab: Lab, proxy: Proxy) -> None:
    """correctness 39, of the client itself: the same call again, until it is answered."""
    topic = fresh_topic(lab.cluster)
    client = Client(proxy.cluster.config({"transactional.id": topic.name}))
    client.init_transactions(20)
    client.begin_transaction()
    client.produce(topic.name, b"1")
    client.flush()
    proxy.hold("EndTxn")
    with pytest.raises(KafkaException) as caught:
        client.commit_transaction(0.5)
    assert caught.value.args[0].retriable()
    proxy.wait()
    assert values(topic) == [1]  # committed, for everybody but its producer
    proxy.cut()
    proxy.recover()
    client.commit_transaction(20)
    assert values(topic) == [1]


@pytest.mark.long
def test_a_record_that_was_held_back_too_long_may_be_there_all_the_same(lab: Lab, proxy: Proxy) -> None:
    topic = fresh_topic(lab.cluster)
    producer = connected(proxy, topic, timeout=1.0)
    proxy.hold()
    producer.send(topic.name, b"1")
    with pytest.raises(DeliveryFailed):
        producer.flush()
    assert values(topic) == [0, 1]
    proxy.recover()


# -- what a connection does --------------------------------------------------------------------------------------------


def test_cut_it_refuses_everybody_until_it_recovers(lab: Lab, proxy: Proxy) -> None:
    topic = fresh_topic(lab.cluster)
    producer = connected(proxy, topic)
    with socket.create_connection((HOST, proxy.port)) as open_one:
        proxy.cut()
        assert proxy.state == "cut"
        assert is_ended(open_one)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, proxy.port))
    with pytest.raises(ClusterUnreachable):
        proxy.cluster.describe(0.3)
    proxy.cut()  # again: it is cut
    producer.send(topic.name, b"1")
    assert producer.unconfirmed(0.1) == 1
    proxy.recover()
    proxy.recover()
    producer.flush()
    assert values(topic) == [0, 1]


@pytest.mark.long
def test_slow_it_takes_its_time_each_way_and_keeps_the_order(lab: Lab, proxy: Proxy) -> None:
    topic = fresh_topic(lab.cluster)
    producer = connected(proxy, topic)
    proxy.slow(0.2)
    began = time.monotonic()
    for number in range(1, 500):
        producer.send(topic.name, str(number).encode())
        if number % 50 == 0:
            producer.poll(0.01)  # several requests
    proxy.recover()  # what is under way is not overtaken by what comes after it
    producer.send(topic.name, b"500")
    producer.flush()
    assert time.monotonic() - began >= 0.2  # at least: that holds on any machine
    assert values(topic) == [*range(501)]


def test_held_answers_go_out_when_it_recovers(lab: Lab, proxy: Proxy) -> None:
    topic, producer = unanswered(lab, proxy, idempotent=False)
    proxy.recover()
    producer.flush()
    assert values(topic) == [0, 1]  # one that had to send it again would have sent it twice


def test_large_records_and_many_clients_come_through(lab: Lab, proxy: Proxy) -> None:
    topic = fresh_topic(lab.cluster, partitions=4, value=str)

    def send(client: int) -> None:
        producer = Producer(proxy.cluster)
        for number in range(20):
            producer.send(topic.name, b'"%b"' % (b"x" * 100_000), key=f"{client}-{number}")
        producer.flush()

    threads = [threading.Thread(target=send, args=(client,)) for client in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    through = replace(topic, cluster=proxy.cluster)
    assert [len(value) for value in values(through)] == [100_000] * 80


def test_what_is_not_kafkas_protocol_ends_its_own_connection_only(lab: Lab, proxy: Proxy) -> None:
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", b"\0\0\0\1x"):
        with socket.create_connection((HOST, proxy.port)) as other:
            other.sendall(garbage)
            assert is_ended(other)
    assert proxy.cluster.describe().cluster_id == lab.connection.cluster_id


# -- other servers behind it -------------------------------------------------------------------------------------------


class Backwards(socketserver.StreamRequestHandler):
    """Answers when it has all of a question."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.read()[::-1])


@pytest.fixture
def backwards() -> Iterator[int]:
    """The port of a server that knows no Kafka."""
    with socketserver.ThreadingTCPServer((HOST, 0), Backwards) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, question: bytes) -> bytes:
    with socket.create_connection((HOST, port), 20) as connection:
        connection.sendall(question)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(100_000), b""))


def test_what_is_no_broker_is_reached_through_it_and_cut_off_with_it(proxy: Proxy, backwards: int) -> None:
    port = proxy.through(backwards)
    assert proxy.through(backwards) == port != proxy.through(backwards + 1)
    question = bytes(range(256)) * 4000
    assert ask(port, question) == question[::-1]
    with socket.create_connection((HOST, port)) as open_one:
        proxy.cut()
        assert is_ended(open_one)
    with pytest.raises(ConnectionRefusedError):
        ask(port, b"1")
    later = proxy.through(backwards + 2)  # it is cut off from the beginning
    with pytest.raises(ConnectionRefusedError):
        ask(later, b"1")
    proxy.recover()
    assert ask(port, b"12") == b"21"
    with socket.create_connection((HOST, later)) as nobody_there:
        assert is_ended(nobody_there)


def test_a_distance_is_no_fault_and_stays(proxy: Proxy, backwards: int) -> None:
    port = proxy.through(backwards)
    proxy.distance(0.05)
    try:
        proxy.cut()
        proxy.recover()
        assert proxy.state == "0.05 s away"
        began = time.monotonic()
        assert ask(port, b"12") == b"21"
        assert time.monotonic() - began >= 4 * 0.05  # a round trip to connect, and one to ask
    finally:
        proxy.distance(0)
    assert proxy.state == "open"
    for seconds in (-1, float("nan"), 11):
        with pytest.raises(LabkitError, match="a distance is 0 to 10 s each way"):
            proxy.distance(seconds)


# -- pods behind it ----------------------------------------------------------------------------------------------------


def test_pods_that_are_cut_off_go_on_later_and_the_lab_sees_them_meanwhile(lab: Lab) -> None:
    proxy = lab.proxy
    orders, done = lab.topic("orders", 2, dict), lab.topic("done", 2, dict)
    theirs, out = (replace(topic, cluster=proxy.cluster) for topic in (orders, done))

    def handle(record: Record[dict[str, Any]]) -> None:
        out.send(record.value, key=record.key)

    shop = lab.deploy("shop", Consumer(theirs, handle, commit_interval=0.05))
    wait_ready(shop)
    lab.board(lag=shop, completed=done)
    proxy.cut()
    load = lab.load(orders, ({"id": number} for number in range(50)), rate=1000)
    wait_until(lambda: lab.history().query("metric == 'behind'")["value"].max() == 50, 20, "the board to see the lag")
    assert values(done) == []
    assert proxy.recover() == "ended: cut the connection"
    assert lab.settle(30)
    print(lab.verdict(sent=load, done=done).check())
    assert sorted(one["id"] for one in values(done)) == [*range(50)]


def test_what_is_done_to_the_connection_is_in_the_labs_history(lab: Lab) -> None:
    """By method, button or name, as to every target."""
    connection, known = lab.targets["connection"], len(lab.faults)
    assert connection is lab.proxy
    assert [action.label for action in connection.actions()] == [
        f"{verb} connection" for verb in ("Cut", "Hold", "Slow", "Recover")
    ]
    lab.proxy.slow(0.01)
    lab.proxy.hold("Produce")
    assert connection.do("cut", {}) == "cut connection: it is misbehaving"
    assert connection.standing() == ["slow the connection by 0.01 s", "cut the connection"]
    connection.recover()
    assert connection.recover().startswith("nothing to mend")
    found = [(fault.kind, fault.text, fault.end is None) for fault in lab.faults[known:]]
    assert found == [
        ("slow", "slow the connection by 0.01 s", False),
        ("hold", "hold the connection from the next Produce on", False),
        ("cut", "cut the connection", False),
    ]
    with pytest.raises(LabkitError, match="not with 'produce'"):
        lab.proxy.cut("produce")
    assert not connection.standing()


# -- bad input, and ends -----------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(proxy: Proxy) -> None:
    for seconds in (0, -1, float("nan"), float("inf"), 11):
        with pytest.raises(LabkitError, match="at most 10 s each way"):
            proxy.slow(seconds)
    for fault in (proxy.cut, proxy.hold):
        with pytest.raises(LabkitError, match=r"one of Produce, InitProducerId, .* not with 'produce'"):
            fault("produce")
    assert proxy.state == "open"
    proxy.hold("EndTxn")
    with pytest.raises(LabkitError, match=r"no request began the fault within .* waits for EndTxn to hold"):
        proxy.wait(0.01)
    assert repr(proxy).endswith("waits for EndTxn to hold)")


def test_a_shared_kafka_has_no_proxy(connection: Connection) -> None:
    with Lab("shared-proxy") as lab, pytest.raises(LabkitError, match="cluster='private'"):
        _ = lab.proxy


@pytest.mark.long
def test_it_outlives_a_broker_that_is_started_again(state_dir: object) -> None:
    with PrivateBroker() as broker:
        topic = fresh_topic(broker.cluster)
        producer = connected(broker.proxy, topic)
        broker.kill()
        with pytest.raises(ClusterUnreachable):
            broker.proxy.cluster.describe(0.3)
        broker.restart()
        producer.send(topic.name, b"1")
        producer.flush()
        assert values(replace(topic, cluster=broker.proxy.cluster)) == [0, 1]


@pytest.mark.long
def test_it_ends_with_its_broker(state_dir: object) -> None:
    with PrivateBroker() as broker:
        assert broker.proxy.cluster.describe().cluster_id == broker.cluster_id
    assert broker.proxy.state == "closed"
    assert is_free(broker.proxy.port)
    broker.proxy.close()
    for fault in (broker.proxy.cut, broker.proxy.hold, broker.proxy.recover, lambda: broker.proxy.slow(1)):
        with pytest.raises(LabkitError, match="closed: make a new lab"):
            fault()


def test_a_port_that_is_taken_is_told() -> None:
    port, _ = free_ports()
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        with pytest.raises(LabkitError, match=f"took port {port}"):
            Proxy(port, to=port)


def test_what_it_reaches_is_the_same_cluster(lab: Lab, proxy: Proxy) -> None:
    """All that the broker tells of itself there is the proxy: nobody comes past it by being told of another address."""
    assert proxy.cluster == Cluster(f"{HOST}:{proxy.port}") != lab.cluster
    client = Client(proxy.cluster.config({}))
    told = client.list_topics(timeout=10).brokers.values()
    assert [(one.host, one.port) for one in told] == [(HOST, proxy.port)]
