"""The broker is away: frozen for a while, or killed and started again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from consuming import Member, fresh_group, fresh_topic, put
from processes import wait_until

import labkit.kafka.consumer.workers as workers
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import SetAside, keep_trying
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.kafka.lag import lag
from labkit.kafka.reader import Reader
from labkit.kafka.records import Record
from labkit.runtime import shared_broker


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A broker of these tests' own: killed, the session's takes ever longer to recover all that tests left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_STATE", str(tmp_path_factory.mktemp("own")))
        with shared_broker.shared_broker() as lease:
            yield lease.cluster
            lease.stop()


def broker() -> int:
    """The broker's process id."""
    found = shared_broker.status()
    assert found is not None
    assert found.pid > 1  # a signal to 0 would go to this process too
    return found.pid


@contextmanager
def frozen_broker() -> Iterator[None]:
    """No request is answered, no connection refused."""
    pid = broker()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def is_back(cluster: Cluster) -> bool:
    try:
        return bool(cluster.describe(1.0))
    except LabkitError:
        return False


@pytest.mark.long  # test_blocked_lanes.py has one that is refused
def test_what_is_set_aside_while_the_broker_is_away_blocks_its_lane_and_is_there_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 10, 17: the lane is seen to wait, nothing is sent again, and nothing is committed before."""
    topic, aside, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    monkeypatch.setattr(workers, "CONFIRM", 0.2)
    put(topic, 0, 1)
    frozen, failing = threading.Event(), threading.Event()

    def handle(record: Record[int]) -> None:
        failing.set()
        frozen.wait(20)
        raise ValueError("no")

    decide = lambda failed: SetAside(aside.name, None, failed.message.value())  # noqa: E731
    with Member(Consumer(topic, handle, group, on_failure=decide)) as member:
        assert failing.wait(20)
        with frozen_broker():
            frozen.set()
            blocked = member.journal.wait_for(Step.BLOCKED, 3)[0]
            assert "not confirmed" in str(blocked.refused)
            assert len(member.journal.of(Step.FAILED)) == 1
        member.wait_committed({0: 2})
    with Reader(aside) as reader:
        assert [record.value for record in reader.read_to_end()] == [0, 1]


@pytest.mark.long
def test_ten_seconds_without_a_broker(cluster: Cluster) -> None:
    """correctness 2, 7, 10: handlers, back-offs and sends go on; nothing is lost; the member is still there."""
    topic, output, group = fresh_topic(cluster, 2), fresh_topic(cluster), fresh_group()
    for partition in (0, 1):
        put(topic, *range(100), partition=partition)
    frozen, failed = threading.Event(), Counter[int]()

    def handle(record: Record[int]) -> None:
        if record.value == 50:
            if record.partition == 0:
                frozen.wait(20)
            else:
                failed[record.partition] += 1
                if not back.is_set():
                    raise ValueError("not while the broker is away")
        output.send(record.partition * 1000 + record.value)

    back = threading.Event()
    with Member(Consumer(topic, handle, group, on_failure=keep_trying(0.1, 0.5))) as member:
        member.journal.wait_for(Step.FAILED)
        with frozen_broker():
            frozen.set()
            tried, until = failed[1], time.monotonic() + 10
            member.journal.wait(lambda: failed[1] > tried + 5)
            member.journal.wait(lambda: len([r for r in member.journal.of(Step.HANDLED) if r.partition == 0]) == 100)
            assert not member.stopping.wait(max(0.0, until - time.monotonic()))  # ten seconds are what is tested
        back.set()
        member.wait_committed({0: 100, 1: 100}, 30)
        put(topic, 100, partition=0)
        member.wait_committed({0: 101, 1: 100})
    with Reader(output) as reader:
        assert {r.value for r in reader.read_to_end()} == {*range(101), *range(1000, 1100)}


@pytest.mark.long
@pytest.mark.parametrize("sending", [pytest.param(False, marks=pytest.mark.long), True], ids=["plain", "sending"])
def test_a_stop_without_a_broker_is_bounded(cluster: Cluster, sending: bool) -> None:
    """correctness 5: it drains, gives up on the commit, and lets go; nothing is lost."""
    topic, output, group = fresh_topic(cluster), fresh_topic(cluster), fresh_group()
    put(topic, *range(5))
    frozen = threading.Event()

    def handle(record: Record[int]) -> None:
        if record.value == 3:
            frozen.wait(30)
        if sending:
            output.send(record.value)

    with Member(Consumer(topic, handle, group, drain=1.0)) as member:
        member.wait_committed({0: 3})
        with frozen_broker():
            frozen.set()
            member.journal.wait_for(Step.HANDLED, 5)
            member.stop(40)  # 17 s at most: the drain, what is sent, the commit, the client's own end
    wait_until(lambda: is_back(cluster), 20)
    with Member(Consumer(topic, lambda record: None, group)) as member:
        ((_, _, start),) = member.journal.wait_for(Step.ASSIGNED)[0]
        assert start in (3, 4, 5)  # a commit that the frozen broker had not read yet may count
        member.wait_committed({0: 5})
        assert [record.value for record in member.journal.of(Step.HANDLED)] == list(range(start, 5))


@pytest.mark.long
def test_offsets_can_be_asked_for_while_the_broker_goes_and_comes(cluster: Cluster) -> None:
    """Questions are repeated until a killed broker is back; librdkafka's admin client must not be the one who asks for
    offsets: it ends the whole process when a coordinator that is starting answers."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(5))
    with Member(Consumer(topic, lambda record: None, group)) as member:
        member.wait_committed({0: 5})
    answers: list[dict[tuple[str, int], int]] = []
    errors: list[LabkitError] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                answers.append(lag(cluster, group, [topic.name]))
            except LabkitError as error:  # one question is given up after 10 s: a slow machine's broker may take longer
                if not isinstance(error, ClusterUnreachable) or time.monotonic() - began < 9:
                    errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_until(lambda: answers)
        for sign in (signal.SIGSTOP, signal.SIGKILL):
            os.kill(broker(), sign)
            before = len(answers)
            if sign == signal.SIGSTOP:
                over.wait(2)  # longer than the broker's own session
                os.kill(broker(), signal.SIGCONT)
            wait_until(lambda: len(answers) > before + 20, 90, "answers again")  # noqa: B023
    finally:
        over.set()
        asking.join(60)
    assert all(answer == {(topic.name, 0): 0} for answer in answers)
    assert not errors


@pytest.mark.long  # test_runtime_broker.py kills one, and notebooks 02 and 03
def test_a_broker_that_is_killed_loses_no_record(cluster: Cluster) -> None:
    """correctness 31: the member finds it again, without a restart of its own."""
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in (0, 1):
        put(topic, *range(200), partition=partition)
    handled: Counter[tuple[int, int]] = Counter()

    def handle(record: Record[int]) -> None:
        time.sleep(0.01)  # the work
        handled[record.partition, record.value] += 1

    with Member(Consumer(topic, handle, group)) as member:
        member.journal.wait_for(Step.COMMITTED, 2)
        os.kill(broker(), signal.SIGKILL)
        member.wait_committed({0: 200, 1: 200}, 40)
    assert set(handled) == {(partition, value) for partition in (0, 1) for value in range(200)}
