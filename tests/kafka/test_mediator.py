"""The mediator: each order ends completed or compensated, each effect is there once, nothing is awaited for ever."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from consuming import Member, Process, crash_points, fresh_group, fresh_topic
from mediating import LONG, STEPS, Ledger, Orders, Service, process
from processes import wait_until
from stores import raw, store_topic

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError, TopicMismatch, TopicMissing
from labkit.kafka.reader import Reader
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.mediator import Mediator
from labkit.patterns.mediator_states import ProcessState, StepCommand, StepReply
from labkit.patterns.retries import blocking
from labkit.runtime.which_kafka import Connection


@contextmanager
def running(orders: Orders, *steps: str) -> Iterator[Orders]:
    """Its mediator runs, and all of its processors, or these."""
    with ExitStack() as stack:
        stack.enter_context(orders.processors(*steps))
        stack.enter_context(Member(orders.consumer()))
        yield orders


@pytest.fixture(scope="module")
def shop(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orders]:
    """Everything runs, and nothing is late. Each test has orders of its own."""
    with running(Orders(cluster, tmp_path_factory.mktemp("shop"), partitions=3)) as orders:
        yield orders


@pytest.fixture(scope="module")
def hasty(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orders]:
    """The same where an answer is waited for half a second, and asked for twice."""
    with running(Orders(cluster, tmp_path_factory.mktemp("hasty"), asks=2, timeout=0.5)) as orders:
        yield orders


def letters_of(letters: DeadLetters) -> list[str]:
    """Whose letters there are: the ids of the replies."""
    return sorted(str(one.key) for one in letters.values())


# -- the way of an order


def test_an_order_goes_through_all_steps(shop: Orders) -> None:
    """Commands and replies find their way, whatever the partition; where an order stands is a local read."""
    ids = {f"a{number}" for number in range(6)}
    with shop.mediator.states() as states:
        shop.place(*ids)
        wait_until(lambda: ids <= states.keys() and all(states[one].over for one in ids), what="the end of all")
        assert list(states["a3"].done) == list(STEPS)
        assert str(states["a3"]) == "completed: done charge, reserve, ship"
    shop.check(ids, of="a")


def test_when_a_step_fails_for_good_what_was_done_is_undone_in_reverse(shop: Orders) -> None:
    """The first step too: then there is nothing to undo."""
    shop.services["ship"].refuses |= {"b2"}
    shop.services["charge"].refuses |= {"b3"}
    shop.place("b1", "b2", "b3")
    shop.wait(b1="completed", b2="compensated", b3="compensated")
    shop.check({"b1"}, {"b2": {"charge", "reserve"}, "b3": set()}, of="b")
    assert shop.states()["b2"].plan == ("reserve", "charge")
    assert [step for step, what, _ in shop.ledger.effects("b2") if what == "undone"] == ["reserve", "charge"]
    assert str(shop.states()["b2"]).endswith(
        "(ship failed: not this one): done charge, reserve; undone reserve, charge"
    )


def test_what_comes_late_or_again_is_counted_and_changes_nothing(shop: Orders) -> None:
    shop.services["ship"].refuses |= {"c2"}
    shop.place("c1", "c2")
    shop.wait(c1="completed", c2="compensated")
    before = shop.states()
    for one in ("c1", "c2"):
        for number, asked in enumerate(before[one].questions, 1):
            assert asked.answer is not None
            shop.reply(StepReply(one, asked.step, asked.action, number, asked.answer), shop.partition_of(one))
    shop.place("c1", "c2")
    wait_until(lambda: sum(shop.states()[one].ignored for one in ("c1", "c2")) == 3 + 5 + 2, what="all to be counted")
    for one in ("c1", "c2"):
        assert shop.states()[one].questions == before[one].questions
        assert shop.states()[one].status == before[one].status
    shop.check({"c1"}, {"c2": {"charge", "reserve"}}, of="c")


def test_a_reply_that_fits_no_question_is_a_dead_letter(shop: Orders) -> None:
    """Of an unknown order, the wrong processor, another number, an answer to something else, or in another partition
    than its order's state."""
    shop.place("d1")
    shop.wait(d1="completed")
    here = shop.partition_of("d1")
    shop.reply(StepReply("d0", "charge", "do", 1, "done"))
    shop.reply(StepReply("d1", "ship", "do", 1, "done"), here)
    shop.reply(StepReply("d1", "charge", "do", 9, "done"), here)
    shop.reply(StepReply("d1", "charge", "do", 0, "done"), here)
    shop.reply(StepReply("d1", "charge", "do", 1, "undone"), here)
    shop.reply(StepReply("d1", "charge", "do", 1, "done"), (here + 1) % 3)
    raw(shop.mediator.replies, (b"d1", b'{"id": "d1"}'), (b"d1", b"no JSON"), (b"d1", None), partition=here)
    with shop.mediator.dead_letters() as letters:
        wait_until(lambda: letters_of(letters) == ["d0"] + ["d1"] * 8, what="nine letters")
    shop.check({"d1"}, of="d")
    assert shop.states()["d1"].ignored == 0


