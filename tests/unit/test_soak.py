"""What `make soak` judges by can fail: the order of first deliveries, and that there was chaos at all."""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import soak

from labkit.kafka.cluster import Cluster
from labkit.kafka.records import CAUSE
from labkit.kafka.topics import Topic
from labkit.lab.pods.pod import PodState
from labkit.runtime.server import ServerState

WORK = Topic(Cluster("127.0.0.1:1"), "work", 1, soak.Work)


def wrong(order: Literal["partition", "key"], made: Iterable[tuple[str, int]]) -> list[str]:
    """What is said of effects in partition 0, by their key and the offset of the record that made them."""
    records = [
        SimpleNamespace(place=f"done/0/{n}", partition=0, offset=n, key=key, headers={CAUSE: f"work/0/{cause}"})
        for n, (key, cause) in enumerate(made)
    ]
    return soak.disorder(WORK, cast(Any, records), order)


def test_two_first_deliveries_that_are_swapped_are_found() -> None:
    assert wrong("partition", [("a", 0), ("a", 2), ("a", 1), ("a", 3)]) == ["done/0/2, made by work/0/1 after 2"]
    assert wrong("key", [("a", 0), ("b", 3), ("a", 2), ("a", 1)]) == ["done/0/3, made by work/0/1 after 2"]


def test_what_comes_again_is_in_order_and_so_are_other_keys() -> None:
    assert wrong("partition", [("a", 0), ("a", 1), ("b", 2), ("a", 1), ("b", 2), ("a", 3)]) == []
    assert wrong("key", [("b", 3), ("a", 1), ("a", 2), ("b", 4)]) == []


def chaos(act: Any) -> soak.Chaos:
    """Every fault calls `act`."""
    pod = SimpleNamespace(state=PodState.RUNNING, kill=act, freeze=act, slow=act, restart=act, recover=str)
    pods = SimpleNamespace(pods=[pod], scale=act)
    broker = SimpleNamespace(state=ServerState.RUNNING, kill=act, freeze=act, restart=act, recover=str)
    return soak.Chaos(cast(Any, SimpleNamespace(broker=broker)), cast(Any, pods), random.Random(1))


def test_chaos_that_ends_early_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(soak, "CALM", (0.0, 0.0))
    begun = chaos(broken)
    begun.thread.join(10)
    begun.peace()
    assert "oops" in begun.too_little(1)
    assert "ZeroDivisionError: oops" in capsys.readouterr().err


def test_a_long_run_without_one_of_the_main_faults_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "CALM", (60.0, 60.0))  # so none of its own
    begun = chaos(lambda *_: None)
    begun.peace()
    assert begun.too_little(soak.LONG) == "these never struck: kill, freeze, scale, kill_broker"
    assert begun.too_little(1) == ""
    begun.done.update(soak.MAIN)
    assert begun.too_little(soak.LONG) == ""
