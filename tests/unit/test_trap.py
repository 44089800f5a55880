"""A trap catches one pod at the step that is armed."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest

from labkit.kafka.consumer.steps import Step
from labkit.kafka.producer import POD
from labkit.lab.faults import trap as trapped
from labkit.lab.faults.trap import Trap


def test_an_armed_step_kills_one_process(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "trap", Step.FLUSHED)
    trap(Step.COMMITTED, None)  # is not armed
    caught = multiprocessing.get_context("fork").Process(target=trap, args=(Step.FLUSHED, None))
    caught.start()
    caught.join(20)
    assert caught.exitcode == -signal.SIGKILL
    trap(Step.FLUSHED, None)  # is armed no more


def test_a_caught_pod_is_named_and_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POD, "checkout-1")
    monkeypatch.setattr(trapped, "HOLD", 0.0)
    trap = Trap(tmp_path / "trap", kill=False)
    for _ in range(2):
        trap.arm(Step.FLUSHED)
        assert trap.caught(Step.FLUSHED) == ""
        trap(Step.FLUSHED, None)
        assert trap.caught(Step.FLUSHED) == "checkout-1"
