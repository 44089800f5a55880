"""Pattern 3: what a store holds is what its topic says, whoever writes, fails or restarts."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import NewPartitions
from consuming import Untellable, Untraceable, alter
from processes import wait_until
from stores import COMPACTED, EAGER, StoreProcess, compact, on_disk, raw, size, store_topic, transaction

from labkit.kafka.cluster import Cluster, admin
from labkit.kafka.errors import (
    ClusterUnreachable,
    DeliveryFailed,
    LabkitError,
    PoisonRecord,
    TopicMismatch,
    TopicMissing,
)
from labkit.kafka.lag import start_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.topics import Topic
from labkit.lab.pods.travel import pack, unpack
from labkit.patterns.key_value_store import KeyValueStore, StoreClosed, StoreNotReady
from labkit.runtime.broker import Broker, prepare
from labkit.runtime.private_broker import PrivateBroker


class Country(msgspec.Struct, frozen=True):
    name: str
    zones: tuple[str, ...] = ()


@pytest.fixture
def store(cluster: Cluster) -> Iterator[KeyValueStore[Any]]:
    with KeyValueStore(store_topic(cluster)) as store:
        yield store


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores look ten times a second where their topic ends, instead of every three seconds."""
    monkeypatch.setattr("labkit.patterns.key_value_store.follower.LOOK", 0.1)


# -- a mapping


def test_it_is_a_mapping_of_what_was_written(cluster: Cluster) -> None:
    sudan, south = Country("Sudan", ("Africa/Khartoum",)), Country("South Sudan", ("Africa/Juba",))
    with KeyValueStore(store_topic(cluster, value=Country)) as store:
        assert len(store) == 0
        assert "SS" not in store
        assert store.get("SS") is None
        assert store.get("SS", sudan) is sudan
        with pytest.raises(KeyError):
            store["SS"]
        store.put("SD", sudan)
        store.put("SS", south)
        assert store["SS"] == store.get("SS") == south
        assert "SS" in store
        assert sorted(store) == sorted(store.keys()) == ["SD", "SS"]
        assert dict(store.items()) == store.snapshot() == {"SD": sudan, "SS": south}
        assert sorted(country.name for country in store.values()) == ["South Sudan", "Sudan"]
        store.delete("SD")
        assert "SD" not in store
        assert len(store) == 1
        assert repr(store).endswith("1 entries)")
        assert store.lag() == 0


FORKED = """
import json, os, signal, socket, sys
from labkit.kafka.clients import forget
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore

def refused(use):
    try:
        use()
    except LabkitError as error:
        return f"{type(error).__name__} {error}"

topic = Topic(Cluster(sys.argv[1]), sys.argv[2], 2, int)
with KeyValueStore(topic) as store:
    store.put("a", 1)
    subscription = store.subscribe(lambda *change: None)
    reader, writer = os.pipe()
    while (child := os.fork()) and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGALRM:
        pass
    if child == 0:
        signal.alarm(5)
        socket.getaddrinfo("127.0.0.1", 0, flags=socket.AI_ADDRCONFIG)
        signal.alarm(0)
        uses = [lambda: store["a"], lambda: store.get("b"), lambda: len(store), lambda: store.put("a", 2),
                lambda: store.subscribe(print), store.wait_ready]
        told = [store.ready, *map(refused, uses)]
        subscription.close()
        store.close()
        forget(topic.cluster)
        with KeyValueStore(topic) as own:
            own.put("a", 2)
            told.append(own.snapshot())
        forget(topic.cluster)
        os.write(writer, json.dumps(told).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        print(answer.read())
    print(store.put("b", 3) or json.dumps(store.snapshot()))
"""


