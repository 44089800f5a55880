"""Deployments: pods kept running, replaced, scaled, drained; and what is said when their handlers do wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab_helpers import Order, Shipped, ordered, orders, said, values, wait_ready, wait_running, wait_said
from processes import is_alive, wait_until

from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import end_offsets
from labkit.kafka.producer import Producer
from labkit.kafka.records import Record
from labkit.lab.pods.deployment import Deployment
from labkit.lab.pods.pod import PodState
from labkit.lab.pods.travel import CannotTravel
from labkit.patterns.retries import RetryingConsumer, retry_topics
from labkit.runtime.which_kafka import Connection

pytestmark = pytest.mark.usefixtures("connection")


@pytest.fixture
def lab(connection: Connection) -> Iterator[Lab]:
    lab = Lab("deployments")
    yield lab
    lab._end(0)  # `close` would wait for the sessions of killed pods


@pytest.mark.long
def test_pods_are_ready_once_they_share_all_partitions(lab: Lab) -> None:
    """Before that a rebalance is to follow, and what is in hand then may come again."""
    topic = lab.topic("orders", 4, Order)
    shop = lab.deploy("shop", Consumer(topic, print), replicas=2)
    idle = lab.deploy("idle", Consumer(lab.topic("one", 1, Order), print), replicas=2)
    lab.wait_ready(shop, idle)
    assert sorted(len(pod.report.assigned) for pod in shop.pods if pod.report) == [2, 2]
    assert sorted(len(pod.report.assigned) for pod in idle.pods if pod.report) == [0, 1]
    lab.deployments["shop"].scale(3)
    lab.wait_ready(shop)
    assert sorted(len(pod.report.assigned) for pod in shop.pods if pod.report) == [1, 1, 2]
    ones = [lab.topic("first", 1, Order), lab.topic("second", 1, Order)]  # shared out over both topics together
    both = lab.deploy("both", Consumer(ones, print), replicas=2)
    lab.wait_ready(both)
    assert [len(pod.report.assigned) for pod in both.pods if pod.report] == [1, 1]
    left, right = (lab.deploy(name, Consumer(topic, print, "one-group")) for name in ("left", "right"))
    lab.wait_ready(left, right)
    assert [len(one.pods[0].report.assigned) for one in (left, right) if one.pods[0].report] == [2, 2]
    shop.pods[0].kill()
    crashed = time.monotonic()
    wait_running(shop)
    was_ready = shop.ready()
    # The session of the one that died holds its partitions: 6 s, if the machine was so quick.
    assert not was_ready or time.monotonic() - crashed > 5
    lab.wait_ready(shop)


@pytest.mark.long
def test_more_pods_than_partitions_are_ready_exactly_once_too(lab: Lab) -> None:
    """There the same numbers of several topics go to one member: the other one of two has nothing to do."""
    ones = [lab.topic("first", 1, Order), lab.topic("second", 1, Order)]
    both = lab.deploy("both", Consumer(ones, print, guarantee="exactly once"), replicas=2)
    lab.wait_ready(both)
    assert sorted(len(pod.report.assigned) for pod in both.pods if pod.report) == [0, 2]


@pytest.mark.long
def test_a_crashed_pod_comes_back_under_its_name(lab: Lab) -> None:
    topic = lab.topic("orders", 2, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None), replicas=2)
    wait_ready(shop)
    before = [pod.child.pid for pod in shop.pods if pod.child]
    shop.pods[0].kill()
    wait_until(lambda: not is_alive(before[0]), 2, "the end of the pod")
    wait_running(shop)
    assert [pod.name for pod in shop.pods] == ["shop-0", "shop-1"]
    assert [pod.restarts for pod in shop.pods] == [1, 0]
    assert shop.restarts == 1
    assert shop.pods[0].child
    assert shop.pods[0].child.pid != before[0]
    assert shop.pods[1].child
    assert shop.pods[1].child.pid == before[1]
    assert said(shop, "killed by SIGKILL; starts again in 0.1 s", "shop-0")
    assert [fault.kind for fault in ordered(lab)] == ["kill"]


@pytest.mark.long
def test_a_pod_that_keeps_dying_is_started_ever_less_often(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.lab.pods.pod.STABLE", 1000.0)  # however long a start takes here, it is no recovery
    topic = lab.topic("orders", 1, Order)
    lab.load(topic, orders(1), rate=1000).wait()

    def leave(record: object) -> None:
        sys.exit(3)

    shop = lab.deploy("shop", Consumer(topic, leave))
    wait_until(lambda: shop.restarts >= 3, 30, "three restarts")
    waits = [line.text.rpartition("in ")[2] for line in shop.log if "starts again" in line.text]
    assert waits[:3] == ["0.1 s", "0.2 s", "0.4 s"]
    assert said(shop, "HandlerExit: the handler ended the process (SystemExit(3)) on ", "shop-0")
    assert "1 records behind" in (lab.unsettled() or "")
    assert ordered(lab)[0].kind == "death"


@pytest.mark.long
def test_a_pod_that_ends_by_itself_without_an_error_is_a_fault(lab: Lab) -> None:
    """Else what it had in hand and comes again would have no explanation."""
    topic = lab.topic("orders", 1, Order)
    lab.load(topic, orders(1), rate=1000).wait()
    shop = lab.deploy("shop", Consumer(topic, lambda record: os._exit(0)))
    wait_said(shop, "ended with exit code 0")
    assert ordered(lab)[0].kind == "death"


@pytest.mark.long  # test_fault_command.py breaks and mends one
def test_each_fault_of_a_pod_and_its_end(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None))
    pod = shop.pods[0]
    assert pod.state is PodState.STARTING
    with pytest.raises(LabkitError, match="cannot freeze shop-0: it is starting: wait until it runs"):
        pod.freeze()
    wait_ready(shop)
    assert pod.recover() == "nothing to mend: shop-0 is running"
    pod.freeze()
    pod.freeze()
    assert pod.state is PodState.FROZEN
    with pytest.raises(LabkitError, match="cannot restart shop-0: it is frozen: recover it first"):
        pod.restart()
    lab.load(topic, orders(10), rate=1000).wait()
    assert pod.handled == 0
    assert pod.recover() == "shop-0 goes on"
    wait_until(lambda: pod.handled == 10, 15, "what it does after the freeze")
    for wrong in (-1, 0, float("nan"), float("inf"), "1", True):
        with pytest.raises(LabkitError, match="by must be a positive number, not"):
            pod.slow(wrong)  # type: ignore[arg-type]
    pod.slow(0.05)
    pod.slow(0.02)
    assert pod.state is PodState.SLOW
    assert pod.recover() == "shop-0 is slow no more"
    assert pod.state is PodState.RUNNING
    pod.restart()
    with pytest.raises(LabkitError, match="cannot restart shop-0: it is draining: wait"):
        pod.restart()
    wait_said(shop, "drained; starts again", "shop-0")
    wait_ready(shop)
    pod.kill()
    pod.kill()  # or a cell could not run twice
    wait_until(lambda: pod.child is None, 20, "its end")
    assert pod.recover() in ("shop-0 is started again", "nothing to mend: shop-0 is starting")
    wait_running(shop)
    kinds = [(fault.kind, fault.end is None) for fault in ordered(lab)]
    assert kinds == [(kind, False) for kind in ("freeze", "slow", "slow", "restart", "kill")]


@pytest.mark.long
def test_a_pod_that_keeps_dying_is_started_at_once_when_it_recovers(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.lab.pods.pod.FIRST_RESTART", 300.0)
    monkeypatch.setattr("labkit.lab.pods.pod.LONGEST_RESTART", 300.0)
    shop = lab.deploy("shop", Consumer(lab.topic("orders", 1, Order), print))
    wait_ready(shop)
    shop.pods[0].kill()
    wait_said(shop, "starts again in 300 s", "shop-0")
    assert shop.pods[0].recover() == "shop-0 is started again"
    wait_running(shop)


@pytest.mark.long
def test_a_slow_pod_holds_up_each_record(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None))
    wait_ready(shop)
    shop.pods[0].slow(0.05)
    begun = time.monotonic()
    lab.load(topic, orders(20), rate=1000).wait()
    assert lab.settle(30)
    assert time.monotonic() - begun > 20 * 0.05


@pytest.mark.long
def test_a_slow_pod_with_a_batch_in_hand_drains_at_once(lab: Lab) -> None:
    """Its hundred records would be held up for a minute and more, and it would be killed for not draining."""
    topic = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda batch: None, batch=100))
    wait_ready(shop)
    shop.pods[0].slow(0.9)
    lab.load(topic, orders(100), rate=1000).wait()
    wait_until(lambda: shop.pods[0].handled > 0, 60, "its first batch")
    shop.pods[0].restart()
    wait_said(shop, "drained; starts again", "shop-0")
    assert lab.settle(30)


@pytest.mark.long
def test_scaling_up_and_down_under_load_loses_and_doubles_nothing(lab: Lab) -> None:
    source, target = lab.topic("orders", 4, Order), lab.topic("shipped", 4, Shipped)

    def ship(record: Record[Order]) -> None:
        time.sleep(0.002)
        target.send(Shipped(record.value.id), key=record.key)

    shop = lab.deploy("shop", Consumer(source, ship), replicas=1)
    wait_ready(shop)
    load = lab.load(source, orders(1500), rate=250)
    for step, replicas in enumerate((3, 1, 4, 2), 1):
        wait_until(lambda step=step: load.count >= 250 * step, 20, "more load")  # type: ignore[misc]
        shop.scale(replicas)
        wait_ready(shop)
        assert len(shop.pods) == replicas
    shop.pods[0].restart()
    load.wait()
    verdict = lab.verdict(load, target)
    assert verdict.check().startswith("1,500 sent · 1,500 took effect · lost 0")
    # In the middle of a rebalance a drain may not get its last commit through; whatever comes again has its reason.
    assert {extra.fault.kind for extra in verdict.of("redelivered") if extra.fault} <= {"scale", "drain"}
    assert len(verdict.found) == len(verdict.of("redelivered"))
    wait_until(lambda: all(fault.end is not None for fault in lab.faults), 15, "the last pod to leave")


@pytest.mark.long
def test_deploying_a_name_again_drains_and_replaces(lab: Lab) -> None:
    source, target = lab.topic("orders", 2, Order), lab.topic("shipped", 2, dict)
    version = "old"

    def ship(record: Record[Order]) -> None:
        target.send({"id": record.value.id, "by": version}, key=record.key)

    old = lab.deploy("shop", Consumer(source, ship), replicas=2)
    wait_ready(old)  # or one may have done it all before the other has its share
    load = lab.load(source, orders(600), rate=150)
    # Both at work, and what they have is committed: a drain in the middle of a rebalance may do records twice.
    wait_until(lambda: min(pod.handled for pod in old.pods) > 30, 20, "the old one at work")
    version = "new"
    new = lab.deploy("shop", Consumer(source, ship), replicas=1)
    assert lab.deployments["shop"] is new
    load.wait()
    late = lab.load(source, orders(10, 600), rate=1000)  # if the old one was through with all before it left
    late.wait()
    verdict = lab.verdict([load, late], target)
    assert verdict.check().startswith("610 sent · 610 took effect · lost 0")
    assert verdict.found == []
    assert {value["by"] for value in values(target)} == {"old", "new"}
    assert old.pods == []
    assert [(fault.kind, fault.end is None) for fault in ordered(lab)] == [("redeploy", False)]


@pytest.mark.long
def test_deploying_with_another_policy_leaves_nothing_waiting(lab: Lab) -> None:
    """What waits in the retry topics of the policy before is work to do, and is done when it was to be."""
    source, target = lab.topic("orders", 2, Order), lab.topic("shipped", 2, Shipped)

    def refuse(record: Record[Order]) -> None:
        raise ConnectionError("not now")

    def ship(record: Record[Order]) -> None:
        target.send(Shipped(record.value.id), key=record.key)

    shop = lab.deploy("shop", RetryingConsumer(source, refuse, retry=retry_topics(8)))
    load = lab.load(source, orders(20), rate=1000)
    load.wait()
    retries = [topic.name for topic in shop.topics if "_retry1-8s" in topic.name]
    wait_until(lambda: sum(end_offsets(lab.cluster, retries).values()) == 20, 20, "all refused once")
    shop = lab.deploy("shop", RetryingConsumer(source, ship, retry=retry_topics(0.5)))
    assert list(lab.retry_console(shop)._retry_topics) == ["in 0.5 s", "in 8s, before"]
    assert lab.settle(30), lab.settle(0)
    assert sorted(value.id for value in values(target)) == list(range(20))
    assert lab.verdict(load, target, timeout=0).check().startswith("20 sent · 20 took effect · lost 0")


def test_when_a_deployment_is_replaced_the_one_before_has_left(lab: Lab) -> None:
    """Or a service of its port would answer the first question in the old way, and the second in the new."""
    topic = lab.topic("orders", 1, Order)
    old = lab.deploy("shop", Consumer(topic, lambda record: None), replicas=2)
    wait_until(lambda: all(pod.child for pod in old.pods), 20, "two pods")
    pids = [pod.child.pid for pod in old.pods if pod.child]
    lab.deploy("shop", Consumer(topic, lambda record: None))
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.long
def test_one_that_cannot_be_deployed_leaves_what_ran(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None))
    wait_ready(shop)
    with pytest.raises(CannotTravel):
        lab.deploy("shop", Consumer(topic, lambda record: lab.close()))
    assert lab.deployments["shop"] is shop
    assert shop.ready()


@pytest.mark.long
def test_a_replacement_that_was_interrupted_is_made_good_by_the_next(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell was stopped while the one before was leaving: it has left, and nothing is in its place."""
    topic = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None))
    wait_ready(shop)

    def interrupted(self: Deployment) -> None:
        self.scale_down()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Deployment, "drain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lab.deploy("shop", Consumer(topic, lambda record: None))
    assert not shop.ready()
    with pytest.raises(LabkitError, match="deploy it again"):
        shop.scale(1)
    again = lab.deploy("shop", Consumer(topic, lambda record: None))
    wait_ready(again)
    assert shop.pods == []
    assert all(fault.end is not None for fault in lab.faults)


