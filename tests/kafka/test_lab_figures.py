"""Several groups on one topic, and the figures a notebook asks a lab for."""

from __future__ import annotations

import itertools
import math
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from lab_helpers import Order, orders, wait_said
from processes import wait_until

from labkit import Lab
from labkit.kafka import Consumer
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.lab.board import sampler
from labkit.lab.board.panels import panel, replica_panels
from labkit.lab.pods.travel import CannotTravel
from labkit.runtime.which_kafka import Connection

pytestmark = pytest.mark.usefixtures("connection")


@pytest.fixture(scope="module")
def lab(connection: Connection) -> Iterator[Lab]:
    with Lab("figures") as lab:
        yield lab


@pytest.mark.long
def test_of_several_groups_on_a_topic_each_has_its_lag_and_the_topic_that_of_the_last(lab: Lab) -> None:
    """As when several views are made of one topic."""
    topic = lab.topic("orders", 1, Order)

    def stuck(record: object) -> None:
        threading.Event().wait()

    lab.deploy("quick", Consumer(topic, lambda record: None))
    lab.deploy("stuck", Consumer(topic, stuck))
    lab.load(topic, orders(20), rate=1000).wait()
    wait_until(lambda: lab.figure("behind", "quick") == 0 and lab.figure("behind", "stuck") == 20, 20, "both lags")
    wait_until(lambda: lab.figure("lag", "orders/0") == 20, 20, "the lag of the topic")
    same = [one for one in lab._history.samples if (one.metric, one.label) == ("lag", "orders/0")]
    assert len({one.time for one in same}) == len(same)  # one value at a time, or lines would jump up and down
    for deployment in lab.deployments.values():
        deployment.close()


def test_a_figure_that_nobody_has_measured_is_no_number(lab: Lab) -> None:
    assert math.isnan(lab.figure("requests/s", "nobody"))


@pytest.mark.long
def test_waiting_ends_with_the_condition_or_says_what_for(lab: Lab) -> None:
    looks: list[int] = []

    def fourth() -> bool:
        looks.append(1)
        if len(looks) == 2:
            raise ConnectionRefusedError("a service that only starts")
        return len(looks) == 4

    lab.wait_until(fourth, "four looks")
    assert len(looks) == 4
    with pytest.raises(ZeroDivisionError):  # a mistake, which no waiting mends
        lab.wait_until(lambda: 1 / 0, "nonsense")
    with pytest.raises(LabkitError, match=r"not within 0 s: five of them \(\[\]\)"):
        lab.wait_until(list, "five of them", 0)

    def away() -> bool:
        raise ConnectionRefusedError("nobody listens")

    talks = lab.deploy(
        "talks", Consumer(lab.topic("talk", 1, Order), lambda record: print("heard of", record.value.id))
    )
    lab.load(talks.topics[0], orders(1)).wait()
    wait_said(talks, "heard of 0")
    with pytest.raises(LabkitError) as late:
        lab.wait_until(away, "the end of time", 0.1)
    said = str(late.value).splitlines()
    assert said[0] == "not within 0.1 s: the end of time (ConnectionRefusedError: nobody listens)"
    assert repr(talks) in said
    assert any("talks-0: heard of 0" in line for line in said)
    talks.close()


def test_values_without_the_id_are_told_and_hide_nothing_else(lab: Lab) -> None:
    topic = lab.topic("shipped", 1, dict)
    for value in ({"id": 1}, {"order": 2}, {"id": 3}):
        topic.send(value)
    topic.flush()
    lab.board(completed=topic, lag=lab.deploy("ships", Consumer(topic, print)))
    wait_until(lambda: lab.figure("completed", "shipped") == 2, 20, "the two with an id")
    wait_until(lambda: "has no field 'id': name its id by by=" in lab._status([]), 20, "the one without")
    lab.board(completed=topic, lag=lab.deployments["ships"], by=lambda value: "one for all")
    wait_until(lambda: lab.figure("completed", "shipped") == 1, 20, "the count by another id")
    wait_until(lambda: "no field" not in lab._status([]), 20, "nothing to complain of")


