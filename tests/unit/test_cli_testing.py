"""`labkit test` counts honestly: nothing that failed, hung or was left out in CI can pass."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import typer

from labkit.cli import testing

PYTEST = (*testing.PYTEST, "-p", "no:cacheprovider")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "test_suite.py"
    file.write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): raise ValueError('\\x1b[31mred\\x1b[0m')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
        "def test_skipped(): pytest.skip('no browser')\n"
    )
    return file


def test_counts_of_a_test_run(suite: Path) -> None:
    result = testing.run("unit", (*PYTEST, str(suite)), 60)
    assert (result.passed, result.failed, result.skipped) == (1, 2, 1)


def test_why_a_test_failed_is_said_again_in_the_end(
    suite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = testing.Part(((*PYTEST, str(suite)), ("-c", "print('and much more')")), 60)
    monkeypatch.setattr(testing, "PARTS", {"unit": part})
    with pytest.raises(typer.Exit):
        testing.run_tests(["unit"])
    said = capsys.readouterr().out
    assert said.count("FAILED ") == 2
    end = said[said.index("lint-imports") :]  # how a command is called that is no module
    assert "test_suite.py::test_fails\n" in end
    assert "E   ValueError: red\n" in end  # without colours
    assert "test_suite.py::test_error\n" in end
    assert end.endswith("2 passed, 2 failed, 1 skipped\n")


def test_a_skipped_browser_test_has_failed_in_ci(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (*PYTEST, f"{suite}::test_passes", f"{suite}::test_skipped")
    monkeypatch.delenv("CI", raising=False)
    assert testing.run("browser", command, 60).skipped == 1
    monkeypatch.setenv("CI", "true")
    result = testing.run("browser", command, 60)
    assert (result.passed, result.failed, result.skipped) == (1, 1, 0)


def test_a_run_without_any_test_has_failed(tmp_path: Path) -> None:
    assert testing.run("unit", (*PYTEST, str(tmp_path)), 60).failed == 1


def test_a_run_that_dies_before_it_reports_has_failed() -> None:
    command = (*testing.PYTEST, "--no-such-option")
    assert testing.run("unit", command, 60).failed == 1


def test_a_command_that_hangs_is_ended() -> None:
    start = time.monotonic()
    result = testing.run("lint", ("-c", "import time; time.sleep(100)"), 0.5)
    assert result.failed == 1
    assert time.monotonic() - start < 20


def test_commands_get_no_kafka_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    code = (
        "import os, sys\n"
        'sys.exit("KAFKA_BOOTSTRAP_SERVERS" in os.environ or "labkit-test-" not in os.environ["LABKIT_STATE"])'
    )
    assert testing.run("lint", ("-c", code), 60).passed == 1