@pytest.mark.long
def test_deploying_one_name_from_many_threads_leaves_one(lab: Lab) -> None:
    """A cell, and what `lab.when` does."""
    topic = lab.topic("orders", 1, Order)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: lab.deploy("shop", Consumer(topic, lambda record: None)), range(4)))
    assert lab.deployments["shop"] in made
    wait_ready(lab.deployments["shop"])
    assert sum(len(one.pods) for one in made) == 1
    assert sum(pod.child is not None for one in made for pod in one.pods) == 1


def test_a_handler_that_raises_is_shown_with_its_traceback(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)

    def fail(record: object) -> None:
        print("working on it")
        raise ValueError("the card was refused")

    shop = lab.deploy("shop", Consumer(topic, fail))
    lab.load(topic, orders(3), rate=1000).wait()
    wait_until(lambda: shop.waiting, 20, "a record in a back-off")
    settled = lab.settle(1)
    assert not settled
    assert "1 record of shop in a back-off: orders/0/0" in repr(settled)
    assert "ValueError: the card was refused" in settled.reason
    assert said(shop, "working on it", "shop-0")
    assert said(shop, "ValueError: the card was refused", "shop-0")
    assert said(shop, "in fail", "shop-0")  # a line of the traceback
    history = lab.history()
    assert history.query("metric == 'lag'")["value"].iloc[-1] == 3
    verdict = lab.verdict([], topic, timeout=0.5)
    assert verdict.result == "unknown"
    assert "orders/0/0" in (verdict.reason or "")
    assert shop.restarts == 0