def test_an_initial_event_that_begins_nothing_is_a_dead_letter(shop: Orders) -> None:
    """Without a key, of another type, none, or another one under an id that is there. The next one begins."""
    shop.place("e1")
    shop.wait(e1="completed")
    here = shop.partition_of("e1")
    with DeadLetters(shop.mediator.initial, shop.mediator.group) as letters:
        before = len(letters)
        bad: list[tuple[bytes | None, bytes | None]] = [
            *((None, b'{"cents": 1}'), (b"", b'{"cents": 1}'), (b"e2", b'{"cents": "1"}'), (b"e3", b"no JSON")),
            *((b"e4", None), (b"e1", b'{"cents": 2}')),
        ]
        raw(shop.mediator.initial, *bad, partition=here)
        shop.place("e5")
        wait_until(lambda: len(letters) - before == len(bad), what="letters")
    shop.wait(e5="completed")
    shop.check({"e1", "e5"}, of="e")


# -- a timeout proves nothing


def test_a_step_that_times_out_and_was_done_after_all_goes_on(hasty: Orders) -> None:
    """correctness 42: it is asked to cancel, and says that it is done."""
    hasty.services["reserve"].hold("do", "f1", lambda: hasty.states()["f1"].status == "cancelling")
    hasty.place("f1")
    hasty.wait(f1="completed")
    asked = [(one.step, one.action) for one in hasty.states()["f1"].questions]
    assert ("reserve", "cancel") in asked
    hasty.check({"f1"}, of="f1")


def test_a_step_that_was_not_done_is_cancelled_and_a_late_replay_has_no_effect(hasty: Orders) -> None:
    """correctness 42: its command is given up, and nobody answers. What was done before it is undone."""
    hasty.services["reserve"].fails |= {("do", "g1"): ConnectionError("no answer")}
    hasty.place("g1")
    hasty.wait(g1="compensated")
    hasty.check(set(), {"g1": {"charge"}}, of="g1")
    assert "cancelled" in hasty.states()["g1"].reason
    del hasty.services["reserve"].fails["do", "g1"]
    with DeadLetters(hasty.commands["reserve"], hasty.commands["reserve"].name) as letters:
        assert letters_of(letters) == ["g1"]
        letters.replay()
        wait_until(lambda: not letters, what="the letter to go")
    wait_until(lambda: hasty.states()["g1"].ignored, what="its reply")
    hasty.check(set(), {"g1": {"charge"}}, of="g1")


def test_who_does_not_know_is_asked_again(hasty: Orders) -> None:
    """correctness 42: "unknown" decides nothing."""
    charge, answers = hasty.services["charge"], iter(["unknown"])
    charge.fails |= {("do", "h1"): ConnectionError("no answer"), ("cancel", "h1"): lambda: next(answers, None)}
    hasty.place("h1")
    hasty.wait(h1="compensated")
    assert [one.answer for one in hasty.states()["h1"].questions][-2:] == ["unknown", "cancelled"]
    hasty.check(set(), {"h1": set()}, of="h1")


