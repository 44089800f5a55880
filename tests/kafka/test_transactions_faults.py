"""Exactly once under faults: aborts, lost answers, two in one slot, frozen and killed members, a broker that cannot."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaException
from consuming import Member, Process, committed, crash_points, fresh_group, fresh_topic, members_of, put
from lab_helpers import Order, Shipped, orders
from processes import wait_until
from transacting import Sending, exactly_once, values, visible

import labkit.kafka.consumer.loop as loop_module
import labkit.kafka.consumer.transactional_client as client_module
import labkit.kafka.consumer.transactions as transactions_module
from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.consumer.transactions import State
from labkit.kafka.errors import LabkitError
from labkit.kafka.records import Record
from labkit.runtime.broker import Broker, prepare
from labkit.runtime.child import Child
from labkit.runtime.private_broker import PrivateBroker
from labkit.runtime.which_kafka import Connection


def test_after_an_abort_all_goes_with_the_next_transaction(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """correctness 20, 21: the broker refuses offsets of an earlier generation; no handler runs again."""
    topic, output, group = fresh_topic(cluster, 2), fresh_topic(cluster), fresh_group()
    send, kept, stale = Sending(output), list[Any](), list[int]()

    class Late(loop_module.Client):  # type: ignore[name-defined,misc]
        def consumer_group_metadata(self) -> Any:
            kept.append(super().consumer_group_metadata())
            if len(stale) < 2 and second:
                stale.append(1)
                return kept[0]
            return kept[-1]

    second: list[Member] = []
    put(topic, *range(10), partition=0)
    put(topic, *range(10, 20), partition=1)
    monkeypatch.setattr(loop_module, "Client", Late)
    with Member(exactly_once(topic, send, group)) as member:
        member.wait_committed({0: 10, 1: 10})
        monkeypatch.undo()
        with Member(exactly_once(topic, send, group, slot="two")) as other:
            other.journal.wait(lambda: len(other.journal.assigned()) == 1, what="its share")
            member.journal.wait(lambda: len(member.journal.assigned()) == 1, what="its share")
            second.append(other)
            put(topic, *range(20, 30), partition=0)
            put(topic, *range(30, 40), partition=1)
            member.wait_committed({0: 20, 1: 20})
    assert len(stale) == 2
    assert capfd.readouterr().err.count("aborted") >= 2
    counts = member.journal.of(Step.MEASURED)[-1].counts
    assert (counts["transactions aborted"], counts["transactions committed"] >= 2) == (2, True)
    assert sorted(values(output)) == list(range(40))
    assert set(send.calls.values()) == {1}


def test_what_a_revoke_could_not_commit_in_time_is_never_committed_later(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 21: an abort took all the time there was; an open transaction would go out when others have these."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    left = list[State]()

    class Silent(client_module.TransactionalClient):
        def send_offsets(self, *asked: Any) -> None:
            time.sleep(0.3)  # the silence itself: longer than a revoke waits here
            raise client_module.MustAbort("no answer")

    class Watched(transactions_module.ExactlyOnce):
        def settle(self, positions: dict[Any, int]) -> None:
            super().settle(positions)
            left.append(self.state)

    monkeypatch.setattr(transactions_module, "REACH", 0.2)
    monkeypatch.setattr(transactions_module, "TransactionalClient", Silent)
    monkeypatch.setattr(loop_module, "ExactlyOnce", Watched)
    put(topic, 1)
    with Member(exactly_once(topic, Sending(output), group, drain=0.1)) as member:
        member.journal.wait_for(Step.HANDLED)
    assert State.OPEN not in left
    assert left
    assert committed(topic, group) == {}


def test_a_commit_without_an_answer_is_asked_for_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """correctness 21, 39: it may be done already; the same call, until it is answered."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    send, unanswered = Sending(output), list[bool]()

    class Hasty(client_module.Client):  # type: ignore[name-defined,misc]
        def commit_transaction(self, timeout: float = -1) -> None:
            try:
                super().commit_transaction(timeout if len(unanswered) >= 5 else 0.0001)
            except KafkaException as error:
                unanswered.append(error.args[0].retriable())
                raise

    monkeypatch.setattr(client_module, "Client", Hasty)
    put(topic, *range(100))
    with Member(exactly_once(topic, send, group)) as member:
        member.wait_committed({0: 100})
    assert set(unanswered) <= {True}  # on a busy machine the answer may be there before anybody looks at the clock
    assert values(output) == list(range(100))
    assert set(send.calls.values()) == {1}


