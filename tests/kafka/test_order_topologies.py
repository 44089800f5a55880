"""The same steps of an order in both topologies: each order ends the same way, each effect is there once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from consuming import Member, Process, fresh_topic, put
from processes import wait_until
from stores import store_topic

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.lab.pods.travel import pack
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.mediator import Mediator, Refused
from labkit.patterns.mediator_states import Process as OrderProcess
from labkit.patterns.mediator_states import ProcessState, StepCommand, StepReply
from labkit.patterns.mediator_states import Step as ProcessStep
from labkit.patterns.retries import blocking, dead_letter
from labkit.services import orders
from labkit.services.orders import OrderEvent, OrderPlaced, OrderStep

STEPS = ("charge", "reserve", "ship", "invoice")
FRAUD = "fraud check"


def among(numbers: set[int], order: OrderPlaced) -> bool:
    return int(order.id.rpartition("-")[2]) in numbers


@dataclass
class Shop:
    """The steps of an order in a database of their own, and what puts them into a topology."""

    cluster: Cluster
    dsn: str
    refuses: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        made = {**orders.steps(self.dsn), FRAUD: OrderStep(FRAUD, self.dsn)}
        self.steps = {
            name: replace(step, refuses=partial(among, self.refuses.get(name, set()))) for name, step in made.items()
        }
        self.placed: Topic[OrderPlaced] = fresh_topic(self.cluster, 2, OrderPlaced)

    def place(self, *numbers: int) -> None:
        for order in orders.placed_orders(numbers):
            self.placed.send(order, order.id)
        self.placed.flush()

    def processor(self, step: str) -> Consumer:
        raise NotImplementedError

    @contextmanager
    def running(self, *steps: str) -> Iterator[dict[str, Member]]:
        """Processors of these steps, or of the four."""
        with ExitStack() as stack:
            for step in steps or STEPS:
                stack.callback(self.steps[step].close)
            yield {step: stack.enter_context(Member(self.processor(step))) for step in steps or STEPS}

    def effects(self) -> Counter[tuple[str, str, str]]:
        """Step, what, and order, of all that was done."""
        return Counter((step.name, one.what, one.order) for step in self.steps.values() for one in step.all())

    def wait_done(self, step: str, *numbers: int) -> None:
        wanted = {f"order-{number}" for number in numbers}
        found = self.steps[step]
        wait_until(lambda: wanted <= {one.order for one in found.all()}, 30, f"{step} of {wanted}")

    def wait_effects(self, expected: Counter[tuple[str, str, str]]) -> None:
        """Wait until all of these are there; no other one is."""
        wait_until(lambda: not expected - self.effects(), 60, "all effects")
        assert self.effects() == expected

    def close(self) -> None:
        for step in self.steps.values():
            step.close()


@dataclass
class Chain(Shop):
    """The broker topology."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.done = {name: fresh_topic(self.cluster, 2, OrderEvent) for name in (*STEPS, FRAUD)}
        self.failed, self.undone = (fresh_topic(self.cluster, 2, OrderEvent) for _ in range(2))
        self.after: dict[str, Topic[Any]] = {name: self.done[before] for before, name in pairwise(STEPS)}
        self.after |= {"charge": self.placed, FRAUD: self.placed}

    def processor(self, step: str) -> Consumer:
        made = self.steps[step], self.after[step], self.done[step], self.failed, self.undone
        return replace(orders.event_processor(*made, slot="one"), commit_interval=0.02)

    @contextmanager
    def topology(self) -> Iterator[None]:
        yield

    @property
    def topics(self) -> list[Topic[Any]]:
        return [self.placed, *(self.done[name] for name in STEPS), self.failed, self.undone]