class Silent(msgspec.Struct):
    """A value that cannot be shown, and an id that only some of them have."""

    id: int

    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("by", ["order", "id", lambda value: 6 // value.id])
def test_an_id_that_cannot_be_had_hides_nothing_else(lab: Lab, by: Any) -> None:
    """correctness 36: the values that were read together with it were not counted."""
    topic = lab.topic(f"silent-{uuid.uuid4().hex[:8]}", 1, Silent)
    for number in (0, 1, 2):
        topic.send(Silent(number))
    topic.flush()
    tally = sampler.Tally(topic, by)
    counts = {"order": 0, "id": 3}.get(by, 2)

    def is_counted() -> bool:
        tally.read()
        return tally.completed == counts and bool(tally.trouble) == (by != "id")

    wait_until(is_counted, what="those that have an id, and a word about the others")
    tally.close()


@pytest.mark.long
def test_a_kafka_that_is_away_is_waited_for_once_in_a_sample(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the picture would stand still for ten seconds for each group, in the middle of what it should show."""
    seen: list[str] = []

    def away(*_: object) -> None:
        seen.append("asked")
        raise ClusterUnreachable("no answer")

    topic = lab.topic("many", 1, Order)
    for name in ("one", "two", "three"):
        lab.deploy(name, Consumer(topic, print))
    monkeypatch.setattr(lab._sampler, "_look", lambda: seen.append("sample"))
    monkeypatch.setattr(sampler, "lag", away)
    wait_until(lambda: seen.count("asked") > 5, 10, "several samples")
    monkeypatch.undo()
    assert ("asked", "asked") not in itertools.pairwise(seen)


def test_what_a_panel_reads_is_a_figure_and_what_is_no_number_hides_nothing_else(lab: Lab) -> None:
    seen = itertools.count()
    odd = panel("Odd", {"none": lambda: None, "nan": lambda: math.nan, "text": lambda: "soon"})  # type: ignore[dict-item, return-value]
    lab.board(panels=[odd, panel("Broken", lambda: 1 / 0), panel("Even Count", lambda: next(seen))])
    wait_until(lambda: lab.figure("even count") > 1, 20, "two samples")
    assert not [sample for sample in lab._history.samples if sample.metric in ("odd", "broken")]
    wait_until(lambda: "broken: ZeroDivisionError" in lab._status([]), 10, "the status line")
    lab.board(panels=[panel("Broken", lambda: 7)])
    wait_until(lambda: lab.figure("broken") == 7, 20, "the function of the newer board")


def test_a_board_needs_something_to_show_and_no_pods(lab: Lab) -> None:
    board = lab.board(panels=[panel("Sevens", lambda: 7)])
    board.start()
    assert board._pods is None
    board.close()
    with pytest.raises(LabkitError, match="a board needs something to show"):
        lab.board()


def test_a_struct_of_the_notebook_is_no_value_of_a_topic(lab: Lab) -> None:
    class Parcel(msgspec.Struct):
        id: int

    for value in (Parcel, list[Parcel], Parcel | None):
        with pytest.raises(CannotTravel, match=r"Parcel is a msgspec Struct of this notebook.*`@dataclass` above"):
            lab.topic("parcels", value=value)  # type: ignore[arg-type]
    assert "parcels" not in lab.topics
    assert lab.topic("parcels", value=Order | None)  # type: ignore[arg-type]


def test_each_panel_of_replicas_can_stand_alone(lab: Lab) -> None:
    topic = lab.topic("replicated", 2)
    leaders, in_sync = ([*one.readers.values()] for one in replica_panels(topic, ["Kafka 1"]))
    assert [read() for read in in_sync] == [1, 1]
    assert [read() for read in leaders] == [2]