def test_of_two_in_one_slot_the_older_one_ends(cluster: Cluster) -> None:
    """correctness 21: it says why, also when it has nothing to commit, and has committed nothing since."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    send = Sending(output)
    put(topic, *range(10))
    older = Member(exactly_once(topic, send, group))
    older.__enter__()
    older.wait_committed({0: 10})
    with Member(exactly_once(topic, send, group)) as newer:
        newer.journal.wait_for(Step.ASSIGNED)
        error = older.ends()
        put(topic, *range(10, 20))
        newer.wait_committed({0: 20})
    assert isinstance(error, LabkitError)
    assert "slot one" in str(error)
    assert values(output) == list(range(20))


CALLS = [
    *("init_transactions", "begin_transaction", "send_offsets_to_transaction"),
    *("commit_transaction", "abort_transaction"),
]


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=() if call == "commit_transaction" else pytest.mark.long) for call in CALLS]
)
def test_a_call_that_never_comes_back_ends_the_process(cluster: Cluster, call: str) -> None:
    """correctness 21: librdkafka can lose one. Its successor goes on."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    script = (
        "import sys, threading\n"
        "import labkit.kafka.consumer.transactional_client as module\n"
        "from confluent_kafka import KafkaError, KafkaException\n"
        "from labkit.kafka.cluster import Cluster\n"
        "from labkit.kafka.consumer import Consumer\n"
        "from labkit.kafka.topics import Topic\n"
        "class Lost(module.Client):\n"
        "    pass\n"
        "def fail(*_):\n"
        "    raise KafkaException(KafkaError(KafkaError._FAIL, 'to be aborted', txn_requires_abort=True))\n"
        "if sys.argv[5] == 'abort_transaction':\n"
        "    Lost.send_offsets_to_transaction = fail\n"
        "setattr(Lost, sys.argv[5], lambda *_: threading.Event().wait())\n"
        "module.Client, module.NO_ANSWER = Lost, 0.5\n"
        "topic, output = (Topic(Cluster(sys.argv[1]), name, 1, int) for name in sys.argv[2:4])\n"
        "send = lambda record: output.send(record.value)\n"
        "Consumer(topic, send, sys.argv[4], guarantee='exactly once', slot='one').run(threading.Event())\n"
    )
    command = [sys.executable, "-c", script, cluster.bootstrap, topic.name, output.name, group, call]
    assert subprocess.run(command, timeout=60, check=False).returncode == client_module.EXIT_NO_ANSWER
    with Member(exactly_once(topic, Sending(output), group)) as member:
        member.wait_committed({0: 10})
    assert values(output) == list(range(10))


# -- crash points: (step, what happens to the process there)

STEPS = [Step.HANDLING, Step.HANDLED, Step.COMMITTING, Step.OFFSETS_SENT, Step.FLUSHED, Step.COMMITTED]
FIRST = {(Step.FLUSHED, "kill"), (Step.FLUSHED, "freeze")}


