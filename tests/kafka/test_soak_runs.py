"""`make soak` runs, on next to nothing: a few faults, and every record accounted for."""

from __future__ import annotations

import pytest
import soak


@pytest.mark.long
@pytest.mark.parametrize("guarantee", ["at least once", "exactly once"])
def test_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], guarantee: soak.Guarantee
) -> None:
    monkeypatch.setattr(soak, "CALM", (0.1, 0.4))
    passed = soak.soak(seed=1, records=1_500, rate=300, guarantee=guarantee)
    told = capsys.readouterr().out
    assert passed, told
    assert "1500 sent" in told.replace(",", "")
    assert "faults: " in told
