"""What the process's producer promises."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest
from consuming import fresh_topic
from processes import wait_until

import labkit.kafka.producer as module
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import DeliveryFailed
from labkit.kafka.producer import POD, HandlerContext, Producer, handling, producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic


def read(topic: Topic[Any]) -> list[Record[Any]]:
    with Reader(topic) as reader:
        return reader.read_to_end(10)


def java_partition(key: bytes, partitions: int) -> int:
    """Where Java's DefaultPartitioner puts a key: murmur2 of org.apache.kafka.common.utils.Utils, written anew."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = 0x9747B28C ^ len(key)
    whole = len(key) // 4 * 4
    for start in range(0, whole, 4):
        k = int.from_bytes(key[start : start + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if rest := key[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    h ^= h >> 15
    return (h & 0x7FFFFFFF) % partitions


# From Kafka's own UtilsTest.testMurmur2, as signed 32-bit numbers.
MURMUR2 = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


def test_keys_land_where_java_puts_them(cluster: Cluster) -> None:
    """correctness 9: murmur2, checked against Kafka's own test vectors, then against where the records are."""
    for key, hashed in MURMUR2.items():
        assert java_partition(key, 2**31) == hashed & 0x7FFFFFFF
    topic = fresh_topic(cluster, 7)
    keys = [key.decode() for key in MURMUR2] + [f"kunde-ä-{number}" for number in range(60)]
    for key in keys:
        topic.send(1, key)
    topic.flush()
    assert {record.key: record.partition for record in read(topic)} == {
        key: java_partition(key.encode(), 7) for key in keys
    }


def test_records_without_a_key_are_spread(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, 4)

    def spread() -> bool:  # the client draws a partition every 10 ms, and may draw the same one many times
        topic.send(0)
        topic.flush()
        return {record.partition for record in read(topic)} == {0, 1, 2, 3}

    wait_until(spread, 20, "a record in each partition")


def test_a_record_too_large_is_refused_at_once(cluster: Cluster) -> None:
    topic = fresh_topic(cluster, value=str)
    with pytest.raises(DeliveryFailed, match=topic.name):
        topic.send("x" * 3_000_000)


def test_what_the_broker_refuses_is_told_once_by_flush(cluster: Cluster) -> None:
    topic = Topic(cluster, f"{fresh_topic(cluster).name}.small", 1, str)
    topic.create({"max.message.bytes": "1000"})
    topic.send("x" * 5000)
    with pytest.raises(DeliveryFailed, match=rf"1 records were not delivered: {topic.name}"):
        topic.flush()
    topic.send("small")
    topic.flush()


def test_who_depends_on_a_delivery_sees_its_failure_whoever_was_told(cluster: Cluster) -> None:
    """correctness 10: a flush elsewhere in the process must not take a failure away from the commit."""
    topic = Topic(cluster, f"{fresh_topic(cluster).name}.small", 1, str)
    topic.create({"max.message.bytes": "1000"})
    mine = producer(cluster)
    before = mine.refused
    mine.check(before)
    topic.send("x" * 5000)
    with pytest.raises(DeliveryFailed):
        topic.flush()
    with pytest.raises(DeliveryFailed, match="1 records"):
        mine.check(before)
    mine.check(mine.refused)


def test_a_delivery_is_told_of_its_own_records_whoever_flushes(cluster: Cluster) -> None:
    """Of those that were refused too: of a process's flushes only the first would hear of it."""
    topic = Topic(cluster, f"{fresh_topic(cluster).name}.small", 1, str)
    topic.create({"max.message.bytes": "1000"})
    topic.deliver([("a", "k", {"x": "y"}), (None, "k", None)])
    topic.deliver([])
    with pytest.raises(DeliveryFailed, match=f"{topic.name}: 1 of 1 records were refused: "):
        topic.deliver([("x" * 5000, "k", None)])
    topic.flush()
    assert [(one.value, one.key, one.headers.get("x")) for one in read(topic)] == [("a", "k", "y"), (None, "k", None)]


def test_a_topic_that_is_missing_is_told(cluster: Cluster) -> None:
    topic = Topic(cluster, f"{fresh_topic(cluster).name}.missing", 1, int)
    topic.send(1)
    with pytest.raises(DeliveryFailed, match=topic.name):
        topic.flush(30)


@pytest.mark.long
def test_an_unreachable_cluster_fails_within_the_time_limit() -> None:
    nowhere = Producer(Cluster("127.0.0.1:1"), timeout=5.0)
    nowhere.send("orders", b"1")
    with pytest.raises(DeliveryFailed, match=r"not confirmed|not delivered"):
        nowhere.flush(0.2)
    with pytest.raises(DeliveryFailed, match="orders"):
        nowhere.flush(20)


def test_threads_that_ask_at_once_get_one_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 10: with two producers in a process the one would not confirm what the other sent."""
    made: list[object] = []
    two = threading.Barrier(2)

    class Slow:
        def __init__(self, _cluster: Cluster, _timeout: float, reports: bool, copies: bool) -> None:
            made.append(self)
            with suppress(threading.BrokenBarrierError):
                two.wait(0.5)  # for another one that is being made, and must not be

    monkeypatch.setattr(module, "Producer", Slow)
    where = Cluster("nowhere:1", (("client.id", "at-once"),))
    start = threading.Barrier(4)
    found: list[object] = []

    def ask() -> None:
        start.wait()
        found.append(producer(where))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == len(made) == 1


def test_headers_say_where_a_record_comes_from(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POD, "shop-1")
    sender = Producer(cluster)
    topic = fresh_topic(cluster)
    sender.send(topic.name, b"0")
    sender.flush()
    (first,) = read(topic)
    second_hand = [("labkit-pod", b"shop-9"), ("labkit-cause", b"elsewhere/0/0")]
    token = handling.set(HandlerContext(record=first))
    try:
        sender.send(topic.name, b"1")
        sender.send(topic.name, b"2", headers={**first.headers, "x": "y"})
        sender.send(topic.name, b"3", headers={"correlation-id": "mine"})
        sender.send(topic.name, b"4", headers=[("x", b"\xff"), ("cause", "mine"), ("x", None), *second_hand])
    finally:
        handling.reset(token)
    sender.flush()
    _, second, third, fourth, fifth = read(topic)
    correlation = first.headers["correlation-id"]
    assert first.headers == {"correlation-id": correlation, "labkit-pod": "shop-1"}
    assert second.headers == {"correlation-id": correlation, "labkit-cause": first.place, "labkit-pod": "shop-1"}
    assert third.headers == {**second.headers, "x": "y"}
    assert fourth.headers == {**second.headers, "correlation-id": "mine"}
    names = [name for name, _ in third.raw_headers]
    assert len(names) == len(set(names))
    own = [("correlation-id", correlation.encode()), ("labkit-cause", first.place.encode()), ("labkit-pod", b"shop-1")]
    assert fifth.raw_headers == [("x", b"\xff"), ("cause", b"mine"), ("x", None), *own]


def test_a_correlation_id_that_is_no_text_goes_on_as_it_is(cluster: Cluster) -> None:
    sender, topic = Producer(cluster), fresh_topic(cluster)
    sender.send(topic.name, b"0", headers={"correlation-id": b"\xfe"})
    sender.flush()
    token = handling.set(HandlerContext(record=read(topic)[0]))
    try:
        sender.send(topic.name, b"1")
    finally:
        handling.reset(token)
    sender.flush()
    assert dict(read(topic)[1].raw_headers)["correlation-id"] == b"\xfe"


def test_what_a_plain_client_sends_fits_with_the_headers_that_come_to_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 34: a handler's record of some 1,000,000 bytes, the most that the client takes by default."""
    monkeypatch.setenv(POD, "shop-1")
    sender, topic = Producer(cluster), fresh_topic(cluster, value=str)
    sender.send(topic.name, b'"first"')
    sender.flush()
    (first,) = read(topic)
    context = HandlerContext(sender, first)
    context.collecting = True
    token = handling.set(context)
    try:
        sender.send(topic.name, large := b'"%b"' % (b"x" * 999_900))
        for output in context.take():
            sender.release(output)
    finally:
        handling.reset(token)
    sender.flush()
    assert read(topic)[1].value == large.decode()[1:-1]
