"""The services of schedule and forget: each fault of the provider, its ledger, locks, and the scheduler."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from aiohttp import web
from consuming import alter, fresh_topic
from processes import wait_until

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import DeliveryFailed, LabkitError
from labkit.kafka.reader import Reader
from labkit.lab.verdict.verdict import judge
from labkit.runtime.broker import free_ports
from labkit.runtime.postgres import Postgres
from labkit.runtime.which_kafka import Connection
from labkit.services.clients import ask
from labkit.services.http import HttpService
from labkit.services.payments.job_scheduler import JobScheduler, Schedule, finished, schedule
from labkit.services.payments.ledger import (
    CardDeclined,
    ProviderFailed,
    Renewal,
    calls,
    charge,
    charged,
    charges,
    due,
    early,
)
from labkit.services.payments.provider import PaymentsProvider
from labkit.services.payments.subscriptions import LOCKS, Costs, Due, Polling, Requesting, costs, subscribe

RENEWAL = Renewal("7-1", "customer 7", 1, 2900)


@contextmanager
def serving(*services: HttpService) -> Iterator[None]:
    """Run services in threads until the block ends."""
    stop, up = threading.Event(), [threading.Event() for _ in services]
    threads = [
        threading.Thread(target=one.run, args=(stop, lambda _step, _figures, ready=ready: ready.set()))
        for one, ready in zip(services, up, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        assert all(ready.wait(20) for ready in up)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


@pytest.fixture(scope="module")
def lab(connection: Connection) -> Iterator[Lab]:
    with Lab("payments", pace=10) as found:
        yield found


@pytest.fixture(scope="module")
def ledger() -> Iterator[str]:
    with Postgres() as server:
        yield server.dsn


def test_every_fault_of_the_provider_and_its_ledger(lab: Lab, ledger: str) -> None:
    provider = PaymentsProvider(lab.port("provider"), dsn=ledger)
    with serving(provider):
        faults = lab.service("provider", provider.faults)

        def outcome(key: str | None, renewal: Renewal = RENEWAL) -> str:
            try:
                charge(provider.url, renewal, key)
            except (ProviderFailed, CardDeclined):
                pass  # the ledger says why
            return calls(ledger)[-1].outcome

        def made() -> int:
            return sum(one.renewal == "7-1" for one in charges(ledger))

        faults.fail()
        assert repr(faults) == "provider is misbehaving: fail provider"
        assert outcome("a") == "refused"
        faults.recover()
        faults.tell("provider answers nonsense", wrong=True)
        assert outcome("a") == "wrong"
        faults.recover()
        faults.tell("customer 7 stuck", stuck="customer 7")
        faults.tell("card of customer 8 declined", declined="customer 8")  # both stand
        assert outcome("a") == "broken"
        with pytest.raises(CardDeclined):
            charge(provider.url, Renewal("8-1", "customer 8", 1, 2900), "b")
        faults.recover()
        assert made() == 0
        faults.cut(1)
        assert outcome("a") == "dropped"
        assert made() == 1
        assert [outcome("a"), outcome("a")] == ["repeated", "repeated"]
        assert made() == 1
        assert outcome(None) == "charged"  # without a key it charges again
        faults.slow(by=0.1)
        outcome("a")
        last = calls(ledger)[-1]
        assert last.ended - last.began >= 0.1
        faults.fail(seconds=600.0)
        assert [one.kind for one in lab._history.standing()] == ["slow", "fail"]
        faults.recover()
        faults.fail(seconds=0.1)
        wait_until(lambda: outcome("a") == "repeated", 10, "its end")
        faults.recover()
        assert not lab._history.standing()
        faults.fail(seconds=0.1)
        faults.recover()
        faults.fail()
        until = time.monotonic() + 0.3  # longer than the first would have lasted, which is no business of the second
        while time.monotonic() < until:
            assert outcome("a") == "refused"
        assert [one.kind for one in lab._history.standing()] == ["fail"]
        faults.recover()
        for wrong in (lambda: faults.fail(1.5), lambda: faults.fail(status=200), lambda: faults.tell("x", stuck=7)):
            with pytest.raises(LabkitError, match="provider cannot do that"):
                wrong()
        with pytest.raises(LabkitError, match=r"cannot do that: .*`sleepy`; it understands: errors, status"):
            faults.tell("sleepy", sleepy=True)
        assert outcome("a") == "repeated", "what was refused is not done"
        twice = judge(due([7], [1]), charged(ledger, due([7], [1])), exactly_once=True)
        assert [(one.id, one.key) for one in twice.of("duplicated")] == [("7-1", "customer 7")]
    with pytest.raises(LabkitError, match="is its pod running"):
        faults.fail()


def test_a_verdict_on_the_ledger_names_what_is_wrong(lab: Lab, ledger: str) -> None:
    provider = PaymentsProvider(lab.port("provider"), dsn=ledger)
    [first, second, third], [other] = due([9], [1, 2, 3]), due([10], [1])
    with serving(provider):
        faults = lab.service("provider", provider.faults)
        charge(provider.url, Renewal(second.id, "customer 9", 2, 100), second.id)
        faults.fail()
        with pytest.raises(ProviderFailed):
            charge(provider.url, Renewal(first.id, "customer 9", 1, 100), first.id)
        faults.recover()
        faults.tell("card of customer 10 declined", declined="customer 10")
        with pytest.raises(CardDeclined):
            charge(provider.url, Renewal(other.id, "customer 10", 1, 100), other.id)
        faults.recover()
        for _ in range(2):  # of the second call nothing comes: it has the same key
            charge(provider.url, Renewal(first.id, "customer 9", 1, 100), first.id)
        charge(provider.url, Renewal(other.id, "customer 10", 1, 100), other.id)
    months = [first, second, third]
    made = charged(ledger, months)
    found = judge(months, made, exactly_once=True, early=early(ledger, [*months, other], [60.0]))
    assert str(found).splitlines() == [
        "invalid: 3 sent · 2 took effect · lost 1 · duplicated 0 · out of order 1 · early 1 · unexpected 0",
        "  lost: 9-3",
        f"  out of order: 9-1 ({made[1].place}, first {made[0].place})",
        "  early: 9-1",
    ]
    fine = judge(months, made, exactly_once=True, ordered=False, early=early(ledger, months, [0.0]), rejected=["9-3"])
    assert fine.check().splitlines()[0] == (
        "3 sent · 2 took effect · lost 0 · duplicated 0 · early 0 · unexpected 0 · rejected 1"
    )


@pytest.mark.parametrize("lock", LOCKS)
def test_overlapping_requests_charge_twice_without_a_lock(lab: Lab, ledger: str, lock: str) -> None:
    number = LOCKS.index(lock)
    provider = PaymentsProvider(lab.port("provider"), dsn=ledger, takes=0.1)
    polling = Polling(lab.port("polling"), dsn=ledger, provider=provider.url)
    scheduler = JobScheduler(lab.port("scheduler"), month=0.1, again=0.05)
    customers = range(1000 + 100 * number, 1016 + 100 * number)
    with serving(provider, polling, scheduler):
        subscribe(ledger, customers, f"plan {lock}")
        wanted: Any = Schedule(f"{polling.url}/due?lock={lock}", "monthly", patience=0.05)
        with pytest.raises(LabkitError, match="does not take"):
            schedule(scheduler.url, Schedule("http://x", "weekly"))  # type: ignore[arg-type]
        with psycopg.connect(ledger) as database:
            database.execute("update subscriptions set plan = 'monthly' where plan = %s", (f"plan {lock}",))
            database.execute("delete from subscriptions where plan = 'monthly' and not id = any(%s)", ([*customers],))
        schedule(scheduler.url, wanted)
        figures = finished(scheduler.url, wanted, 30)
        spent, others = costs(polling.url, lock), [costs(polling.url, other) for other in LOCKS if other != lock]
    assert figures.calls > 1
    assert figures.failed == figures.calls - 1
    assert others == [Costs(), Costs()]
    made = Counter(one.renewal for one in charges(ledger) if one.renewal.removesuffix("-1") in map(str, customers))
    assert set(made) == {f"{number}-1" for number in customers}
    assert (max(made.values()) > 1) == (lock == "none")
    assert (spent.waited > 0.01) == (lock == "pessimistic")
    assert (spent.conflicts > 0) == (lock == "optimistic")
    with pytest.raises(OSError, match="refused"):
        finished(scheduler.url, wanted)


@dataclass(frozen=True)
class Endpoint(HttpService):
    """Notes what it is called for, and when."""

    calls: list[tuple[float, str, int]] = field(default_factory=list)

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/due", self.due)]

    async def due(self, request: web.Request) -> web.Response:
        told = await request.json()
        self.calls.append((time.monotonic(), told["plan"], told["period"]))
        return web.Response()


@pytest.mark.long  # notebook 04 has both
def test_the_scheduler_calls_once_a_month_and_once_a_year(lab: Lab) -> None:
    scheduler, endpoint = JobScheduler(lab.port("jobs"), month=0.1), Endpoint(lab.port("noted"))
    with serving(scheduler, endpoint):
        monthly = Schedule(f"{endpoint.url}/due", "monthly", first=4, periods=3)
        yearly = Schedule(f"{endpoint.url}/due", "yearly", periods=2)
        with pytest.raises(LabkitError, match="schedule it first"):
            finished(scheduler.url, monthly)
        for wanted in (monthly, yearly, monthly, yearly):  # those that it has it does not take a second time
            schedule(scheduler.url, wanted)
        assert [finished(scheduler.url, one, 30).calls for one in (yearly, monthly)] == [2, 3]
        schedule(scheduler.url, monthly)
        assert finished(scheduler.url, monthly).calls == 3
    for plan, periods, length in (("monthly", [4, 5, 6], 0.1), ("yearly", [1, 2], 1.2)):
        times = [moment for moment, told, _ in endpoint.calls if told == plan]
        assert [number for _, told, number in endpoint.calls if told == plan] == periods
        assert all(later - sooner >= length for sooner, later in pairwise(times))


@pytest.mark.long
def test_a_provider_that_fails_half_the_time_refuses_its_share(lab: Lab, ledger: str) -> None:
    provider = PaymentsProvider(lab.port("flaky"), dsn=ledger)
    with serving(provider):
        faults = lab.service("provider", provider.faults)
        faults.fail(0.5)
        outcomes = Counter()
        for number in range(100):
            with suppress(ProviderFailed):
                charge(provider.url, Renewal(f"flaky-{number}", "customer 1", 1, 2900), f"flaky-{number}")
            outcomes[calls(ledger)[-1].outcome] += 1
        faults.recover()  # the lab, and what stands in its history, is that of the next test too
    assert outcomes.keys() == {"charged", "refused"}
    assert 20 <= outcomes["refused"] <= 80


def test_what_kafka_refuses_does_not_count_as_asked_for(cluster: Cluster, ledger: str) -> None:
    """Whoever else flushes meanwhile, and hears of the refusal before."""
    topic = fresh_topic(cluster, 1, Renewal)
    subscribe(ledger, range(500, 503), "refused")
    service = Requesting(free_ports()[0], ledger, topic)
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            with suppress(DeliveryFailed):
                topic.flush()

    alter(topic, {"max.message.bytes": "60"})  # less than any record takes
    with serving(service), ThreadPoolExecutor() as pool:
        others = [pool.submit(flush) for _ in range(3)]
        try:
            status, said = ask(f"{service.url}/due", "POST", Due("refused", 1))
        finally:
            done.set()
        assert status == 503
        assert "3 of 3 records were refused" in said
        for other in others:
            other.result(10)
        alter(topic, {"max.message.bytes": "100000"})
        assert ask(f"{service.url}/due", "POST", Due("refused", 1)) == (202, {"requested": 3})
        assert ask(f"{service.url}/due", "POST", Due("refused", 1)) == (202, {"requested": 0})
    with Reader(topic) as reader:
        assert [record.value.id for record in reader.read_to_end()] == ["500-1", "501-1", "502-1"]


def test_a_subscription_that_is_made_meanwhile_is_asked_for_next_time(cluster: Cluster, ledger: str) -> None:
    """Of its plan all that was due was marked as paid, whether a renewal had been sent or not."""

    class Slow(Requesting):
        def _request(self, renewals: Iterable[Renewal]) -> None:
            subscribe(ledger, range(600, 602), "meanwhile")
            super()._request(renewals)

    topic = fresh_topic(cluster, 1, Renewal)
    subscribe(ledger, range(600, 601), "meanwhile")
    service = Slow(free_ports()[0], ledger, topic)
    with serving(service):
        for _ in range(2):
            assert ask(f"{service.url}/due", "POST", Due("meanwhile", 1)) == (202, {"requested": 1})
    with Reader(topic) as reader:
        assert [record.value.id for record in reader.read_to_end()] == ["600-1", "601-1"]
