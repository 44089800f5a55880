"""What a consumer commits, and when."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import Producer as Client
from consuming import Member, committed, fresh_group, fresh_topic, put
from processes import wait_until

import labkit.kafka.consumer.loop as module
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.assignment import Assignment
from labkit.kafka.consumer.lanes import Partition
from labkit.kafka.consumer.steps import Step
from labkit.kafka.lag import end_offsets, lag
from labkit.kafka.records import Record
from labkit.kafka.topics import Topic


def test_a_stop_commits_only_what_was_handled(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 1, 5: records that are queued behind the running one stay uncommitted."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    handled: list[int] = []
    released: list[Partition] = []
    release = Assignment.release

    def told(assignment: Assignment, partitions: list[Partition]) -> None:
        released.extend(partitions)
        release(assignment, partitions)

    monkeypatch.setattr(Assignment, "release", told)

    def handle(record: Record[int]) -> None:
        if record.value == 2:
            wait_until(lambda: released and not released[0].active, what="the loop to notice the stop")
        handled.append(record.value)

    with Member(Consumer(topic, handle, group)) as member:
        member.journal.wait_for(Step.HANDLING, 3)
        member.stopping.set()
    assert handled == [0, 1, 2]
    assert committed(topic, group) == {0: 3}
    assert member.journal.assigned() == set()


def test_commits_are_confirmed(cluster: Cluster) -> None:
    """correctness 1: what the broker stored is told, and a commit follows the records at once."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    with Member(Consumer(topic, lambda record: None, group)) as member:
        member.journal.wait(lambda: {(topic.name, 0): 10} in member.journal.of(Step.COMMITTED))
        assert committed(topic, group) == {0: 10}


@pytest.mark.long
def test_commits_go_on_while_handlers_send_without_a_pause(cluster: Cluster) -> None:
    """correctness 1, 10: a commit waits for what was sent before it, not for a moment in which nothing is sent."""
    topic, group, output = fresh_topic(cluster, 16), fresh_group(), fresh_topic(cluster)
    for partition in range(16):
        put(topic, *range(1000), partition=partition)

    def handle(record: Record[int]) -> None:
        output.send(record.value)
        time.sleep(0.003)  # the work

    with Member(Consumer(topic, handle, group)) as member:
        member.journal.wait_for(Step.COMMITTED, 6)  # of about 20; chance brings 1 to 3, the one at the end included


def transactions(topic: Topic[Any], *batches: tuple[bool, list[int]]) -> None:
    """Write each batch in a transaction of its own, and commit (True) or abort it."""
    writer = Client(topic.cluster.config({"transactional.id": fresh_group()}))
    writer.init_transactions(10)
    for commits, values in batches:
        writer.begin_transaction()
        for value in values:
            writer.produce(topic.name, str(value).encode())
        writer.flush(10)
        (writer.commit_transaction if commits else writer.abort_transaction)(10)


def test_committed_offsets_pass_the_markers_of_transactions(cluster: Cluster) -> None:
    """correctness 7: the end past the last marker, so lag is zero; aborted records are not seen."""
    topic, group = fresh_topic(cluster), fresh_group()
    transactions(topic, (True, [1, 2]), (False, [3, 4, 5]), (True, [6]))
    end = 9  # six records, three markers
    wait_until(lambda: end_offsets(cluster, [topic.name])[topic.name, 0] == end)
    with Member(Consumer(topic, lambda record: None, group)) as member:
        member.wait_committed({0: end})
        transactions(topic, (False, [7]))
        member.wait_committed({0: end + 2})
    assert [record.value for record in member.journal.of(Step.HANDLED)] == [1, 2, 6]
    assert lag(cluster, group, [topic.name]) == {(topic.name, 0): 0}


@pytest.mark.long
def test_markers_that_came_while_nobody_was_there_are_passed(cluster: Cluster) -> None:
    """correctness 7: the end is told once, perhaps in the very call that brings the assignment."""
    topic, group = fresh_topic(cluster, 8), fresh_group()
    consumer = Consumer(topic, lambda record: None, group)
    for partition in range(8):
        put(topic, 1, partition=partition)
    with Member(consumer) as member:
        member.wait_committed(dict.fromkeys(range(8), 1))
    writer = Client(topic.cluster.config({"transactional.id": fresh_group()}))
    writer.init_transactions(10)
    writer.begin_transaction()
    for partition in range(8):
        writer.produce(topic.name, b"2", partition=partition)
    writer.flush(10)
    writer.abort_transaction(10)
    with Member(consumer) as member:
        member.wait_committed(dict.fromkeys(range(8), 3))


def test_a_commit_that_is_refused_goes_with_the_next(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 1: even if no further record comes."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)
    refused: list[int] = []

    class Refusing(module.Client):
        def commit(self, *args: Any, **options: Any) -> Any:
            if options.get("asynchronous", True) and len(refused) < 3:
                refused.append(1)
                raise KafkaException(KafkaError(KafkaError._STATE))
            return super().commit(*args, **options)

    monkeypatch.setattr(module, "Client", Refusing)
    with Member(Consumer(topic, lambda record: None, group)) as member:
        member.wait_committed({0: 1})
    assert len(refused) == 3


def test_a_handler_that_hangs_keeps_neither_the_consumer_nor_the_process(cluster: Cluster) -> None:
    """correctness 5: a stop lets go of it after the drain; its thread is a daemon."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, 1)
    script = (
        "import sys, threading\n"
        "from labkit.kafka.cluster import Cluster\n"
        "from labkit.kafka.consumer import Consumer\n"
        "from labkit.kafka.topics import Topic\n"
        "stop = threading.Event()\n"
        "def handle(record):\n"
        "    stop.set()\n"
        "    threading.Event().wait()\n"
        "topic = Topic(Cluster(sys.argv[1]), sys.argv[2], 1, int)\n"
        "Consumer(topic, handle, sys.argv[3], drain=0.2).run(stop)\n"
    )
    command = [sys.executable, "-c", script, cluster.bootstrap, topic.name, group]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    assert committed(topic, group) == {}
