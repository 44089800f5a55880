"""Names of runs: every learner gets one that Kafka takes."""

from __future__ import annotations

import getpass
import os
from contextlib import ExitStack

import pytest

from labkit.lab import runs


@pytest.mark.parametrize(
    ("name", "part"), [("Ada L.", "ada-l"), ("Jörg Müßig", "jorg-mussig"), ("юля", "u6c0da25d"), ("…", "u5111434a")]
)
def test_every_learner_has_a_name(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runs.LEARNER, name)
    run = runs.Run("names", "no-cluster")
    run._path.unlink()
    run.forget()
    assert run.prefix == f"labkit.{part}.names.{run.id}."


def test_names_that_differ_stay_different() -> None:
    names = ["Müller", "Möller", "l" * 199, "l" * 200, "workshop-attendee-number-1", "workshop-attendee-number-2"]
    parts = {runs.learner(name) for name in names}
    assert len(parts) == len(names)
    assert max(map(len, parts)) == runs.CAPS["learner"]


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no username set")])
def test_a_user_without_a_name_goes_by_their_number(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise error

    monkeypatch.delenv(runs.LEARNER, raising=False)
    monkeypatch.setattr(getpass, "getuser", nobody)
    run = runs.Run("names", "no-cluster")
    run._path.unlink()
    run.forget()
    assert run.prefix.startswith(f"labkit.u{os.getuid()}.names.")


def test_a_dead_run_is_dead_for_two_who_look_at_the_same_time() -> None:
    run = runs.Run("looked-at", "no-cluster")
    assert run.prefix in dict(runs.living())
    run.forget()
    with ExitStack() as held:
        assert [*runs._records(held)]
        assert run.prefix not in dict(runs.living())
    run._path.unlink()
