"""Defects of the mediator that a review found: each of these tests fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from consuming import Member
from mediating import Orders, process
from processes import wait_until

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import TopicMissing
from labkit.patterns.dead_letters import DeadLetters


def test_a_timeout_that_is_a_sum_of_delays_has_a_topic(cluster: Cluster, tmp_path: Path) -> None:
    """Ten times 0.1 is a bit less than 1: its topic is called 1000ms, and what is made is 1s."""
    orders = Orders(cluster, tmp_path, timeout=sum([0.1] * 10))
    orders.consumer().prepare()
    there = orders.cluster.topics()
    for step in orders.mediator.newest.steps:
        assert orders.mediator.timeouts(step.timeout).name in there


def test_a_step_without_a_topic_is_told_before_an_order_gets_there(cluster: Cluster, tmp_path: Path) -> None:
    orders = Orders(cluster, tmp_path)
    commands = {**orders.commands, "reserve": replace(orders.commands["reserve"], name="test.not-there")}
    orders.mediator = replace(orders.mediator, processes=[process(commands)])
    with pytest.raises(TopicMissing):
        orders.consumer().prepare()


def test_what_becomes_of_an_order_whose_first_step_has_no_topic(cluster: Cluster, tmp_path: Path) -> None:
    """As it is: nobody who asks the mediator for states or dead letters hears of it."""
    orders = Orders(cluster, tmp_path)
    commands = {**orders.commands, "charge": replace(orders.commands["charge"], name="test.not-there")}
    orders.mediator = replace(orders.mediator, processes=[process(commands)])
    orders.place("a1")
    orders.consumer().prepare()
    with Member(orders.consumer()), DeadLetters(orders.mediator.initial, orders.mediator.group) as letters:
        wait_until(lambda: len(letters) == 1, 60, "a letter of the initial event")
        with orders.mediator.dead_letters() as shown:
            told = [one.error for one in letters.values()]
            assert shown or orders.states(), f"neither states nor the mediator's dead letters show it: {told}"