def test_without_an_answer_that_decides_a_person_is_needed_who_has_it_asked_again(hasty: Orders) -> None:
    """correctness 42: nothing is undone as long as nobody knows. A replayed letter asks once more."""
    charge = hasty.services["charge"]
    charge.fails |= {("do", "i1"): ConnectionError("no answer"), ("cancel", "i1"): lambda: "unknown"}
    hasty.place("i1")
    hasty.wait(i1="needs a person")
    assert hasty.states()["i1"].times_asked == 2
    with hasty.mediator.dead_letters() as letters:
        wait_until(lambda: letters_of(letters) == ["i1"], what="a letter")
        (letter,) = letters.values()
        assert letter.at == letter.failed[0] == letter.timestamp + 0.5  # when the timeout was due
        del charge.fails["do", "i1"], charge.fails["cancel", "i1"]
        letters.replay()
        hasty.wait(i1="compensated")
        wait_until(lambda: not letters, what="the letter to go")
    assert hasty.states()["i1"].trouble == ""
    hasty.check(set(), {"i1": set()}, of="i1")


def test_a_compensation_that_fails_for_good_needs_a_person(hasty: Orders) -> None:
    """Its dead letter, replayed, has it asked again, and the plan goes on."""
    charge, reserve = hasty.services["charge"], hasty.services["reserve"]
    hasty.services["ship"].refuses |= {"j1"}
    reserve.refuses_to_undo |= {"j1"}
    hasty.place("j1")
    hasty.wait(j1="needs a person")
    assert "reserve" in hasty.states()["j1"].trouble
    assert not charge.calls["undo", "j1"]
    with hasty.mediator.dead_letters() as letters:
        wait_until(lambda: letters_of(letters) == ["j1"], what="a letter")
        reserve.refuses_to_undo -= {"j1"}
        letters.replay()
        hasty.wait(j1="compensated")
        wait_until(lambda: not letters, what="the letter to go")
    hasty.check(set(), {"j1": {"charge", "reserve"}}, of="j1")
    assert "ship failed" in hasty.states()["j1"].reason


def test_a_compensation_that_is_asked_twice_is_done_once(hasty: Orders) -> None:
    """Its processor is slow, and answers both."""
    hasty.services["ship"].refuses |= {"k1"}
    hasty.services["reserve"].hold("undo", "k1", lambda: hasty.states()["k1"].times_asked == 2)
    hasty.place("k1")
    hasty.wait(k1="compensated")
    wait_until(lambda: hasty.services["reserve"].calls["undo", "k1"] == 2, what="both calls")
    hasty.check(set(), {"k1": {"charge", "reserve"}}, of="k1")


@pytest.mark.long
def test_a_processor_that_is_away_for_long_is_waited_for(hasty: Orders) -> None:
    """An answer to the last question decides, also when a person was called meanwhile."""
    back = threading.Event()
    hasty.services["ship"].hold("do", "l1", back.is_set)
    hasty.place("l1")
    hasty.wait(l1="needs a person")
    back.set()
    hasty.wait(l1="completed")
    with hasty.mediator.dead_letters() as letters:
        letters.replay()
        wait_until(lambda: not letters, what="the letter to go")
    hasty.check({"l1"}, of="l1")


def test_what_no_further_attempt_would_mend_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    """A command that its processor cannot serve is a dead letter at once. An error that the policy names as
    non_retriable is a failure for good: of `do`, the order is compensated; of `undo`, a person is needed."""
    orders = Orders(cluster, tmp_path, retry=blocking(LONG, non_retriable=[ValueError]))
    charge, reserve = orders.commands["charge"], orders.services["reserve"]
    reserve.fails |= {("do", name): ValueError("no such item") for name in ("v1", "w2")}
    orders.services["charge"].fails |= {("undo", "w2"): ValueError("no such account")}
    for step, action, value in (("ship", "do", {"cents": 1}), ("charge", "do", {"cents": "1"}), ("charge", "do", None)):
        charge.send(StepCommand("v0", step, action, 1, value, 0), key="v0")
    charge.flush()
    with running(orders):
        orders.place("v1", "w2", "v3")
        orders.wait(v1="compensated", w2="needs a person", v3="completed")
        with DeadLetters(charge, charge.name) as letters:
            assert letters_of(letters) == ["v0"] * 3
    assert "reserve failed: ValueError: no such item" in orders.states()["v1"].reason
    orders.check({"v3"}, {"v1": {"charge"}}, of="v")
    assert orders.ledger.effects("w2") == [("charge", "done", "w2")]