@pytest.mark.long
def test_an_edited_handler_takes_effect_and_the_record_is_done(lab: Lab) -> None:
    source, target = lab.topic("orders", 1, Order), lab.topic("shipped", 1, Shipped)

    def broken(record: object) -> None:
        raise KeyError("typo")

    def mended(record: Record[Order]) -> None:
        target.send(Shipped(record.value.id))

    load = lab.load(source, orders(3), rate=1000)
    shop = lab.deploy("shop", Consumer(source, broken))
    wait_until(lambda: shop.waiting, 20, "a record in a back-off")
    lab.deploy("shop", Consumer(source, mended))
    assert lab.verdict(load, target).check().startswith("3 sent · 3 took effect · lost 0")


@pytest.mark.long
def test_a_handler_past_its_deadline_is_in_the_log_with_its_stack(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)

    def hang(record: object) -> None:
        time.sleep(600)

    lab.load(topic, orders(1), rate=1000).wait()
    shop = lab.deploy("shop", Consumer(topic, hang, deadline=0.5))
    wait_said(shop, "ended: a handler overran its deadline; starts again", "shop-0")
    assert said(shop, "orders/0/0 has run for more than its deadline of 0.5 s", "shop-0")
    assert said(shop, "in hang", "shop-0")


@pytest.mark.long
def test_a_poison_record_is_shown_with_its_place(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    sender = Producer(lab.cluster)
    sender.send(topic.name, b"not json")
    sender.flush()
    shop = lab.deploy("shop", Consumer(topic, lambda record: None))
    wait_until(lambda: shop.waiting, 20, "the poison record in a back-off")
    settled = lab.settle(0.5)
    assert "orders/0/0" in settled.reason
    assert "does not decode" in settled.reason
    assert said(shop, "orders/0/0 does not decode", "shop-0")


@pytest.mark.long
def test_a_topic_deleted_under_a_deployment_is_named(lab: Lab) -> None:
    topic = lab.topic("orders", 2, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None))
    wait_ready(shop)
    lab.cluster.delete_topics([topic.name])
    wait_said(shop, f"TopicMissing: topic {topic.name} was deleted", "shop-0")
    wait_said(shop, f"TopicMissing: topic orders ({topic.name}) does not exist", "shop-0")
    settled = lab.settle(0.5)
    assert "shop consumes orders, which does not exist (any more)" in settled.reason
    before = len(lab.history())
    wait_until(lambda: len(lab.history()) > before, 20, "the sampler to go on")
    lab.cluster.create_topic(topic.name, 2)