@dataclass
class Mediated(Shop):
    """The mediator topology."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.commands = {name: fresh_topic(self.cluster, 2, StepCommand) for name in (*STEPS, FRAUD)}
        self.mediator = Mediator(
            self.placed,
            fresh_topic(self.cluster, 2, StepReply),
            store_topic(self.cluster, 2, ProcessState),
            [self.process(1, *STEPS)],
        )

    def process(self, version: int, *steps: str) -> OrderProcess:
        return OrderProcess(
            *("order", version),
            tuple(ProcessStep(name, self.commands[name], timeout=600.0, retry=blocking(0.05)) for name in steps),
        )

    def processor(self, step: str) -> Consumer:
        one = self.steps[step]
        return replace(self.mediator.processor(step, one.do, one.cancel, one.undo, "one"), commit_interval=0.02)

    @contextmanager
    def topology(self) -> Iterator[None]:
        with Member(self.mediator.consumer("one", 0.02)):
            yield

    @property
    def topics(self) -> list[Topic[Any]]:
        return orders.topics_of(self.mediator)


@pytest.fixture(params=[Chain, Mediated], ids=["broker", "mediator"])
def shop(request: pytest.FixtureRequest, cluster: Cluster, dsn: str) -> Iterator[Callable[..., Shop]]:
    """Makes a shop in either topology: `shop(ship={3})` has a step that fails for good for some orders."""
    made: list[Shop] = []

    def make(**refuses: set[int]) -> Shop:
        made.append(request.param(cluster, dsn, refuses))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def chain(cluster: Cluster, dsn: str) -> Iterator[Callable[..., Chain]]:
    """The same in the broker topology."""
    made: list[Chain] = []

    def make(**refuses: set[int]) -> Chain:
        made.append(Chain(cluster, dsn, refuses))
        return made[-1]

    yield make
    for one in made:
        one.close()


def completed(*numbers: int, steps: tuple[str, ...] = STEPS) -> Counter[tuple[str, str, str]]:
    """The effects of orders that have gone through all steps."""
    return Counter((step, "done", f"order-{number}") for step in steps for number in numbers)


def compensated(*numbers: int, steps: tuple[str, ...]) -> Counter[tuple[str, str, str]]:
    """Those of orders for which these steps were done, and undone."""
    return Counter(
        (step, what, f"order-{number}") for step in steps for what in ("done", "undone") for number in numbers
    )


# -- both topologies ---------------------------------------------------------------------------------------------------


def test_each_order_ends_the_same_way_in_both_topologies(shop: Callable[..., Shop]) -> None:
    """correctness 42: each effect once; of an order that a step fails for good, those before it are undone."""
    made = shop(charge={5}, ship={2, 7})
    made.place(*range(9))
    with made.topology(), made.running():
        made.wait_effects(completed(0, 1, 3, 4, 6, 8) + compensated(2, 7, steps=("charge", "reserve")))
    charge = {one.id: one for one in orders.placed_orders(range(9))}
    for one in made.steps["charge"].all():
        sign = 1 if one.what == "done" else -1
        assert one.amount == sign * sum(item.cents for item in charge[one.order].items)
    standing = {effect.id for effect in made.steps["charge"].effects()}
    assert standing == {f"order-{number}" for number in (0, 1, 3, 4, 6, 8)}
    assert len(made.steps["charge"].effects()) == len(standing)
    assert sum(one.amount for one in made.steps["reserve"].all()) == -sum(
        one.amount for one in made.steps["ship"].all()
    )


@pytest.mark.long  # notebook 07 has it
def test_what_orders_have_cost_on_their_way_is_told_by_the_topics(shop: Callable[..., Shop]) -> None:
    """Messages of each order, by topic, the time they took, and where one stands."""
    made = shop(ship={1})
    made.place(0, 1)
    with made.topology(), made.running():
        made.wait_effects(completed(0) + compensated(1, steps=("charge", "reserve")))
    found = orders.journeys(made.topics)
    assert found.keys() == {"order-0", "order-1"}
    if isinstance(made, Chain):
        channels = {name: topic.short for name, topic in made.done.items()}
        first = Counter({made.placed.short: 1, **{channels[name]: 1 for name in STEPS}})
        second = Counter({made.placed.short: 1, channels["charge"]: 1, channels["reserve"]: 1, made.failed.short: 1})
        assert found["order-0"].messages == first
        assert found["order-1"].messages == second + Counter({made.undone.short: 2})
        last = made.done["invoice"].short
    else:
        assert isinstance(made, Mediated)
        commands = Counter({topic.short: 1 for name, topic in made.commands.items() if name in STEPS})
        timeouts, replies = made.mediator.timeouts(600.0).short, made.mediator.replies.short
        states = found["order-0"].messages.pop(made.mediator.store.short)
        assert states in (4, 5)  # the last reply may not have been heard
        assert found["order-0"].messages == commands + Counter({made.placed.short: 1, timeouts: 4, replies: 4})
        last = replies
    for journey in found.values():
        assert 0 < journey.seconds < 60
    where = orders.where_is("order-0", made.topics)
    assert where.read == sum(one.messages.total() for one in orders.journeys(made.topics).values())
    assert last in [topic for _, topic in where.events]
    assert [at for at, _ in where.events] == sorted(at for at, _ in where.events)
    assert (where.events[0][0], where.events[-1][0]) == (found["order-0"].began, found["order-0"].ended)


class PackedProcess(Process):
    script = "packed_member.py"


@pytest.mark.parametrize(
    ("shop", "what"),
    [
        pytest.param(Chain, "done", id="broker-done"),
        pytest.param(Chain, "undone", id="broker-undone", marks=pytest.mark.long),
        pytest.param(Mediated, "done", id="mediator-done", marks=pytest.mark.long),
        pytest.param(Mediated, "undone", id="mediator-undone"),
    ],
    indirect=["shop"],
)
def test_a_processor_that_is_killed_between_its_two_commits_has_its_effect_once(
    shop: Callable[..., Shop], what: str
) -> None:
    """correctness 42: its database has committed, Kafka has not. It is asked again, and goes on."""
    made = shop(reserve={1})
    made.place(1, 2)
    with made.topology():
        if what == "undone":
            with made.running("charge"):
                made.wait_done("charge", 1, 2)
        with made.running("reserve", "ship", "invoice"):
            packed = pack(made.processor("charge")).hex()
            with PackedProcess(made.placed, "", packed=packed, crash_at=Step.HANDLED.value) as crashed:
                assert crashed.ends(60) == -9
            assert any(effect[:2] == ("charge", what) for effect in made.effects())
            with made.running("charge"):
                made.wait_effects(completed(2) + compensated(1, steps=("charge",)))


# -- a step ------------------------------------------------------------------------------------------------------------


def test_a_step_has_its_effect_once_however_often_it_is_asked(dsn: str) -> None:
    step = OrderStep("charge", dsn)
    (order,) = orders.placed_orders([4])
    assert step.state(order.id) is None
    for _ in range(2):
        step.undo(order.id, order)  # there is nothing to undo
        assert step.all() == []
    for _ in range(2):
        step.do(order.id, order)
        assert step.cancel(order.id) == "done"
    assert [(one.order, one.what) for one in step.all()] == [(order.id, "done")]
    for _ in range(2):
        step.undo(order.id, order)
        assert step.cancel(order.id) == "cancelled"
    assert [one.what for one in step.all()] == ["done", "undone"]
    assert step.effects() == []
    with pytest.raises(Refused):
        step.do(order.id, order)
    assert sum(one.amount for one in step.all()) == 0
    step.close()


def test_what_is_cancelled_or_refused_is_never_done(dsn: str) -> None:
    """Not even by a step that refuses it no more."""
    step = OrderStep("charge", dsn)
    first, second = orders.placed_orders([1, 2])
    assert step.cancel(first.id) == "cancelled"
    with pytest.raises(Refused):
        step.do(first.id, first)
    strict = replace(step, refuses=partial(among, {2}))
    for one in (strict, step):
        with pytest.raises(Refused):
            one.do(second.id, second)
    assert step.all() == []
    step.close()
    strict.close()


def test_to_which_end_orders_have_come(dsn: str) -> None:
    """What a verdict goes by: an effect that is missing, or there twice, shows by the names of the steps."""
    steps = {name: OrderStep(name, dsn) for name in ("charge", "ship")}
    charge, ship = steps.values()
    placed = list(orders.placed_orders(range(7)))
    whole, half, twice, refused, undone, _unknown, other = placed
    for one in (whole, half, twice, undone, other):
        charge.do(one.id, one)
    for one in (whole, twice, other):
        ship.do(one.id, one)
    with psycopg.connect(dsn) as database:  # nothing keeps who forgets from it
        database.execute("insert into ship (order_id, what, amount, at) values (%s, 'done', 1, 0)", (twice.id,))
    charge.cancel(refused.id)
    charge.undo(undone.id, undone)
    assert orders.outcomes(steps, [one.id for one in placed if one is not other]) == {
        whole.id: "completed",
        half.id: "charge",
        twice.id: "charge, ship 2 times",
        refused.id: "taken back",
        undone.id: "taken back",
    }
    for step in steps.values():
        step.close()


@pytest.mark.parametrize("done", [True, False])
def test_a_step_that_is_done_and_cancelled_at_once(dsn: str, done: bool) -> None:
    """Somebody else is in the middle of doing it, which he then commits or not: whoever cancels waits for that."""
    step = OrderStep("charge", dsn)
    (order,) = orders.placed_orders([1])
    assert step.state(order.id) is None  # it makes the tables
    answers: list[str] = []
    with psycopg.connect(dsn) as somebody:
        somebody.execute("insert into charge_orders values (%s, 'done')", (order.id,))
        second = threading.Thread(target=lambda: answers.append(step.cancel(order.id)))
        second.start()
        with psycopg.connect(dsn, autocommit=True) as database:
            sql = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            wait_until(lambda: database.execute(sql).fetchall(), 20, "the second one to wait for the first")
        (somebody.commit if done else somebody.rollback)()
    second.join(20)
    assert answers == ["done" if done else "cancelled"]
    step.close()


# -- one more step, while orders are under way -------------------------------------------------------------------------


@pytest.mark.long  # notebook 07 adds it in both
def test_a_fraud_check_added_to_the_broker_topology_touches_no_running_consumer(chain: Callable[..., Chain]) -> None:
    """correctness 42: it reads what was placed from the first order on. What it fails is taken back wherever it is: an
    order that is through, one that is under way, one that comes later."""
    made = chain(**{FRAUD: {1, 3, 5}})
    with made.running("charge", "reserve") as running:
        made.place(1, 2)
        made.wait_done("reserve", 1, 2)
        with made.running("ship", "invoice"):
            made.wait_done("invoice", 1, 2)
        made.place(3, 4)  # under way: nobody ships
        made.wait_done("reserve", 3, 4)
        before = {name: list(member.journal.of(Step.ASSIGNED)) for name, member in running.items()}
        with made.running(FRAUD):
            made.place(5, 6)
            with made.running("ship", "invoice"):
                refused = ["order-1", "order-3", "order-5"]
                over = [partial(made.steps[name].state, one) for name in STEPS for one in refused]
                wait_until(lambda: all(state() in ("cancelled", "undone") for state in over), 60, "the end of those")
                done = made.effects()
                expected = completed(2, 4, 6, steps=(*STEPS, FRAUD)) + compensated(1, steps=STEPS)
                for number in (3, 5):  # some have heard of the failure before they were asked, some after
                    heard_after = tuple(name for name in STEPS if (name, "done", f"order-{number}") in done)
                    expected += compensated(number, steps=heard_after)
                made.wait_effects(expected)
        assert {("charge", "undone", "order-3"), ("reserve", "undone", "order-3")} <= done.keys()
        for name, member in running.items():
            assert member.journal.of(Step.ASSIGNED) == before[name]
            assert not member.journal.of(Step.REVOKED) + member.journal.of(Step.FAILED)
    for step in STEPS:
        assert {effect.id for effect in made.steps[step].effects()} == {"order-2", "order-4", "order-6"}


@pytest.mark.long  # test_mediator.py has another version
def test_a_fraud_check_is_one_more_step_of_the_mediators_next_version(cluster: Cluster, dsn: str) -> None:
    """correctness 42: orders under way end without it, new ones go through it."""
    made = Mediated(cluster, dsn, {FRAUD: {3}})
    with made.running("charge", "reserve"):
        with made.topology():
            made.place(1)
            made.wait_done("reserve", 1)
        made.mediator = replace(
            made.mediator, processes=[*made.mediator.processes, made.process(2, "charge", FRAUD, *STEPS[1:])]
        )
        with made.running(FRAUD, "ship", "invoice"), made.topology():
            made.place(2, 3)
            expected = completed(1, 2) + completed(2, steps=(FRAUD,)) + compensated(3, steps=("charge",))
            made.wait_effects(expected)
    made.close()


def test_a_failure_that_overtakes_has_the_order_never_done(chain: Callable[..., Chain]) -> None:
    """correctness 42: `failed` comes to a step before the event that would have it done."""
    made = chain()
    early = next(orders.placed_orders([1]))
    made.failed.send(OrderEvent(early.id, FRAUD, early, "too expensive"), early.id)
    made.failed.flush()
    with made.running():
        wait_until(lambda: all(made.steps[name].state(early.id) == "cancelled" for name in STEPS), 30, "all to hear")
        made.place(1, 2)
        made.wait_effects(completed(2))
        wait_until(lambda: orders.journeys([made.failed])[early.id].messages.total() == 2, 30, "charge to say so")
    with Reader(made.failed) as reader:
        assert sorted(record.value.step for record in reader.read_to_end()) == ["charge", FRAUD]
    assert made.effects() == completed(2)


def test_a_step_waits_for_its_database_however_long_it_is_away(chain: Callable[..., Chain]) -> None:
    """Nobody would ask for an order again that is among the dead letters."""
    policy = chain().processor("charge").retry
    assert policy.blocks.delay(1_000_000) is not None
    assert not policy.is_final(psycopg.OperationalError())


def test_what_is_no_event_is_a_dead_letter_and_the_next_order_goes_on(chain: Callable[..., Chain]) -> None:
    """Also an order that the database cannot take."""
    made = chain()
    with made.running():
        for topic in (made.placed, made.failed):
            put(topic, b"no JSON", b"{}", partition=0)
        made.placed.send(None, "order-1")
        made.placed.send(OrderPlaced("order-\0-1", "customer", []), "order-1")
        made.place(2)
        made.wait_effects(completed(2))
        for topic, many in ((made.placed, 4), (made.failed, 2)):
            with DeadLetters(topic, made.done["charge"].name) as letters:
                wait_until(lambda letters=letters, many=many: len(letters) == many, 30, "its letters")


def test_a_replayed_failure_is_taken_for_one(chain: Callable[..., Chain]) -> None:
    """It comes through a topic of its own."""
    made = chain()
    with made.running("charge"):
        made.place(1)
        made.wait_done("charge", 1)
    (order,) = orders.placed_orders([1])
    made.failed.send(OrderEvent(order.id, "ship", order, "no parcels"), order.id)
    made.failed.flush()
    present, group = made.steps["charge"], made.done["charge"].name
    made.steps["charge"] = replace(present, dsn=made.dsn + " port=1")  # its database is away
    with Member(replace(made.processor("charge"), retry=dead_letter())), DeadLetters(made.failed, group) as letters:
        wait_until(lambda: len(letters) == 1, 30, "a letter")
    made.steps["charge"] = present
    with made.running("charge"), DeadLetters(made.failed, group) as letters:
        letters.replay()
        made.wait_effects(compensated(1, steps=("charge",)))
        wait_until(lambda: not letters, 30, "the letter to go")


def test_channels_that_make_no_chain_are_refused(chain: Callable[..., Chain]) -> None:
    made = chain()
    step, after, done = made.steps["ship"], made.done["reserve"], made.done["ship"]
    with pytest.raises(LabkitError, match="values of OrderEvent"):
        orders.event_processor(step, after, made.placed, made.failed, made.undone)  # type: ignore[arg-type]
    with pytest.raises(LabkitError, match="four topics"):
        orders.event_processor(step, done, done, made.failed, made.undone)