# -- killed, frozen, fenced


PATIENCE = 80.0  # seconds for a process to get somewhere: what it needs is a second or two
STEPS_OF_A_TRANSACTION = [Step.HANDLED, Step.COMMITTING, Step.OFFSETS_SENT, Step.FLUSHED, Step.COMMITTED]
FIRST = {(Step.FLUSHED, "kill")}


class MemberProcess(Process):
    script = "mediator_member.py"


def crashing(orders: Orders, **options: Any) -> MemberProcess:
    """A mediator, or a step's processor, in a process of its own."""
    return MemberProcess(orders.mediator.initial, orders.mediator.group, **{**orders.options(), **options})


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize(("step", "how"), crash_points(STEPS_OF_A_TRANSACTION, FIRST))
def test_a_mediator_that_is_killed_or_frozen_at_a_step_loses_and_doubles_nothing(
    cluster: Cluster, tmp_path: Path, step: Step, how: str, count: int
) -> None:
    """correctness 19: at its first event, and at replies. Some orders are compensated."""
    orders = Orders(cluster, tmp_path)
    orders.services["reserve"].refuses = {"m2"}
    orders.place("m1", "m2")
    with orders.processors(), crashing(orders, crash_at=step.value, crash_how=how, crash_count=count) as crashed:
        crashed.wait_for(step, count, PATIENCE)
        if how == "kill":
            assert crashed.ends(PATIENCE) == -9
        with Member(orders.consumer()):
            orders.place("m3")
            orders.wait(m1="completed", m2="compensated", m3="completed")
        if how == "freeze":
            crashed.thaw()
            assert crashed.ends(PATIENCE) == 1
    orders.check({"m1", "m3"}, {"m2": {"charge"}})


@pytest.mark.long  # test_order_topologies.py kills one
@pytest.mark.parametrize(("step", "how"), crash_points([Step.HANDLED, Step.FLUSHED, Step.COMMITTED], set()))
def test_a_processor_that_is_killed_or_frozen_at_a_step_has_each_effect_once(
    cluster: Cluster, tmp_path: Path, step: Step, how: str
) -> None:
    """Its effect is there and its reply is not, or both."""
    orders = Orders(cluster, tmp_path)
    orders.place("n1", "n2")
    options = {"step": "reserve", "crash_at": step.value, "crash_how": how}
    with running(orders, "charge", "ship"), crashing(orders, **options) as crashed:
        crashed.wait_for(step, 1, PATIENCE)
        if how == "kill":
            assert crashed.ends(PATIENCE) == -9
        with Member(orders.processor("reserve")):
            orders.wait(n1="completed", n2="completed")
        if how == "freeze":
            crashed.thaw()
            assert crashed.ends(PATIENCE) == 1
    orders.check({"n1", "n2"})


@pytest.mark.long  # test_state_waiting.py starts again what waits
def test_a_timeout_outlives_the_mediator(cluster: Cluster, tmp_path: Path) -> None:
    """correctness 11, 42: the mediator is killed while it waits for a step that is down; nothing is lost, nor early."""
    orders = Orders(cluster, tmp_path, timeout=1.0)
    orders.place("o1")
    with orders.processors("charge", "ship"):
        with crashing(orders) as killed:
            orders.wait(o1="running")
            wait_until(lambda: orders.states()["o1"].step == "reserve", what="the step that is down")
            killed.popen.kill()
        with Member(orders.consumer()) as member:
            member.journal.wait(lambda: orders.states()["o1"].status == "cancelling", what="the timeout")
            with Member(orders.processor("reserve")):
                orders.wait(o1="completed")
    do, cancel = orders.states()["o1"].questions[1:3]
    assert (do.step, do.action, cancel.step, cancel.action) == ("reserve", "do", "reserve", "cancel")
    assert cancel.asked >= do.asked + 1.0
    orders.check({"o1"})