@pytest.mark.long
def test_a_topic_that_does_not_exist_is_named(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    lab.cluster.delete_topics([topic.name])
    shop = lab.deploy("shop", Consumer(topic, lambda record: None))
    wait_said(shop, f"topic orders ({topic.name}) does not exist at {lab.cluster.bootstrap}: create it first", "shop-0")


def test_what_cannot_be_deployed(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    consumer = Consumer(topic, lambda record: None)
    for replicas in (-1, 65, 1.5, True, "2"):
        with pytest.raises(LabkitError, match="replicas must be a number from 0 to 64"):
            lab.deploy("shop", consumer, replicas=replicas)  # type: ignore[arg-type]
    for name in ("Shop", "", "a.b", "x" * 41, "shop_1"):
        with pytest.raises(LabkitError, match="cannot be a name: use lower-case letters, digits and '-'"):
            lab.deploy(name, consumer)
    with pytest.raises(LabkitError, match="cannot be deployed: give a Consumer"):
        lab.deploy("shop", lambda record: None)  # type: ignore[arg-type]
    assert lab.deployments == {}
    shop = lab.deploy("shop", consumer, replicas=0)
    with pytest.raises(LabkitError, match="from 0 to 64"):
        shop.scale(100)
    load = lab.load(topic, orders(1))
    board = lab.board(lag=shop)
    for variable, kind in ((lab, "Lab"), (shop, "Deployment"), (load, "Load"), (board, "Board")):

        def handler(record: object, thing: object = None, variable: object = variable) -> None:
            print(variable)

        with pytest.raises(CannotTravel, match=rf"the variable 'variable' \(a {kind}\) cannot travel"):
            lab.deploy("other", Consumer(topic, handler))
    assert lab.deployments == {"shop": shop}


def test_lag_without_pods_says_so(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    lab.load(topic, orders(2), rate=1000).wait()
    lab.deploy("shop", Consumer(topic, lambda record: None), replicas=0)
    assert lab.settle(0.5).reason.endswith("shop is 2 records behind and has no pods: scale it up, or deploy it again")


@pytest.mark.long
def test_a_pod_that_will_not_drain_is_killed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.lab.pods.pod.GRACE", 0.5)
    topic = lab.topic("orders", 1, Order)

    def deaf(record: object) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        print("in hand")
        time.sleep(600)

    lab.load(topic, orders(1), rate=1000).wait()
    shop = lab.deploy("shop", Consumer(topic, deaf, drain=60))
    wait_said(shop, "in hand")
    shop.scale(0)
    wait_said(shop, "has not drained within 0.5 s and is killed", "shop-0")
    wait_until(lambda: not shop._retired, 5, "the pod's end")
    wait_until(lambda: not lab._history.standing(), 5, "the end of every fault")


@pytest.mark.long
def test_a_drain_that_ends_in_a_kill_is_over(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.lab.pods.pod.GRACE", 0.5)
    topic = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: time.sleep(600), drain=60))
    lab.load(topic, orders(1), rate=1000).wait()
    wait_ready(shop)
    wait_until(lambda: shop.pods[0].report and shop.pods[0].report.assigned, 10, "its partition")
    os.kill(shop.pods[0].child.pid, signal.SIGSTOP)  # type: ignore[union-attr]  # it will not hear
    shop.pods[0].restart()
    wait_said(shop, "has not drained within 0.5 s and is killed", "shop-0")
    wait_until(lambda: shop.restarts == 1, 5, "the restart")
    assert lab._history.standing() == []


@pytest.mark.long
def test_a_pod_waits_until_the_one_of_its_name_is_gone(lab: Lab) -> None:
    topic = lab.topic("orders", 2, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None), replicas=2)
    wait_ready(shop)
    retired = shop.pods[1]
    assert retired.child
    pid = retired.child.pid
    os.kill(pid, signal.SIGSTOP)  # so that it takes its time to drain
    shop.scale(1)
    shop.scale(3)
    wait_until(lambda: shop.pods[2].child, 20, "a pod that waits for nobody")
    assert shop.pods[1].child is None
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: shop.pods[1].child, 20, "the new pod")
    assert not is_alive(pid)
    wait_ready(shop)
    wait_until(lambda: not lab._history.standing(), 5, "the end of every fault")