@pytest.mark.parametrize(("step", "how"), crash_points(STEPS, FIRST))
def test_a_process_that_is_killed_or_frozen_at_a_step_loses_and_doubles_nothing(
    cluster: Cluster, step: Step, how: str
) -> None:
    """correctness 19, 21, 22: its successor in the slot goes on at once; one that wakes up again is fenced."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    options = {"output": output.name, "slot": "one", "crash_at": step.value, "crash_how": how}
    with Process(topic, group, **options) as process:
        process.wait_for(step)
        if how == "kill":
            assert process.ends() == -9
        send = Sending(output)
        with Member(exactly_once(topic, send, group)) as member:
            put(topic, 10)
            member.wait_committed({0: 11})
        if how == "freeze":
            process.thaw()
            assert process.ends() == 1
            assert "slot one" in process.stderr
    assert values(output) == list(range(11))


@pytest.mark.long
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_dead_letters_of_a_process_that_ends_in_its_transaction_are_there_once(cluster: Cluster, how: str) -> None:
    """correctness 39: letter and offset are one."""
    topic, aside, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(10))
    options = {"aside": aside.name, "slot": "one", "crash_at": Step.FLUSHED.value, "crash_how": how}
    with Process(topic, group, **options) as process:
        process.wait_for(Step.FLUSHED)
        assert values(aside, committed=False)
        assert visible(aside) == 0
        with Process(topic, group, aside=aside.name, slot="one"):
            wait_until(lambda: committed(topic, group) == {0: 10}, 20, "all to be set aside")
        if how == "freeze":
            process.thaw()
            assert process.ends() == 1
    assert values(aside) == list(range(10))


def test_a_dead_letter_from_mid_batch_is_there_once_after_a_kill_right_behind_its_transaction(cluster: Cluster) -> None:
    """correctness 39: its offset went with it."""
    topic, output, aside, group = (*(fresh_topic(cluster) for _ in range(3)), fresh_group())
    put(topic, *range(7), b"poison", *range(8, 20))
    options = {"output": output.name, "aside": aside.name, "slot": "one", "batch": 10}
    with Process(topic, group, crash_at=Step.COMMITTED.value, crash_past=7, **options) as process:
        assert process.ends() == -9
    assert committed(topic, group)[0] > 7
    assert values(aside) == [7]
    with Process(topic, group, **options):
        wait_until(lambda: committed(topic, group) == {0: 20}, 30, "all to be committed")
    assert values(aside) == [7]
    assert values(output) == [*range(7), *range(8, 20)]


@pytest.mark.long
def test_a_process_frozen_for_longer_than_its_session_is_fenced_when_it_wakes(cluster: Cluster) -> None:
    """correctness 22: its partitions went to another slot, and its transaction was aborted meanwhile."""
    topic, output, group = fresh_topic(cluster, 2), fresh_topic(cluster), fresh_group()
    put(topic, *range(10), partition=0)
    put(topic, *range(10, 20), partition=1)
    options = {"output": output.name, "slot": "one", "crash_at": Step.FLUSHED.value, "crash_how": "freeze"}
    with Process(topic, group, **options) as process:
        process.wait_for(Step.FLUSHED)
        with Member(exactly_once(topic, Sending(output), group, slot="two")) as member:
            member.wait_committed({0: 10, 1: 10}, 40)
            process.thaw()
            assert process.ends(30) == 1
    assert sorted(values(output)) == list(range(20))


@pytest.mark.long
def test_a_slot_that_is_killed_in_a_rebalance_leaves_no_partition_to_nobody(cluster: Cluster) -> None:
    """Killed when it has given up its partitions, and started again: each has an owner, and is read."""
    topic, output, group = fresh_topic(cluster, 4), fresh_topic(cluster), fresh_group()
    options = {"output": output.name, "partitions": 4}
    with Process(topic, group, slot="one", crash_at=Step.REVOKED.value, **options) as first:
        first.wait_for(Step.ASSIGNED)
        with Process(topic, group, slot="two", **options):
            assert first.ends() == -9
            with Process(topic, group, slot="one", **options):
                wait_until(lambda: members_of(cluster, group) == 2, 20, "a stable group")
                for partition in range(4):
                    put(topic, partition, partition=partition)
                wait_until(lambda: committed(topic, group) == dict.fromkeys(range(4), 1), 30, "all to be read")
    assert sorted(values(output)) == list(range(4))


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.value)
def test_a_broker_that_is_killed_at_a_step_loses_and_doubles_nothing(step: Step) -> None:
    """correctness 21: the consumer goes on, or it ends and its successor does."""
    with PrivateBroker() as broker:
        topic, output, group = fresh_topic(broker.cluster), fresh_topic(broker.cluster), fresh_group()
        put(topic, *range(100))
        killed: list[int] = []

        def told(now: Step, subject: Any) -> None:
            if now is step and not killed:
                killed.append(1)
                broker.kill()

        member = Member(exactly_once(topic, Sending(output), group, on_step=told))
        member.__enter__()
        member.journal.wait(lambda: killed, what="the kill")
        broker.restart()

        def done() -> bool:
            nonlocal member
            if not member.thread.is_alive():
                member = Member(exactly_once(topic, Sending(output), group))
                member.__enter__()
            return committed(topic, group) == {0: 100}

        wait_until(done, 90, "all to be committed")
        member.stopping.set()
        member.ends(40)
        assert sorted(values(output)) == list(range(100))


@pytest.mark.long
def test_a_broker_that_can_keep_no_transaction_log_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the setting, not by waiting for ever. (Of one broker Kafka 4 demands no second in-sync replica.)"""
    monkeypatch.setattr(client_module, "CALL", 1.0)
    kafka, folder = prepare(), tmp_path / "broker"
    broker = Broker.create(folder, kafka, extra="transaction.state.log.replication.factor=3\n")
    with Child(kafka.command(folder), cwd=folder, output=broker.log) as child:
        broker.wait_until_ready(lambda: child.poll() is None)
        topic = fresh_topic(broker.cluster)
        member = Member(exactly_once(topic, print, fresh_group()))
        member.__enter__()
        error = member.ends(30)
    assert isinstance(error, LabkitError)
    assert "transaction.state.log.replication.factor" in str(error)


@pytest.mark.long
def test_pods_that_are_scaled_and_killed_under_load_double_nothing(connection: Connection) -> None:
    """correctness 19, 21: 1 → 3 → 2 pods, with their names for slots: each order is shipped once."""
    lab = Lab("slots")
    try:
        source, shipped = lab.topic("orders", 4, Order), lab.topic("shipped", 2, Shipped)

        def ship(record: Record[Order]) -> None:
            shipped.send(Shipped(record.value.id), key=record.key)

        pods = lab.deploy("shop", Consumer(source, ship, guarantee="exactly once"))
        load = lab.load(source, orders(600), rate=150)
        wait_until(lambda: load.count >= 50, what="some orders")
        pods.scale(3)
        wait_until(lambda: load.count >= 200, what="more orders")
        pods.pods[0].kill()
        wait_until(lambda: load.count >= 350, what="still more orders")
        pods.scale(2)
        load.wait(30)
        assert lab.settle(60)
        assert sorted(one.id for one in values(shipped)) == list(range(600))
    finally:
        lab._end(0)
