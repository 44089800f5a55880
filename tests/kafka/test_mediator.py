"""The mediator: each order ends completed or compensated, each effect is there once, nothing is awaited for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from consuming import Member
from mediating import STEPS, Orders
from processes import wait_until
from stores import raw

from labkit.kafka.cluster import Cluster
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.mediator_states import StepReply


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
    assert "ship failed" in shop.states()["b2"].reason


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