@pytest.mark.long
def test_deployments_pods_topics_and_loads_show_themselves(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)
    shop = lab.deploy("shop", Consumer(topic, lambda record: None), replicas=0)
    assert repr(shop) == "Deployment shop (no pods)"
    shop.scale(1)
    wait_ready(shop)
    wait_until(lambda: shop.pods[0].partitions == "orders/0", 20, "its partition")
    assert repr(shop.pods[0]) == "shop-0: running, orders/0"
    assert repr(shop) == "Deployment shop (shop-0: running, orders/0)"
    assert "<td>shop-0</td><td>running</td><td>0</td>" in shop._repr_html_()
    assert repr(topic) == "Topic(orders, 1 partition of Order)"
    assert repr(lab.broker) == "Kafka is running"
    assert repr(lab.when(lambda: False, shop.pods[0].kill)) == "planned (kill) waits for its condition"
    load = lab.load(topic, orders(1))
    load.wait()
    assert repr(load) == "Load: 1 sent to orders, done"


@pytest.mark.long
def test_a_handler_cannot_read_the_pods_orders(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)

    def ask(record: object) -> None:
        print(f"read {sys.stdin.read()!r}")

    shop = lab.deploy("shop", Consumer(topic, ask))
    lab.load(topic, orders(1)).wait()
    wait_said(shop, "read ''")
    assert lab.settle(10)