@pytest.mark.long
def test_of_two_mediators_in_one_slot_the_older_one_ends(cluster: Cluster, tmp_path: Path) -> None:
    orders = Orders(cluster, tmp_path)
    with orders.processors(), crashing(orders) as older:
        orders.place("p1")
        orders.wait(p1="completed")
        with Member(orders.consumer()):
            orders.place("p2", "p3")
            assert older.ends(PATIENCE) == 1
            orders.wait(p2="completed", p3="completed")
    orders.check({"p1", "p2", "p3"})


@pytest.mark.long
def test_500_orders_while_mediators_are_killed_and_scaled(cluster: Cluster, tmp_path: Path) -> None:
    """Each ends, with each effect once; timeouts come meanwhile."""
    orders = Orders(cluster, tmp_path, partitions=4, asks=50, timeout=2.0)
    ids = {f"t{number}" for number in range(500)}
    refused = {f"t{number}" for number in range(0, 500, 10)}
    orders.services["ship"].refuses = refused
    with orders.processors(), orders.mediator.states() as states, ExitStack() as stack:
        states.wait_ready()

        def begin(slot: str) -> MemberProcess:
            return stack.enter_context(crashing(orders, slot=slot))

        def over(many: int) -> None:
            wait_until(lambda: sum(one.over for one in states.values()) >= many, 120, f"{many} orders")

        one, two = begin("one"), begin("two")
        orders.place(*ids)
        for many in (50, 150, 250):
            over(many)
            one.popen.kill()
            one = begin("one")
        begin("three")
        over(300)
        two.popen.terminate()
        over(400)
        one.popen.kill()
        begin("one")
        over(500)
    orders.check(ids - refused, {one: {"charge", "reserve"} for one in refused})


# -- definitions and topics that change


def test_orders_under_way_go_on_by_the_version_they_began_with(cluster: Cluster, tmp_path: Path) -> None:
    """Another order of steps, another timeout. Without the old version, replies to it are dead letters, and count once
    it is back and they are replayed."""
    orders = Orders(cluster, tmp_path)
    old = orders.mediator
    new = process(dict(reversed(orders.commands.items())), version=2, timeout=LONG / 2)
    with orders.processors("charge"):
        with Member(orders.consumer()):
            orders.place("q1")
            orders.wait(q1="running")
            wait_until(lambda: orders.states()["q1"].step == "reserve", what="the second step")
        orders.mediator = replace(old, processes=[new])
        with orders.processors("reserve", "ship"), Member(orders.consumer()):
            orders.place("q2")
            orders.wait(q2="completed")
            with orders.mediator.dead_letters() as letters:
                wait_until(lambda: letters_of(letters) == ["q1"], what="a letter of the old version")
        orders.mediator = replace(old, processes=[*old.processes, new])
        with running(orders, "reserve", "ship"), orders.mediator.dead_letters() as letters:
            letters.replay()
            orders.wait(q1="completed")
            wait_until(lambda: not letters, what="the letter to go")
    orders.check({"q1", "q2"})
    assert list(orders.states()["q1"].done) == ["charge", "reserve", "ship"]
    assert list(orders.states()["q2"].done) == ["ship", "reserve", "charge"]


@pytest.mark.long
def test_a_timeout_of_an_earlier_definition_is_heard(cluster: Cluster, tmp_path: Path) -> None:
    """The duration was changed in place: what waits in the topic of the old one is read."""
    orders = Orders(cluster, tmp_path, timeout=1.0)
    orders.place("r1")
    with Member(orders.consumer()):
        orders.wait(r1="running")
    orders.mediator = replace(orders.mediator, processes=[process(orders.commands, timeout=LONG)])
    with running(orders):
        orders.wait(r1="completed")
    orders.check({"r1"})