def test_in_a_forked_process_it_is_closed_and_another_one_can_be_made(cluster: Cluster) -> None:
    """No thread is there to follow the topic: it was read as it had been, and told that it was ready.

    The C library does not reset its resolver's lock in a fork: if a thread held it, nobody in the child can connect
    (seen in CI; two threads that resolve all the time do it to four forks of ten). A child of that kind ends by its
    alarm, and the process forks again.
    """
    topic = store_topic(cluster, value=int)
    command = [sys.executable, "-W", "ignore", "-c", FORKED, cluster.bootstrap, topic.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert len(done.stdout.splitlines()) == 2, done.stdout + done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    ready, *refusals, own = first
    assert ready is False
    assert len(refusals) == 6
    assert all("StoreClosed" in said and "after the fork" in said for said in refusals)
    assert own == {"a": 2}
    assert second == {"a": 2, "b": 3}


def test_put_delete_restart_absent(cluster: Cluster) -> None:
    topic = store_topic(cluster)
    with KeyValueStore(topic) as store:
        store.update({"kept": 1, "deleted": 2, "changed": 3})
        store.delete("deleted")
        store.put("changed", 4)
    with KeyValueStore(topic) as again:
        assert again.snapshot() == {"kept": 1, "changed": 4}


def test_one_that_is_deleted_and_written_again_is_there(store: KeyValueStore[Any]) -> None:
    store.put("a", 1)
    store.delete("a")
    store.put("a", 2)
    assert store["a"] == 2


def test_a_tombstone_for_an_absent_key_changes_nothing(store: KeyValueStore[Any]) -> None:
    seen: list[Any] = []
    store.subscribe(lambda *change: seen.append(change))
    store.delete("nobody")
    store.put("somebody", 1)
    wait_until(lambda: seen == [("somebody", None, 1)], what="the one change")
    assert store.snapshot() == {"somebody": 1}


def test_none_is_no_value(store: KeyValueStore[Any]) -> None:
    with pytest.raises(LabkitError, match="delete the key instead"):
        store.put("a", None)
    assert size(store.topic) == 0


@pytest.mark.parametrize("wrong", ["x", 1.5, object(), "\ud800"], ids=["text", "fraction", "object", "surrogate"])
def test_a_value_of_another_type_is_refused_before_it_is_sent(cluster: Cluster, wrong: Any) -> None:
    topic = store_topic(cluster, value=int)
    with KeyValueStore(topic) as store:
        with pytest.raises(LabkitError, match=rf"no value for 'a' in store {topic.short}: write .* type, int "):
            store.update({"before": 1, "a": wrong})
        assert size(topic) == 0
        store.put("a", 1)
        assert store.snapshot() == {"a": 1}


def test_what_iterates_is_not_disturbed_by_writes(store: KeyValueStore[Any]) -> None:
    store.update({str(number): number for number in range(100)})
    seen = []
    for key, value in store.items():
        if not seen:
            store.update({str(number): -number for number in range(50, 150)})
            store.delete("99")
        seen.append((key, value))
    assert sorted(seen) == sorted((str(number), number) for number in range(100))


# -- readiness (25)


def test_reads_before_all_is_loaded_raise(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1)
    raw(topic, (b"a", b"1"))
    opened = transaction(topic, ("b", 2), end="open")  # holds back every reader: the store cannot be ready
    store = KeyValueStore(topic)
    try:
        wait_until(lambda: store._trouble.startswith("1 records"), 20, "all to be read but the transaction")
        with pytest.raises(StoreNotReady, match=r"not loaded within 0\.1 s: 1 records are to be read.*transaction"):
            store.wait_ready(0.1)
        assert not store.ready
        for read in (
            lambda: store["a"],
            lambda: store.get("a"),
            lambda: "a" in store,
            lambda: len(store),
            lambda: list(store),
            store.items,
        ):
            with pytest.raises(StoreNotReady, match=r"wait_ready\(\)"):
                read()
        opened.commit_transaction(20)
        assert store.wait_ready(20).snapshot() == {"a": 1, "b": 2}
    finally:
        store.close()


def test_ready_means_up_to_the_end_at_start_whatever_the_writers_do(cluster: Cluster) -> None:
    """The last keys written before it starts are there, each time, while somebody else keeps writing."""
    topic = store_topic(cluster, 4)
    producer, stop = Producer(cluster), threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            producer.send(topic.name, b"0", f"noise {time.monotonic_ns() % 1000}")
            stop.wait(0.0005)

    with KeyValueStore(topic) as writer:
        noise = threading.Thread(target=disturb)
        noise.start()
        try:
            for turn in range(5):
                last = {f"turn {turn} {number}": number for number in range(20)}
                writer.update(last)
                with KeyValueStore(topic) as store:
                    assert last.items() <= store.snapshot().items()
        finally:
            stop.set()
            noise.join()
            producer.flush()


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_a_topic_that_ends_with_a_marker_is_ready_at_once(cluster: Cluster, end: str) -> None:
    """No record is ever handed out at the offset of a marker: only the position tells that all was read."""
    topic = store_topic(cluster, 2)
    raw(topic, (b"a", b"1"))
    transaction(topic, ("a", 2), ("b", 2), end=end)
    with KeyValueStore(topic) as store:
        assert store.snapshot() == ({"a": 2, "b": 2} if end == "commit" else {"a": 1})


def test_an_empty_topic_is_ready(cluster: Cluster) -> None:
    with KeyValueStore(store_topic(cluster, 8)) as store:
        assert store.snapshot() == {}


def test_a_topic_that_is_not_compacted_is_refused_with_the_reason_and_the_fix(cluster: Cluster) -> None:
    for policy in ("delete", "compact,delete"):
        topic = store_topic(cluster, config={"cleanup.policy": policy})
        store = KeyValueStore(topic)
        with pytest.raises(TopicMismatch, match=r"deletes what is old.*cleanup\.policy=compact.*compacted=True"):
            store.wait_ready()
        with pytest.raises(TopicMismatch):
            store.get("a")
        with pytest.raises(TopicMismatch):
            store.put("a", 1)
        store.close()
    assert size(topic) == 0


def test_a_topic_that_is_not_there_or_has_more_partitions_is_refused(cluster: Cluster) -> None:
    with pytest.raises(TopicMissing, match=r"test\.nowhere does not exist"):
        KeyValueStore(Topic(cluster, "test.nowhere", 1, int)).wait_ready()
    topic = store_topic(cluster, 4)
    with pytest.raises(TopicMismatch, match="has 4 partitions, not 2"):
        KeyValueStore(Topic(cluster, topic.name, 2, int)).wait_ready()


@pytest.mark.usefixtures("often")
def test_partitions_added_under_a_store_are_told(cluster: Cluster) -> None:
    topic = store_topic(cluster, 2)
    with KeyValueStore(topic) as store, KeyValueStore(topic) as reader:
        store.put("a", 1)
        admin(cluster).create_partitions([NewPartitions(topic.name, 3)])[topic.name].result(10)
        wait_until(lambda: cluster.topics()[topic.name] == 3, what="the third partition")

        def writes() -> None:
            for number in range(1000):  # until one belongs to the new partition, once the producer knows of it
                store.put(f"key {number}", number)
                time.sleep(0.01)

        more = r"was given more partitions, 3 instead of 2.*Write its entries to a topic of another name"
        with pytest.raises(TopicMismatch, match=more):
            writes()
        wait_until(lambda: not reader.ready, 10, "what a reader notices")
        with pytest.raises(TopicMismatch, match=more):
            reader.get("a")


def test_who_is_refused_at_once_does_not_ask_again_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def refuse(self: Cluster, name: str) -> dict[str, str]:
        asked.append(time.monotonic())
        raise ClusterUnreachable("not allowed to look")

    topic = store_topic(cluster, 1)
    monkeypatch.setattr(Cluster, "topic_config", refuse)
    store = KeyValueStore(topic)
    wait_until(lambda: len(asked) >= 2, 10, "a second question")
    with pytest.raises(StoreNotReady, match="not allowed to look"):
        store.wait_ready(0.4)
    store.close()
    assert len(asked) <= 50  # without a pause: thousands


@pytest.mark.usefixtures("often")
def test_a_topic_deleted_under_a_store_is_told(store: KeyValueStore[Any]) -> None:
    store.put("a", 1)
    store.topic.cluster.delete_topics([store.topic.name])

    def gone() -> bool:
        with suppress(TopicMissing):
            store.get("a")
            return False
        return True

    wait_until(gone, 10, "TopicMissing")


def test_a_topic_made_anew_under_a_store_is_another_one(store: KeyValueStore[Any]) -> None:
    store.put("a", 1)
    store.topic.cluster.delete_topics([store.topic.name])
    store.topic.create(COMPACTED)
    wait_until(lambda: not store.ready, 10, "what the store notices")
    with pytest.raises(TopicMissing):
        store.get("a")


def test_an_end_before_what_was_read_is_no_deletion(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """After kill -9 a broker may tell for a moment the end that the topic had some seconds before."""
    asked: list[float] = []

    def late(cluster: Cluster, topics: list[str]) -> dict[tuple[str, int], int]:
        asked.append(time.monotonic())
        return {(name, 0): 0 for name in topics}

    monkeypatch.setattr("labkit.patterns.key_value_store.follower.LOOK", 0.1)
    with KeyValueStore(store_topic(cluster, 1)) as store:
        store.put("a", 1)
        monkeypatch.setattr("labkit.patterns.key_value_store.follower.end_offsets", late)
        wait_until(lambda: len(asked) > 3, what="looks at the end")
        store.put("b", 2)
        assert store.snapshot() == {"a": 1, "b": 2}


def test_a_topic_that_is_not_listed_yet_is_asked_for_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    topic, asked, topics = store_topic(cluster, 1), [0], Cluster.topics

    def late(self: Cluster) -> dict[str, int]:
        asked[0] += 1
        return {} if asked[0] < 6 else topics(self)

    monkeypatch.setattr(Cluster, "topics", late)
    with KeyValueStore(topic) as store:
        store.put("a", 1)
        assert store["a"] == 1
    assert asked[0] >= 6


# -- committed records, keys and values that are none (26)


def test_aborted_records_never_show(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1)
    with KeyValueStore(topic) as store:
        store.put("a", 1)
        transaction(topic, ("a", 2), ("b", 2), end="abort")
        transaction(topic, ("c", 3), end="commit")
        wait_until(lambda: "c" in store, what="the committed record")
        assert store.snapshot() == {"a": 1, "c": 3}
    with KeyValueStore(topic) as again:
        assert again.snapshot() == {"a": 1, "c": 3}


def test_records_without_a_key_are_passed_over(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1)
    topic.create()
    # A broker refuses such records for a compacted topic; one that was compacted later may hold them.
    loose = Topic(cluster, f"{topic.name}-later", 1, Any)
    loose.create()
    raw(loose, (None, b"1"), (b"a", b"1"), (None, None))
    alter(loose, COMPACTED)
    with KeyValueStore(loose) as store:
        assert store.snapshot() == {"a": 1}


def test_a_write_that_the_broker_refuses_says_why(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1)
    alter(topic, {**COMPACTED, "max.message.bytes": "500"})
    with KeyValueStore(topic) as store:
        with pytest.raises(DeliveryFailed, match=r"'a' in store .* was refused: "):
            store.put("a", "x" * 2000)
        store.put("a", "x")  # and nothing else suffers
        store.topic.flush()
        assert store["a"] == "x"


def test_an_undecodable_entry_is_named_and_the_rest_works(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1, value=int)
    raw(topic, (b"good", b"1"), (b"bad", b"1"), (b"bad", b"{oops"), (b"\xff", b"3"))
    with KeyValueStore(topic) as store:
        seen: list[Any] = []
        store.subscribe(lambda *change: seen.append(change))
        assert store["good"] == 1
        for read in (lambda: store["bad"], lambda: store.get("bad", 7), lambda: "bad" in store):
            with pytest.raises(PoisonRecord, match=rf"{topic.name}/0/2 does not decode"):
                read()
        assert {key: one.offset for key, one in store.unreadable.items()} == {"bad": 2, "\ufffd": 3}
        assert list(store) == ["good"]
        raw(topic, (b"good", b"oops"), (b"other", b"5"))  # while it follows
        wait_until(lambda: store.get("other") == 5, what="what comes after the undecodable one")
        with pytest.raises(PoisonRecord, match=rf"{topic.name}/0/4"):
            store["good"]
        store.put("good", 2)
        store.put("bad", 3)
        assert store.snapshot() == {"good": 2, "bad": 3, "other": 5}
        # A subscriber is not told that it was deleted: nobody did.
        wait_until(lambda: seen[-1][0] == "bad", what="all changes")
        assert seen == [("good", None, 1), ("other", None, 5), ("good", 1, 2), ("bad", 1, 3)]


# -- reading one's own writes, never going back (27)


def test_a_read_after_put_sees_it_and_no_read_goes_back(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1)
    stop, seen = threading.Event(), [0]
    with KeyValueStore(topic) as store, KeyValueStore(topic) as other:
        store.put("n", 0)
        wait_until(lambda: "n" in other, what="the first value")

        def watch() -> None:
            while not stop.is_set():
                if (value := other["n"]) != seen[-1]:
                    seen.append(value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for number in range(1, 100):
            store.put("n", number)
            assert store["n"] == number
        wait_until(lambda: other["n"] == 99, what="the last value")
        stop.set()
        watcher.join()
    assert seen == sorted(set(seen))
    assert len(seen) > 10  # it did look while they changed


@pytest.mark.long
def test_no_read_goes_back_while_it_is_loaded_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second: nothing tells it that it has seen all."""
    monkeypatch.setattr(KeyValueStore, "_all_was_read", lambda store, seen: 0.0)
    topic = store_topic(cluster, 1, config={**COMPACTED, "delete.retention.ms": "1000"})
    stop = threading.Event()
    with KeyValueStore(topic) as store, KeyValueStore(topic) as other:
        store.put("n", 0)
        wait_until(lambda: "n" in other, what="the first value")
        loads, seen = other.loads, [0]

        def watch() -> None:
            while not stop.is_set():
                if (value := other["n"]) != seen[-1]:
                    seen.append(value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            number = 0
            while other.loads < loads + 3:
                number += 1
                store.put("n", number)
                assert store["n"] == number
        finally:
            stop.set()
            watcher.join()
    assert seen == sorted(set(seen))
    assert len(seen) > 10


def test_two_writers_of_one_key_agree_in_the_end(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1)
    with StoreProcess(topic, "left") as left, StoreProcess(topic, "right") as right:
        assert (left.entries(), right.entries()) == (0, 0)
        left.say("race", "key", 100)
        right.say("race", "key", 100)
        assert (left.hear(), right.hear()) == (None, None)
        *_, (_, _, last) = on_disk(topic)
        assert left.ask("wait", "key", last) == right.ask("wait", "key", last) == last
        left.ask("put", "from", "left")
        assert right.ask("wait", "from", "left") == "left"
        left.ask("delete", "from")
        assert right.ask("wait", "from", None) is None
        assert left.ask("items") == right.ask("items") == {"key": last}


def test_many_threads_may_write(store: KeyValueStore[Any]) -> None:
    def write(name: int) -> None:
        for number in range(20):
            store.put(f"{name}", number)
            assert store[f"{name}"] == number

    threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert store.snapshot() == {f"{name}": 19 for name in range(8)}


# -- subscribers


def test_a_late_subscriber_gets_the_whole_state_and_then_changes(store: KeyValueStore[Any]) -> None:
    store.update({"a": 1, "b": 2, "c": 3})
    store.delete("c")
    store.put("a", 10)
    seen: list[Any] = []
    with store.subscribe(lambda *change: seen.append(change)) as subscription:
        wait_until(lambda: len(seen) == 2, what="the whole state")
        assert sorted(seen) == [("a", None, 10), ("b", None, 2)]
        store.put("b", 20)
        store.delete("a")
        store.put("d", 4)
        wait_until(lambda: len(seen) == 5, what="the changes")
        assert sorted(seen[2:]) == [("a", 10, None), ("b", 2, 20), ("d", None, 4)]
        assert subscription.behind == 0
    store.put("e", 5)
    assert all(key != "e" for key, _, _ in seen)
    assert subscription.behind == 0  # nothing is kept for one who is gone
    store.subscribe(print).close()
    store.subscribe(print).close()
    assert len(store._subscriptions) == 1


def test_one_that_subscribes_before_it_is_loaded_is_told_too(cluster: Cluster) -> None:
    topic = store_topic(cluster)
    with KeyValueStore(topic) as store:
        store.put("a", 1)
    seen: list[Any] = []
    again = KeyValueStore(topic)
    again.subscribe(lambda *change: seen.append(change))
    again.wait_ready()
    wait_until(lambda: seen == [("a", None, 1)], what="the whole state")
    again.close()


def test_a_subscriber_that_raises_is_told_the_next_change(
    store: KeyValueStore[Any], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    def callback(key: str, old: Any, new: Any) -> None:
        if new == "bad":
            raise ValueError("what a subscriber may do")
        seen.append((key, old, new))

    store.subscribe(callback)
    store.put("a", "bad")
    wait_until(lambda: "what a subscriber may do" in caplog.text, what="the failure")
    store.put("a", "good")
    wait_until(lambda: seen == [("a", "bad", "good")], what="the next change")


@pytest.mark.parametrize("error", [Untellable, Untraceable])
def test_a_subscriber_whose_error_cannot_be_told_is_told_the_next_change(
    store: KeyValueStore[Any], error: type[Exception]
) -> None:
    """correctness 36: its thread ended, without a word."""
    seen: list[Any] = []

    def callback(key: str, old: Any, new: Any) -> None:
        if new == "bad":
            raise error
        seen.append(new)

    subscription = store.subscribe(callback)
    store.put("a", "bad")
    wait_until(lambda: subscription.behind == 0, what="the failure")
    store.put("a", "good")
    wait_until(lambda: seen == ["good"], what="the next change")


def test_a_subscriber_that_blocks_holds_up_nobody_and_is_told_the_newest(store: KeyValueStore[Any]) -> None:
    told: list[Any] = []
    others: list[Any] = []
    reached, go_on = threading.Event(), threading.Event()

    def slow(*change: Any) -> None:
        told.append(change)
        reached.set()
        go_on.wait(20)

    subscription = store.subscribe(slow)
    store.subscribe(lambda *change: others.append(change))
    store.put("a", 0)
    assert reached.wait(10)
    for number in range(1, 50):
        store.put("a", number)
        assert store["a"] == number
    store.put("b", 1)
    store.delete("b")
    wait_until(lambda: len(others) >= 3 and others[-1] == ("b", 1, None), what="the other subscriber")
    assert subscription.behind == 3  # the one it is at, and two keys, however often they changed
    go_on.set()
    wait_until(lambda: subscription.behind == 0, what="the rest")
    assert told == [("a", None, 0), ("a", 0, 49)]  # b came and went meanwhile


def test_a_subscriber_may_write_to_the_same_store(store: KeyValueStore[Any]) -> None:
    def count_down(key: str, old: Any, new: Any) -> None:
        if new:
            store.put(key, new - 1)

    subscription = store.subscribe(count_down)
    store.put("n", 5)
    wait_until(lambda: store.get("n") == 0 and subscription.behind == 0, what="the countdown")


# -- closing, travelling


def test_a_store_closed_under_its_readers_says_so(cluster: Cluster) -> None:
    topic = store_topic(cluster)
    store = KeyValueStore(topic).wait_ready()
    store.put("a", 1)
    ended: list[Exception] = []

    def read() -> None:
        try:
            while True:
                assert store["a"] == 1
        except StoreClosed as error:
            ended.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    store.close()
    for reader in readers:
        reader.join(5)
    assert len(ended) == 4
    for use in (lambda: store.put("a", 2), lambda: store.subscribe(print), lambda: len(store), store.wait_ready):
        with pytest.raises(StoreClosed, match=f"{topic.short} is closed"):
            use()
    store.close()


def test_closing_lets_nobody_wait(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1)
    opened = transaction(topic, ("b", 2), end="open")
    store = KeyValueStore(topic)
    told: list[Exception] = []

    def waiting(wait: Any) -> None:
        try:
            wait()
        except LabkitError as error:
            told.append(error)

    waits = [lambda: store.wait_ready(30), lambda: store.put("a", 1, timeout=30)]
    threads = [threading.Thread(target=waiting, args=(wait,)) for wait in waits]
    for thread in threads:
        thread.start()
    wait_until(lambda: size(topic) >= 2, what="the write")
    store.close()
    for thread in threads:
        thread.join(5)
    assert [type(error) for error in told] == [StoreClosed, StoreClosed]
    opened.abort_transaction(20)


def test_it_travels_as_the_coordinates_of_its_topic(store: KeyValueStore[Any]) -> None:
    store.put("a", 1)
    for copy in (pickle.loads(pickle.dumps(store)), unpack(pack(lambda: store))()):
        assert copy is not store
        assert copy.wait_ready().snapshot() == {"a": 1}
        copy.close()


# -- Kafka goes away; compaction


@pytest.mark.long
def test_writes_while_the_broker_is_down_are_bounded_and_the_state_is_true_after() -> None:
    with PrivateBroker() as broker:
        topic = store_topic(broker.cluster, 1)
        with KeyValueStore(topic) as store:
            store.put("a", 1)
            broker.kill()
            began = time.monotonic()
            with pytest.raises(DeliveryFailed, match=r"'a' in store .* not confirmed within 1 s: is the broker up\?"):
                store.put("a", 2, timeout=1)
            assert time.monotonic() - began > 0.9
            assert store["a"] == 1  # what is not confirmed does not show
            late = KeyValueStore(topic)  # one that is made meanwhile becomes ready by itself
            with pytest.raises(StoreNotReady):
                late.wait_ready(0.5)
            broker.restart()
            store.put("b", 3, timeout=30)
            # What was given up may have come through: either way all agree, now and after a restart.
            truth = {key: value for _, key, value in on_disk(topic)}
            wait_until(lambda: store.snapshot() == truth, what="the same as the topic")
            assert late.wait_ready(30).snapshot() == truth
            late.close()
        with KeyValueStore(topic) as again:
            assert again.snapshot() == truth


@pytest.mark.long  # below, a frozen process goes through one
def test_kept_through_compaction_and_deleted_for_good(cluster: Cluster) -> None:
    topic = store_topic(cluster, 1, config=EAGER)
    with KeyValueStore(topic) as store:
        for number in range(20):
            store.put("a", number)
        store.put("gone", 1)
        store.delete("gone")
        compact(topic, lambda: not any(key == "gone" or (key, value) == ("a", 18) for _, key, value in on_disk(topic)))
        assert len(on_disk(topic)) < size(topic)
        assert store["a"] == 19
        assert "gone" not in store
    with KeyValueStore(topic) as again:
        assert again["a"] == 19
        assert "gone" not in again


class Prompt(PrivateBroker):
    """One that looks twice a second for what is too old, instead of every five minutes."""

    def _make(self) -> None:
        often = "log.initial.task.delay.ms=500\nlog.retention.check.interval.ms=500\n"
        self._kafka = prepare()
        self._broker = Broker.create(self.folder, self._kafka, extra=often)


def test_the_latest_value_outlives_any_retention() -> None:
    with Prompt() as broker:
        short = {"retention.ms": "1000"}
        kept = store_topic(broker.cluster, 1, config={**EAGER, **short})
        twin = store_topic(broker.cluster, 1, config={**EAGER, **short, "cleanup.policy": "delete"})
        with KeyValueStore(kept) as store:
            store.put("rate", 19)
        for number in range(2):  # a second time: then the other topic was looked at too since its value is too old
            raw(twin, (b"rate", b"19"))
            gone = {(twin.name, 0): number + 1}
            wait_until(lambda gone=gone: start_offsets(twin.cluster, [twin.name]) == gone, 30, "the deletion")
        assert on_disk(twin) == []
        assert on_disk(kept) == [(0, "rate", 19)]
        with KeyValueStore(kept) as store:
            assert store.snapshot() == {"rate": 19}


def test_a_process_frozen_through_a_compaction_forgets_what_was_deleted(cluster: Cluster) -> None:
    """The tombstone comes and goes while it is frozen: it never gets to see it, and must notice by itself."""
    topic = store_topic(cluster, 1, config=EAGER)
    with StoreProcess(topic) as frozen, KeyValueStore(topic) as store:
        assert frozen.entries() == 0
        store.put("gone", 1)
        assert frozen.ask("wait", "gone", 1) == 1
        frozen.freeze()
        store.put("first", 1)  # what answers the request that it has sent already: the tombstone must not
        store.delete("gone")
        store.put("stays", 2)
        compact(topic, lambda: not any(key == "gone" for _, key, _ in on_disk(topic)))
        frozen.thaw()
        assert frozen.ask("wait", "gone", None) is None
        assert frozen.ask("wait", "stays", 2) == 2
        assert frozen.ask("loads", 2) >= 2


@pytest.mark.long
def test_a_million_entries(cluster: Cluster) -> None:
    topic = store_topic(cluster, 4, value=int)
    count = 1_000_000
    raw(topic, *((b"key %d" % number, b"%d" % number) for number in range(count)), partition=-1)
    with KeyValueStore(topic) as store:
        assert len(store) == count
        assert all(store[f"key {number}"] == number for number in range(0, count, 997))
        store.put("key 5", -5)
        assert store["key 5"] == -5
    cluster.delete_topics([topic.name])