@pytest.mark.long
def test_what_a_handler_leaves_behind_does_not_hold_up_a_restart(lab: Lab) -> None:
    topic = lab.topic("orders", 1, Order)

    def start(record: object) -> None:
        import subprocess

        grandchild = subprocess.Popen(["sleep", "20"], start_new_session=True)
        print(f"started {grandchild.pid}.")
        os._exit(1)

    shop = lab.deploy("shop", Consumer(topic, start))
    lab.load(topic, orders(1)).wait()
    wait_until(lambda: shop.restarts >= 2, 60, "two restarts")
    for line in shop.log:
        if line.text.startswith("started "):
            os.kill(int(line.text[8:-1]), signal.SIGKILL)


@pytest.mark.long
def test_what_a_drain_cuts_off_has_sent_nothing(lab: Lab, tmp_path: Path) -> None:
    """The same pod does it again, long after the drain began."""
    source, target = lab.topic("orders", 1, Order), lab.topic("shipped", 1, Shipped)
    begun, draining = tmp_path / "begun", tmp_path / "draining"

    def ship(record: Record[Order]) -> None:
        first = not begun.exists()
        begun.touch()
        while not draining.exists():
            time.sleep(0.01)
        target.send(Shipped(record.value.id))
        time.sleep(60 if first else 0)

    load = lab.load(source, orders(1))
    shop = lab.deploy("shop", Consumer(source, ship, drain=3))
    wait_until(begun.exists, 20, "the handler at work")
    wait_ready(shop)  # the lab may hear of the pod later than its handler begins
    shop.pods[0].restart()
    draining.touch()
    verdict = lab.verdict(load, target)
    verdict.check()
    assert not verdict.of("redelivered")