@pytest.mark.long  # test_aggregation.py adds some, to the same consumer
@pytest.mark.parametrize("topic", ["initial", "replies"])
def test_partitions_added_to_a_mediators_topic_end_it(cluster: Cluster, tmp_path: Path, topic: str) -> None:
    """Ids have moved away from their state: it says so, also to who starts it again."""
    orders = Orders(cluster, tmp_path)
    orders.place("s1")
    member = Member(orders.consumer())
    member.__enter__()
    orders.wait(s1="running")
    cluster.add_partitions(getattr(orders.mediator, topic).name, 2)
    assert isinstance(member.ends(60), TopicMismatch)
    with pytest.raises(TopicMismatch, match="same number"):
        orders.consumer().prepare()


@pytest.mark.long
def test_partitions_added_to_a_steps_commands_double_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """correctness 42: while commands wait, ids move, and whether a step was done is asked before it is told to do it.
    Then it was cancelled, and never does it."""
    orders = Orders(cluster, tmp_path, asks=1000, timeout=1.0)
    reserve, service = orders.commands["reserve"], orders.services["reserve"]
    ids = {f"v{number}" for number in range(8)}

    def asked() -> dict[int, list[str]]:
        with Reader(reserve) as reader:
            found = [(record.partition, record.key or "") for record in reader.read_to_end()]
        return {number: [key for at, key in found if at == number] for number in range(3)}

    with orders.processors("charge", "ship"), Member(orders.consumer()):
        orders.place(*ids)
        wait_until(lambda: set(asked()[0]) == ids, 60, "all commands to wait")
        cluster.add_partitions(reserve.name, 3)
        wait_until(lambda: asked()[1] and asked()[2], 30, "questions in the new partitions")
        before = Counter(chain(*asked().values()))
        wait_until(
            lambda: all(Counter(chain(*asked().values()))[one] > before[one] for one in ids), 30, "one more each"
        )
        moved = {*asked()[1], *asked()[2]}
        service.hold("do", asked()[0][0], lambda: all(service.calls["cancel", one] for one in moved))
        with orders.processors("reserve"):
            statuses = {**dict.fromkeys(ids, "completed"), **dict.fromkeys(moved, "compensated")}
            orders.wait(60, **statuses)
    orders.check(ids - moved, {one: {"charge"} for one in moved})


def test_topics_that_do_not_fit_are_refused_before_anything_is_made(cluster: Cluster, tmp_path: Path) -> None:
    orders = Orders(cluster, tmp_path)
    mediator, there = orders.mediator, cluster.topics()
    for wrong in (
        {"initial": fresh_topic(cluster, 2, dict[str, int])},
        {"replies": fresh_topic(cluster, 2, StepReply)},
        {"store": store_topic(cluster, 2, ProcessState)},
    ):
        with pytest.raises(TopicMismatch, match="same number"):
            replace(mediator, **wrong).consumer("one").prepare()
    with pytest.raises(TopicMismatch, match="compact"):
        replace(mediator, store=fresh_topic(cluster, 1, ProcessState)).consumer("one").prepare()
    assert len(cluster.topics()) == len(there) + 4


def test_a_topic_that_is_missing_is_told_before_an_order_gets_there(cluster: Cluster, tmp_path: Path) -> None:
    """That of the commands of an old version, too."""
    orders = Orders(cluster, tmp_path)
    mediator, there = orders.mediator, cluster.topics()
    not_there = replace(orders.commands["reserve"], name=fresh_group())
    old, newer = process({**orders.commands, "bill": not_there}), replace(mediator.newest, version=2)
    for wrong in (
        *({name: replace(getattr(mediator, name), name=fresh_group())} for name in ("initial", "replies", "store")),
        {"processes": [process({**orders.commands, "reserve": not_there})]},
        {"processes": [old, newer]},
    ):
        with pytest.raises(TopicMissing, match="create"):
            replace(mediator, **wrong).consumer("one").prepare()
    assert cluster.topics() == there


