"""A verdict finds precisely the anomalies that are there, and claims nothing else."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import pytest

from labkit.kafka.effects import Effect, Sent
from labkit.kafka.errors import LabkitError
from labkit.lab.history import Fault
from labkit.lab.verdict.anomalies import Anomaly
from labkit.lab.verdict.verdict import NotValid, Verdict, judge

START = 1_700_000_000.0
CRASH = Fault(START + 50, START + 50, "kill", "shop-1", "kill pod 1")
VALID = "any extra is a redelivery after a fault, or was sent again"


def send(count: int, key: str | None = "ann") -> list[Sent]:
    return [Sent(f"order-{n}", key, n) for n in range(count)]


def effect(n: int, offset: int | None = None, **changes: Any) -> Effect:
    """Order n, done n seconds after the start from source offset n, in done/0 at the given offset (or n)."""
    place = f"done/0/{n if offset is None else offset}"
    return Effect(f"order-{n}", "ann", place, START + n, f"orders/0/{n}", "shop-0")._replace(**changes)


def ids(anomalies: Iterable[Anomaly]) -> list[str]:
    return [anomaly.id for anomaly in anomalies]


def kinds(found: Verdict) -> list[tuple[str, str]]:
    return [(anomaly.kind, anomaly.id) for anomaly in found.found]


def test_all_done_once_is_valid() -> None:
    found = judge(send(1000), [effect(n) for n in range(1000)], [])
    assert (found.result, found.sent, found.done, found.found) == ("valid", 1000, 1000, [])
    counts = "1,000 sent · 1,000 took effect · lost 0 · duplicated 0 · out of order 0 · unexpected 0"
    assert str(found) == repr(found) == found.check() == f"{counts} · {VALID}"
    assert judge(send(1000), [effect(n) for n in range(1000)], exactly_once=True).check() == counts
    assert found.explain() == "Nothing to explain: no extra, nothing missing."


def test_lost_is_named_the_first_ten_of_them() -> None:
    found = judge(send(40), [effect(n) for n in range(7)], [CRASH])
    assert ids(found.of("lost")) == [f"order-{n}" for n in range(7, 40)]
    with pytest.raises(NotValid) as failure:
        found.check()
    assert isinstance(failure.value, LabkitError)
    assert isinstance(failure.value, AssertionError)
    first, line = str(failure.value).splitlines()
    assert first == "invalid: 40 sent · 7 took effect · lost 33 · duplicated 0 · out of order 0 · unexpected 0"
    assert line.startswith("  lost: order-7, order-8, ")
    assert line.endswith(", order-16 and 23 more")


def test_everything_lost() -> None:
    found = judge(send(5), [], [CRASH])
    assert (found.result, found.done, len(found.of("lost"))) == ("invalid", 0, 5)


def test_an_extra_after_a_crash_is_a_redelivery_and_names_it() -> None:
    again = effect(49, 60, time=START + 50.4, pod="shop-2")
    found = judge(send(60), [*(effect(n) for n in range(60)), again], [CRASH])
    assert found.result == "valid"
    [extra] = found.of("redelivered")
    assert (extra.id, extra.place, extra.first_place) == ("order-49", "done/0/60", "done/0/49")
    assert extra.fault is CRASH
    assert "1 ids done again by redelivery, 1 extras in all:" in found.explain()
    assert "1 had been in the hands of shop-0" in found.explain()
    # The checked text is the same with extras as without; exactly once does not allow them.
    assert str(found) == str(judge(send(60), [effect(n) for n in range(60)], []))
    strict = judge(send(60), [*(effect(n) for n in range(60)), again], [CRASH], exactly_once=True)
    assert (strict.result, strict.of("redelivered"), ids(strict.of("duplicated"))) == ("invalid", [], ["order-49"])
    with pytest.raises(NotValid, match="duplicated 1 ") as failure:
        strict.check()
    assert str(failure.value).endswith("\n  duplicated: order-49 (done/0/60, first done/0/49)")


def test_the_nearest_fault_before_the_extra_is_named() -> None:
    rebalance = Fault(START + 52, START + 52, "rebalance", "shop", "rebalance")
    later = Fault(START + 60, None, "freeze", "shop-0", "freeze pod 0")
    effects = [effect(49), effect(49, 50, time=START + 53.5, pod="shop-1")]
    [extra] = judge([Sent("order-49", None, 0)], effects, [later, rebalance, CRASH]).of("redelivered")
    assert extra.explanation == "pod shop-1, 1.5 s after: rebalance"


def test_the_fault_that_struck_the_pod_which_had_it_comes_before_a_later_one_of_another() -> None:
    crash = Fault(START + 50, START + 50, "kill", "shop-0", "kill pod 0")
    freeze = Fault(START + 53, None, "freeze", "shop-1", "freeze pod 1")
    later = {"time": START + 56, "pod": "shop-2"}
    effects = [effect(49), effect(49, 60, **later), effect(48, pod="shop-1"), effect(48, 61, **later)]
    sent = [Sent("order-48", None, 0), Sent("order-49", None, 1)]
    found = judge(sent, effects, [crash, freeze])
    assert [(extra.id, extra.fault) for extra in found.of("redelivered")] == [("order-48", freeze), ("order-49", crash)]
    kafka = Fault(START + 50, START + 52, "kill", "Kafka", "kill Kafka")
    slow = Fault(START + 20, None, "slow", "shop-0", "slow pod 0")  # takes nothing away
    before = Fault(START + 48.5, START + 48.5, "kill", "shop-0", "kill pod 0")  # shop-0 had it only after that
    for harmless in (slow, before):
        [extra] = judge(sent[1:], effects[:2], [harmless, kafka]).of("redelivered")
        assert extra.fault == kafka
        [extra] = judge(sent[1:], effects[:2], [harmless, freeze]).of("redelivered")
        assert extra.fault == freeze


def test_an_ended_and_a_standing_window_are_told_apart() -> None:
    effects = [effect(40), effect(40, 41, time=START + 60, pod="shop-1")]
    sent = [Sent("order-40", "ann", 0)]
    standing = Fault(START + 45, None, "freeze", "shop-0", "freeze pod 0")
    [extra] = judge(sent, effects, [standing]).of("redelivered")
    assert extra.explanation == "pod shop-1, 15.0 s after: freeze pod 0"
    ended = Fault(START + 45, START + 59.5, "freeze", "shop-0", "freeze pod 0")
    [extra] = judge(sent, effects, [ended]).of("redelivered")
    assert extra.explanation == "pod shop-1, 0.5 s after the end of: freeze pod 0"


@pytest.mark.parametrize(
    ("faults", "pod"),
    [
        ([], "shop-1"),
        ([Fault(START + 90, START + 90, "kill", "shop-1", "kill pod 1")], "shop-1"),  # only afterwards
        ([Fault(START - 60, START - 60, "kill", "shop-1", "kill pod 1")], "shop-1"),  # long over
        ([Fault(START + 2, START + 2, "kill", "shop-1", "kill pod 1")], "shop-0"),  # the pod lived on
    ],
)
def test_an_extra_no_fault_explains_is_a_duplicate(faults: list[Fault], pod: str) -> None:
    extra = effect(10, 11, time=START + 10.2, pod=pod)
    found = judge(send(11), [*(effect(n) for n in range(11)), extra], faults)
    assert kinds(found) == [("duplicated", "order-10")]
    assert found.result == "invalid"
    assert f"pod {pod}, 0.2 s later: no fault in between" in found.explain()


def test_a_restarted_pod_redelivers_to_itself() -> None:
    effects = [effect(49), effect(49, 50, time=START + 52)]
    assert judge([Sent("order-49", None, 0)], effects, [CRASH]).result == "valid"


def test_the_same_id_in_two_partitions() -> None:
    effects = [effect(0), effect(0, place="done/1/0", time=START + 0.5)]
    [extra] = judge(send(1), effects, []).of("duplicated")
    assert (extra.place, extra.first_place) == ("done/1/0", "done/0/0")


def test_an_effect_read_twice_is_one_effect() -> None:
    effects = [effect(0), effect(1), effect(0), effect(0)]
    assert judge(send(2), effects, []).found == []


def test_sent_again_is_listed_and_does_not_count() -> None:
    again = effect(3, 10, cause="orders/0/10", time=START + 10)
    effects = [*(effect(n) for n in range(10)), again]
    once = judge(send(10), effects, [])
    assert once.result == "valid"
    assert ids(once.of("resent")) == ["order-3"]
    assert once.explain().startswith(
        "1 resent: order-3 (done/0/10, first done/0/3); order-3: source records orders/0/3 "
    )
    # Exactly once admits it only if the load says that it sent it twice.
    assert "duplicated 1" in str(judge(send(10), effects, exactly_once=True))
    twice = judge([*send(10), Sent("order-3", "ann", 10)], effects, [])
    assert (twice.sent, twice.done, ids(twice.of("sent again"))) == (10, 10, ["order-3"])
    assert judge([*send(10), Sent("order-3", "ann", 10)], effects, exactly_once=True).check()
    assert twice.explain().startswith("1 sent again: order-3 ")


def test_a_mixed_up_id_is_a_duplicate() -> None:
    # The handling of order 3's record made order 3 and order 4 as well.
    effects = [effect(3), effect(4), effect(4, 5, cause="orders/0/3")]
    found = judge(send(5)[3:], effects, [CRASH])
    assert kinds(found) == [("duplicated", "order-4")]
    assert "mixed up: source records orders/0/4 and orders/0/3 made different ids" in found.explain()


def test_a_record_that_makes_several_ids_may_be_sent_again() -> None:
    effects = [effect(n, cause="orders/0/0") for n in range(3)]
    effects += [effect(n, 3 + n, cause="orders/0/1") for n in range(3)]
    assert [kind for kind, _ in kinds(judge(send(3), effects, []))] == ["resent"] * 3


def test_a_record_sent_again_may_make_other_ids_beside() -> None:
    effects = [effect(n, cause="orders/0/0") for n in range(2)]
    effects += [effect(n, 2 + n, cause="orders/0/1") for n in range(3)]
    sent = [*send(2), *(Sent(f"order-{n}", "ann", 2 + n) for n in range(3))]
    assert kinds(judge(sent, effects, [])) == [("sent again", "order-0"), ("sent again", "order-1")]


def test_without_a_cause_an_extra_is_no_resend() -> None:
    effects = [effect(0), effect(0, 1, cause=None)]
    assert kinds(judge(send(1), effects, [])) == [("duplicated", "order-0")]
    [extra] = judge(send(1), [effect(0, cause=None), effect(0, 1)], []).of("duplicated")
    assert "no fault in between" in extra.explanation


def test_unexpected_is_named_with_each_place() -> None:
    found = judge(send(1), [effect(0), effect(9), effect(9, 10)], [])
    assert kinds(found) == [("unexpected", "order-9")] * 2
    assert str(found) == (
        "invalid: 1 sent · 1 took effect · lost 0 · duplicated 0 · out of order 0 · unexpected 2\n"
        "  unexpected: order-9 (done/0/9), order-9 (done/0/10)"
    )


def test_out_of_order_names_the_fewest() -> None:
    found = judge(send(6), [effect(n, place) for place, n in enumerate([0, 2, 3, 4, 1, 5])], [])
    [late] = found.of("out of order")
    assert (late.id, late.place, late.explanation) == (
        "order-1",
        "done/0/4",
        "done after order-2, sent later",
    )
    [early] = judge(send(5), [effect(n, place) for place, n in enumerate([4, 0, 1, 2, 3])], []).of("out of order")
    assert (early.id, early.explanation) == ("order-4", "done before order-3, sent earlier")


def test_order_is_of_first_effects_each_key_alone() -> None:
    sent = [Sent(f"order-{n}", "ann" if n % 2 else "bob", n) for n in range(4)]
    replay = enumerate([0, 2, 1, 3, 0, 2, 1, 3])
    effects = [effect(n, place, time=START + 46 + place, pod=f"shop-{place // 4}") for place, n in replay]
    found = judge(sent, effects, [CRASH])
    assert (found.result, len(found.of("redelivered"))) == ("valid", 4)


def test_without_a_key_no_order_is_expected() -> None:
    found = judge(send(3, key=None), [effect(n, 3 - n) for n in range(3)], [])
    assert found.check() == f"3 sent · 3 took effect · lost 0 · duplicated 0 · unexpected 0 · {VALID}"
    same = judge(send(3), [effect(n, 3 - n) for n in range(3)], [], ordered=False)
    assert str(same) == str(found)


def test_a_slow_clock_in_one_partition_changes_nothing() -> None:
    slow = [effect(n, time=START + n - (8 if n % 2 else 0)) for n in range(60)]
    again = effect(49, 60, time=START + 44, pod="shop-1")  # by its own clock before the crash
    found = judge(send(60), [*slow, again], [CRASH])
    assert kinds(found) == [("redelivered", "order-49")]
    assert found.clock_gap >= 8
    assert "between two partitions, order is judged only beyond that" in found.explain()


def test_a_fast_clock_does_not_hide_the_fault() -> None:
    effects = [effect(49, time=START + 149), effect(49, 50, time=START + 52, pod="shop-1")]
    assert kinds(judge([Sent("order-49", None, 0)], effects, [CRASH])) == [("redelivered", "order-49")]


def test_a_key_in_two_partitions_is_judged_once_for_each_record() -> None:
    places = ["done/0/0", "done/1/0", "done/0/2", "done/0/3", "done/0/1", "done/1/1"]
    when = [0, 0, 2, 3, 1, 4]  # order-4 too early, in its own partition; a tie between two partitions is none
    effects = [effect(n, place=place, time=START + when[n]) for n, place in enumerate(places)]
    assert kinds(judge(send(6), effects, [])) == [("out of order", "order-4")]
    effects[4] = effects[4]._replace(place="done/0/9", time=START + 9)
    effects[5] = effects[5]._replace(time=START + 2.5)
    assert kinds(judge(send(6), effects, [])) == [("out of order", "order-5")]


def test_order_between_partitions_is_claimed_as_far_as_clocks_agree() -> None:
    def two(first: float, second: float) -> list[Effect]:
        places = (
            effect(0, place="done/0/10", time=START + first),
            effect(1, place="done/1/7", time=START + second),
        )
        return list(places)

    assert kinds(judge(send(2), two(1.0, 1.0), [])) == []
    found = judge(send(2), two(3.0, 1.0), [])
    assert [kind for kind, _ in kinds(found)] == ["out of order"]
    # Another partition shows a clock that is five seconds slow: three seconds prove nothing then.
    sent = [*send(2), Sent("order-2", None, 2), Sent("order-3", None, 3)]
    slow = [effect(2, place="done/2/0", time=START + 9), effect(3, place="done/2/1", time=START + 4)]
    assert kinds(judge(sent, [*two(3.0, 1.0), *slow], [])) == []
    assert len(judge(sent, [*two(9.0, 1.0), *slow], []).of("out of order")) == 1


def test_rows_have_no_offsets() -> None:
    rows = [effect(n, place=f"charges/{9 - n}") for n in range(3)]
    assert judge(send(3), rows, []).result == "valid"
    late = [rows[0]._replace(time=START + 5), *rows[1:]]
    [wrong] = judge(send(3), late, []).of("out of order")
    assert wrong.explanation == "done after order-1, sent later"


def test_an_unconfirmed_send_is_neither_lost_nor_unexpected() -> None:
    sent = [*send(2), Sent("order-2", "ann", 2, confirmed=False), Sent("order-3", "ann", 3, confirmed=False)]
    found = judge(sent, [effect(2, 0), effect(0, 1), effect(1, 2)], [])
    assert (found.result, found.sent, found.done, found.unconfirmed) == ("valid", 2, 2, 2)
    assert "2 ids never confirmed" in found.explain()


def test_unknown_reports_and_claims_nothing() -> None:
    effects = [effect(0), effect(0, 1), effect(9)]
    found = judge(send(3), effects, [], unknown="the laptop slept 40 s")
    assert str(found) == "unknown: the laptop slept 40 s · 3 sent · 1 took effect so far · nothing is claimed"
    assert not any((found.of("lost"), found.of("duplicated"), found.of("unexpected"), found.of("out of order")))
    assert {kind for kind, _ in kinds(found)} == {"maybe lost", "maybe duplicated", "maybe unexpected"}
    said = found.explain().splitlines()
    assert said[0] == "Unknown: the laptop slept 40 s. Seen so far:"
    assert said[1].startswith("2 maybe lost: order-1, order-2")
    with pytest.raises(NotValid, match="the laptop slept"):
        found.check()
    assert judge(send(3), [effect(n) for n in range(3)], [], unknown="").result == "unknown"


def test_nothing_sent_tests_nothing() -> None:
    found = judge([], [], [])
    assert found.result == "unknown"
    assert "nothing was sent and confirmed, so nothing was tested" in str(found)
    assert judge([], [effect(0)], []).result == "invalid"


def test_a_content_with_what_it_should_be() -> None:
    same = judge({"a": [1], "b": [2]}, {"b": [2], "a": [1]}, name="view")
    assert same.check() == "view: 2 sent · 2 took effect · lost 0 · wrong 0 · unexpected 0"
    found = judge({"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 4, "d": 5}, name="<view>")
    with pytest.raises(NotValid) as failed:
        found.check()
    assert str(failed.value).splitlines() == [
        "invalid: <view>: 3 sent · 2 took effect · lost 1 · wrong 1 · unexpected 1",
        "  lost: a",
        "  wrong: c",
        "  unexpected: d",
    ]
    assert "1 wrong: c; c: 4 instead of 3" in found.explain()
    many = judge({f"id-{number:02}": 1 for number in range(30)}, {})
    assert str(many).endswith("id-09 and 20 more")
    assert judge({1: "a"}, {"1": "a"}).result == "valid"  # a verdict's ids are texts


def test_a_content_shows_of_a_load_what_is_there_and_no_more() -> None:
    sent = [*send(2), Sent("order-2", "ann", 2, confirmed=False)]
    found = judge(sent, {"order-0": 1, "order-2": 1, "order-9": 1})
    assert str(found).splitlines()[0] == "invalid: 2 sent · 1 took effect · lost 1 · unexpected 1"
    assert judge(sent, {"order-0": 1, "order-1": 1}).check() == "2 sent · 2 took effect · lost 0 · unexpected 0"
    with pytest.raises(LabkitError, match="give `done` as a mapping"):
        judge({"order-0": 1}, [effect(0)])


def test_early_makes_it_invalid_and_is_named_in_the_order_of_sending() -> None:
    effects = [effect(n) for n in range(12)]
    found = judge(send(12), effects, early=["order-10", "order-9", "order-9"])
    assert str(found).splitlines() == [
        "invalid: 12 sent · 12 took effect · lost 0 · duplicated 0 · out of order 0 · early 2 · unexpected 0",
        "  early: order-9, order-10",
    ]
    assert " · early 0 · unexpected 0" in judge(send(12), effects, early=[]).check()


def test_what_was_set_aside_is_accounted_for() -> None:
    effects = [effect(n) for n in range(8)]
    found = judge(send(10), effects, exactly_once=True, rejected=["order-9", "order-8"])
    assert found.check().splitlines() == [
        "10 sent · 8 took effect · lost 0 · duplicated 0 · out of order 0 · unexpected 0 · rejected 2",
        "  rejected: order-8, order-9",
    ]
    assert judge(send(10), effects, rejected=["order-9"]).of("lost")[0].id == "order-8"
    older = judge({"a": 2, "b": 1}, {"a": 1, "b": 1}, rejected=["a"])
    assert older.check().splitlines()[0] == ("2 sent · 2 took effect · lost 0 · wrong 0 · unexpected 0 · rejected 1")
    assert " · rejected 0" in judge({"a": 1}, {"a": 1}, rejected=[]).check()


def test_of_others_nothing_is_looked_at() -> None:
    effects = [effect(0), effect(1), effect(1, 9)]
    found = judge(send(1), effects, early=["order-1"], rejected=["order-1"], others={"order-1", "order-2"})
    assert found.found == []
    assert found.check().startswith("1 sent · 1 took effect · 2 of other loads not looked at · lost 0")
    assert judge(send(1), {"order-0": 1, "order-1": 1}, others={"order-1"}).result == "valid"


def test_unknown_of_every_kind() -> None:
    found = judge({"a": 1, "b": 1}, {"b": 2, "c": 3}, early=["b"], unknown="Kafka is down", name="view")
    assert str(found) == "unknown: view: Kafka is down · 2 sent · 1 took effect so far · nothing is claimed"
    assert {one.kind for one in found.found} == {"maybe lost", "maybe wrong", "maybe unexpected", "maybe early"}
    assert judge({}, {}).result == "unknown"  # nothing was tested


def test_a_kind_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(LabkitError, match="no kind 'out_of_order'"):
        judge(send(1), [effect(0)]).of("out_of_order")


def test_pandas_waits_until_it_is_asked_for() -> None:
    script = "import sys, labkit.lab.verdict.verdict; assert 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("seed", range(60))
def test_it_finds_precisely_what_was_injected(seed: int) -> None:
    print("seed", seed)  # pytest shows it with a failure
    dice = random.Random(seed)
    count, crashed = dice.randrange(200, 400), dice.randrange(60, 100)  # one record a second; the crash
    users = [f"user-{n}" for n in range(12)]
    sent = [Sent(f"order-{n}", dice.choice([*users, None]), n) for n in range(count)]
    before, far = sent[crashed - 12 : crashed], [*sent[: crashed - 20], *sent[crashed + 60 :]]
    redelivered = dice.sample(before, dice.randrange(6))
    victims = dice.sample(far, 15)
    lost, doubled, resent = victims[:5], victims[5:10], victims[10:]
    late: dict[Sent, Sent] = {}  # who is done after whom: the second after it of the same key
    for key in users:
        plain = [send for send in sent if send.key == key and send not in victims]
        if len(plain) > 4 and dice.random() < 0.5:
            place = dice.randrange(len(plain) - 3)
            if not set(plain[place : place + 3]) & set(before):
                late[plain[place]] = plain[place + 2]

    happens = []  # (true second, send, cause, pod)
    for send in sent:
        cause, pod = f"orders/0/{send.order}", "shop-1" if send in before else f"shop-{dice.randrange(3)}"
        if send not in lost:
            happens.append((late.get(send, send).order + (0.1 if send in late else 0.0), send, cause, pod))
        if send in doubled:
            happens.append((send.order + 0.3, send, cause, dice.choice([pod, "shop-2"])))
        if send in redelivered:
            happens.append((crashed + 3 + send.order / 1000, send, cause, "shop-2"))
        if send in resent:
            happens.append((count + send.order / 1000, send, f"orders/0/{count + send.order}", "shop-0"))
    # Clocks disagree, but by less than the three seconds from the crash to the redelivery.
    clocks = {f"shop-{pod}": dice.choice([0.0, -2.5, 2.5]) for pod in range(3)}
    partitions = dice.randrange(1, 5)
    ends = [0] * partitions
    effects = []
    for second, send, source, pod in sorted(happens, key=lambda what: what[0]):
        # A key has its partition; without one it is any, so that an id may be in two.
        partition = dice.randrange(partitions) if send.key is None else int(send.key[5:]) % partitions
        ends[partition] += dice.choice([1, 1, 2])  # transaction markers leave gaps
        done, moment = f"done/{partition}/{ends[partition]}", START + second + clocks[pod]
        effects.append(Effect(send.id, send.key, done, moment, source, pod))
    effects.append(Effect("stranger", None, "done/0/9999", START + count + 9, None, None))

    dice.shuffle(effects)
    dice.shuffle(sent)
    found = judge(sent, effects, [Fault(START + crashed, START + crashed, "kill", "shop-1", "kill pod 1")])
    injected = {"lost": lost, "redelivered": redelivered, "duplicated": doubled, "resent": resent}
    expected = [("unexpected", "stranger"), *(("out of order", send.id) for send in late)]
    expected += [(kind, send.id) for kind, sends in injected.items() for send in sends]
    assert sorted(kinds(found)) == sorted(expected)
    assert (found.sent, found.done) == (count, count - len(lost))


@pytest.mark.long
def test_many_ids_take_seconds() -> None:
    count = 100_000
    sent = [Sent(str(n), str(n % 1000), n) for n in range(count)]
    effects = [
        Effect(str(n), None, f"done/{n % 4}/{n // 4}", START + n / 1e4, f"orders/{n % 4}/{n // 4}", "shop-0")
        for n in range(count)
    ]
    began = time.process_time()
    assert judge(sent, effects, [CRASH]).result == "valid"
    assert len(judge(sent, effects * 2, [CRASH]).found) == 0
    assert len(judge(sent[::-1], [one._replace(key=None) for one in effects[::-1]], []).found) == 0
    backwards = judge([one._replace(order=-one.order) for one in sent], effects, [])
    assert len(backwards.of("out of order")) == count - 1000
    assert time.process_time() - began < 60  # a few: a quadratic step would take many minutes
