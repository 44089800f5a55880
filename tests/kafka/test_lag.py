"""Lag as the broker knows it."""

from __future__ import annotations

import pytest
from consuming import Member, commit, fresh_group, fresh_topic, put, trim

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.lag import committed_offsets, end_offsets, lag, start_offsets


def test_lag_counts_from_the_beginning_until_something_is_committed(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster, 2), fresh_group()
    put(topic, 1, 2, 3, partition=0)
    assert lag(cluster, group, [topic.name]) == {(topic.name, 0): 3, (topic.name, 1): 0}
    assert committed_offsets(cluster, group) == {}
    commit(topic, group, 1)
    assert lag(cluster, group, [topic.name]) == {(topic.name, 0): 2, (topic.name, 1): 0}


def test_lag_is_zero_once_all_is_handled(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster, 2), fresh_group()
    for partition in (0, 1):
        put(topic, *range(20), partition=partition)
    with Member(Consumer(topic, lambda record: None, group)) as member:
        member.wait_committed({0: 20, 1: 20})
    assert set(lag(cluster, group, [topic.name]).values()) == {0}


def test_lag_is_never_negative(cluster: Cluster) -> None:
    topic, group = fresh_topic(cluster), fresh_group()
    commit(topic, group, 50)
    assert lag(cluster, group, [topic.name]) == {(topic.name, 0): 0}


def test_of_an_offset_out_of_range_all_records_are_still_to_be_read(cluster: Cluster) -> None:
    """correctness 32: lag is what the group has still to read: it goes on with the first record there is."""
    topic, group = fresh_topic(cluster), fresh_group()
    put(topic, *range(60))
    commit(topic, group, 100)
    assert lag(cluster, group, [topic.name]) == {(topic.name, 0): 60}
    commit(topic, group, 60)
    assert lag(cluster, group, [topic.name]) == {(topic.name, 0): 0}
    commit(topic, group, 10)
    trim(topic, 50)
    assert lag(cluster, group, [topic.name]) == {(topic.name, 0): 10}


def test_a_topic_that_is_gone_has_no_lag_and_no_offsets(cluster: Cluster) -> None:
    topic = fresh_topic(cluster)
    missing = f"{topic.name}.missing"
    assert lag(cluster, fresh_group(), [missing, topic.name]) == {(topic.name, 0): 0}
    assert end_offsets(cluster, [missing]) == start_offsets(cluster, [missing]) == {}


def test_a_topic_that_goes_while_it_is_asked_for_counts_as_empty(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = fresh_topic(cluster)
    put(topic, 1, 2)
    missing = f"{topic.name}.missing"
    monkeypatch.setattr(Cluster, "topics", lambda self: {topic.name: 1, missing: 2})  # what was true a moment ago
    assert end_offsets(cluster, [topic.name, missing]) == {(topic.name, 0): 2, (missing, 0): 0, (missing, 1): 0}