@pytest.mark.long
def test_topics_of_timeouts_have_the_partitions_that_the_replies_have(cluster: Cluster, tmp_path: Path) -> None:
    """Whatever was declared. One that was made with fewer is refused."""
    orders = Orders(cluster, tmp_path, partitions=3)
    mediator = orders.mediator
    declared = replace(
        mediator, initial=replace(mediator.initial, partitions=1), replies=replace(mediator.replies, partitions=1)
    )
    declared.consumer("one").prepare()
    timeouts = mediator.timeouts(LONG)
    assert cluster.topics()[timeouts.name] == 3
    shorter = replace(mediator, processes=[process(orders.commands, timeout=1.0)])
    replace(shorter.timeouts(1.0), partitions=2).create({"message.timestamp.type": "LogAppendTime"})
    with pytest.raises(TopicMismatch, match="2 partitions, not 3"):
        shorter.consumer("one").prepare()


def test_a_timeout_that_is_a_sum_of_delays_has_a_topic(cluster: Cluster, tmp_path: Path) -> None:
    """Ten times 0.1 is a bit less than 1."""
    orders = Orders(cluster, tmp_path, timeout=sum([0.1] * 10))
    orders.consumer().prepare()
    assert orders.mediator.timeouts(orders.mediator.newest.steps[0].timeout).name in cluster.topics()


def test_what_cannot_be_orchestrated_is_refused_with_the_fix(cluster: Cluster, tmp_path: Path) -> None:
    orders = Orders(cluster, tmp_path)
    mediator, charge = orders.mediator, orders.commands["charge"]
    newest = mediator.newest
    for wrong in (
        {"processes": []},
        {"processes": [newest, newest]},
        {"processes": [newest, replace(newest, name="other", version=2)]},
        {"processes": [newest, process({**orders.commands, "ship": fresh_topic(cluster, 1, StepCommand)}, 2)]},
        {"processes": [newest, process({"bill": orders.commands["ship"]}, 2)]},
        {"replies": mediator.store},
        {"store": mediator.replies},
        {"asks": 0},
    ):
        with pytest.raises(LabkitError):
            replace(mediator, **wrong)
    for steps in ((), ("charge", "charge")):
        with pytest.raises(LabkitError):
            replace(newest, steps=tuple(newest.step(one) for one in steps))
    with pytest.raises(LabkitError):
        replace(newest.step("charge"), timeout=0.0)
    with pytest.raises(LabkitError):
        replace(mediator, processes=[process({"charge": replace(charge, value=int)})])
    service = orders.services["charge"]
    with pytest.raises(LabkitError, match="undo"):
        mediator.processor("charge", service.do, service.cancel)
    silent = mediator.processor("charge", service.do, lambda _: None, service.undo)
    with pytest.raises(LabkitError, match="cancel"):
        silent.handler.result(StepCommand("1", "charge", "cancel", 2, {}, 0))
    with pytest.raises(LabkitError, match="no step"):
        mediator.processor("bake", service.do, service.cancel, service.undo)


@pytest.mark.long  # notebook 07 has them in pods, and kills one
def test_a_mediator_and_its_processors_run_in_pods(connection: Connection, tmp_path: Path) -> None:
    """One of the mediators is killed meanwhile."""
    lab = Lab("mediator")
    try:
        commands = {name: lab.topic(name, 1, StepCommand) for name in STEPS}
        mediator = Mediator(
            lab.topic("orders", 2, dict[str, int]),
            lab.topic("replies", 2, StepReply),
            lab.topic("states", 2, ProcessState, compacted=True),
            [process(commands)],
        )
        mediators = lab.deploy("mediator", mediator.consumer(), replicas=2)
        ledger = Ledger(tmp_path / "ledger")
        for name in STEPS:
            service = Service(name, ledger)
            lab.deploy(name, mediator.processor(name, service.do, service.cancel, service.undo))
        for number in range(20):
            mediator.initial.send({"cents": number}, key=f"u{number}")
        mediators.pods[0].kill()
        with mediator.states() as states:
            states.wait_ready()
            wait_until(lambda: [one.status for one in states.values()] == ["completed"] * 20, 60, "all orders")
        assert len(ledger.effects()) == len(set(ledger.effects())) == 60
    finally:
        lab._end(0)
