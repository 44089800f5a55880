"""The command line as a shell sees it: at once there, errors in one message, exit codes, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labkit.cli.main import app
from labkit.cli.names import Name, newest, resolve
from labkit.kafka.errors import LabkitError

LABKIT = [sys.executable, "-c", "from labkit.cli.main import app; app()"]


def labkit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LABKIT, *arguments],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from labkit.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'confluent_kafka', 'jupyterlab', 'jupyter_client', 'pandas', 'matplotlib', 'msgspec', 'psutil'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "doctor" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_every_command_has_help() -> None:
    commands = ("lab", "doctor", "up", "down", "status", "topics", "lag", "class", "clean", "blocked", "fault")
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_errors_are_one_message_and_exit_code_1(tmp_path: Path) -> None:
    done = labkit("topics", LABKIT_STATE=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("labkit: no Kafka is running: `labkit up`")
    assert "Traceback" not in done.stderr


def test_status_without_a_broker(tmp_path: Path) -> None:
    done = labkit("status", LABKIT_STATE=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "No Kafka is running; `labkit up` starts one.\n")
    done = labkit("status", "--json", LABKIT_STATE=str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)) == (1, {"running": False})


def test_down_without_a_broker(tmp_path: Path) -> None:
    done = labkit("down", LABKIT_STATE=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "No embedded broker was running.\n")


def test_a_state_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = labkit("status", LABKIT_STATE=str(tmp_path / "file"))
    assert done.returncode == 1
    assert "LABKIT_STATE" in done.stderr
    assert "Traceback" not in done.stderr


# -- names of topics and groups

OLD, NEW = "labkit.ada.start-here.261123090000aaaa.", "labkit.ada.start-here.261124090000bbbb."
BOBS = "labkit.bob.start-here.261125090000cccc."


@pytest.fixture
def _i_am_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_LEARNER", "Ada")


def test_a_name_is_taken_apart() -> None:
    assert Name.parse(f"{NEW}orders.retry.5") == Name(
        f"{NEW}orders.retry.5", "ada", "start-here", "261124090000bbbb", "orders.retry.5"
    )
    assert Name.parse("somebody.elses").short == "somebody.elses"
    beside = Name.parse(f"orders_{NEW}shop_lanes")
    assert (beside.learner, beside.short) == ("ada", "orders_shop_lanes"), "of ada's group, beside a topic of others"


@pytest.mark.usefixtures("_i_am_ada")
def test_a_short_name_is_the_newest_of_ones_own_runs() -> None:
    names = [f"{NEW}orders", f"{OLD}orders", f"{OLD}gone", f"{BOBS}orders", f"{BOBS}bills", "bills", "stock"]
    for wanted, meant in (("orders", f"{NEW}orders"), ("gone", f"{OLD}gone"), ("bills", "bills"), ("stock", "stock")):
        assert resolve("topic", wanted, names).full == meant
    for full in names:
        assert resolve("topic", full, names).full == full, "a full name is anybody's"
    for wanted, meant in (("orders", f"{BOBS}orders"), ("bills", f"{BOBS}bills")):
        assert resolve("topic", wanted, names, "Bob").full == meant
    for not_bobs in ("stock", f"{NEW}orders"):
        with pytest.raises(LabkitError, match=r"there are: bills, orders$"):
            resolve("topic", not_bobs, names, "Bob")
    assert resolve("topic", "orders", [*names, "orders"]).full == f"{NEW}orders", "one's own before the company's"


@pytest.mark.usefixtures("_i_am_ada")
def test_a_name_that_means_nothing_of_ones_own_says_what_there_is() -> None:
    with pytest.raises(LabkitError, match=r"there is no topic called 'oders'; there are: orders, other$"):
        resolve("topic", "oders", [f"{NEW}orders", f"{BOBS}bills", "other"])
    with pytest.raises(LabkitError, match=r"ada has no topic called 'bills'; bob has one: add --learner bob$"):
        resolve("topic", "bills", [f"{NEW}orders", f"{BOBS}bills"])
    with pytest.raises(
        LabkitError, match=r"eve has no topic called 'orders'; ada and bob have one: add --learner ada$"
    ):
        resolve("topic", "orders", [f"{NEW}orders", f"{BOBS}orders"], "eve")


def test_newest_leaves_out_older_runs_of_the_same_notebook() -> None:
    other = "labkit.ada.retries.261101090000cccc.orders"
    names = [f"{OLD}orders", f"{NEW}orders", other, "plain"]
    assert [name.full for name in newest(names)] == [f"{NEW}orders", other, "plain"]
