"""The door by which a terminal reaches a lab, without a lab."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from labkit.kafka.errors import LabkitError
from labkit.lab.faults.control_socket import Answer, Control, Order, ask
from labkit.lab.faults.service import Service
from labkit.lab.faults.target import Target
from labkit.lab.history import History


class Noted:
    """A service that notes what it is told."""

    understands = ("errors", "status", "delay", "cut")
    told: Mapping[str, object] = {}

    def tell(self, service: str, told: Mapping[str, object]) -> None:
        if told.get("delay") == 7:
            raise RuntimeError("a bug")
        self.told = told


@pytest.mark.parametrize("length", [10, 150], ids=["short", "longer than a socket's path may be"])
def test_an_order_is_done_and_answered_until_the_lab_ends(tmp_path: Path, length: int) -> None:
    folder = tmp_path / ("x" * length)
    folder.mkdir(mode=0o700)
    till = Service("till", switch := Noted(), History())
    targets: dict[str, Target] = {"till": till}
    control = Control(folder, lambda: targets)
    door = Path(os.path.realpath(folder / "control"))
    assert stat.S_IMODE(door.parent.stat().st_mode) == 0o700, "for this user alone"
    said = ask(folder, Order("till", "slow", {"by": 2}))
    assert said == Answer(said="slow till: it is misbehaving")
    assert switch.told == {"delay": 2.0}
    told = ask(folder, Order())
    assert told
    assert [(one.target, one.can, one.stands) for one in told.targets] == [
        ("till", ["fail", "slow", "cut", "recover"], ["slow till by 2 s"])
    ]
    ask(folder, Order("till", "cut", {"count": 3}))
    assert till.history.faults[-1].text == "cut 3 connections of till"
    refused = ask(folder, Order("bank", "slow"))
    assert refused
    assert refused.refused == "there is no bank here; there are: till"
    broken = ask(folder, Order("till", "slow", {"by": 7}))
    assert broken
    assert broken.refused == "RuntimeError: a bug", "whoever asks is not left without an answer"
    control.close()
    assert ask(folder, Order()) is None
    assert door.parent == folder or not door.parent.exists()


@pytest.mark.parametrize("question", [b"nonsense\n", b"", b'{"target": 7}\n'])
def test_nonsense_is_refused(tmp_path: Path, question: bytes) -> None:
    control = Control(tmp_path, dict)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.path.realpath(tmp_path / "control"))
            client.sendall(question)
            client.shutdown(socket.SHUT_WR)
            assert b'"refused":"' in client.recv(65536)
        assert ask(tmp_path, Order()) == Answer()
    finally:
        control.close()


def test_a_lab_whose_kernel_is_frozen_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.lab.faults.control_socket.LOOK", 0.1)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as door:
        door.bind(os.path.join(folder, "control"))
        door.listen()  # it connects, and nobody answers
        with pytest.raises(LabkitError, match="is it frozen"):
            ask(Path(folder), Order())
