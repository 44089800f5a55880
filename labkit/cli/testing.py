"""`labkit test`: everything that checks labkit, each part in processes of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from labkit.cli.lab import ROOT
from labkit.cli.output import say_table
from labkit.kafka.errors import LabkitError

PYTEST = ("-m", "pytest", "-ra", "--durations=12", "--durations-min=2")
# Two at once, each with a broker of its own: most of a test is waiting for sessions, back-offs and processes.
TWO = ("-n", "2", "--dist", "worksteal")
# nbval: in order, so nothing may shuffle; `lax` compares the outputs of marked cells only; warnings of the notebook
# machinery itself are not ours to fix.
NBVAL = (
    *(*PYTEST, "-p", "no:randomly", "-W", "default", "--timeout=300"),
    *("--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=60"),
)
LAST = 20  # lines that are said again, in the end, of a test that failed
COLOUR = re.compile(r"(\x1b|#x1B)\[[0-9;]*m")  # of a notebook's traceback, as XML has it too
PACE = "10"  # notebooks are paced for people; tests send the same records faster
# Settings of the person who runs the tests that would lead them to another Kafka.
OUTSIDE = ("KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLIENT_CONFIG")


@dataclass(frozen=True)
class Part:
    """Commands that are run one after another, failed or not, and the seconds each may take."""

    commands: tuple[tuple[str, ...], ...]
    seconds: float


PARTS = {
    "lint": Part(
        (
            ("-m", "ruff", "check", "."),
            ("-m", "ruff", "format", "--check", "."),
            ("-m", "mypy"),
            ("-c", "from importlinter.cli import lint_imports_command as lint; lint()"),
        ),
        300,
    ),
    "unit": Part(((*PYTEST, *TWO, "tests/unit"),), 600),
    "kafka": Part(((*PYTEST, *TWO, "tests/kafka"),), 2400),
    "notebooks": Part(
        ((*NBVAL, "notebooks"), (*PYTEST, *TWO, "-p", "no:randomly", "--timeout=300", "tests/notebooks")), 2400
    ),
    "browser": Part(((*PYTEST, "-p", "no:randomly", "--timeout=300", "tests/browser"),), 900),
}


@dataclass(frozen=True)
class Result:
    """What one command came to. A command that is no test runner counts as one test."""

    part: str
    command: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    reasons: tuple[str, ...] = ()
    """Of each test that failed: its name, and the last lines of what it said."""


@dataclass(frozen=True)
class Report:
    """What a JUnit report says; errors count as failures."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()


def run_tests(
    parts: Annotated[
        list[str] | None, typer.Argument(help=f"Which parts: {', '.join(PARTS)}. All of them by default.")
    ] = None,
) -> None:
    """Run the tests, each command printed before it runs; exit code 1 if any fails."""
    chosen = parts or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        raise LabkitError(f"there is no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if not (ROOT / "tests").is_dir():
        raise LabkitError(f"there are no tests in {ROOT}: `labkit test` runs in a clone of the repository")
    if find_spec("pytest") is None:
        raise LabkitError("pytest is not installed here: pip install 'labkit[lab,test]', or use `make test`")
    from labkit.runtime.connect import composed

    if composed():
        raise LabkitError("the broker of docker-compose.yml runs, and tests would use it: `docker compose stop` first")
    results = [
        run(part, command, PARTS[part].seconds) for part in PARTS if part in chosen for command in PARTS[part].commands
    ]
    for reason in (reason for result in results for reason in result.reasons):
        typer.echo(f"\n{reason}")  # here, where one looks first: what is above may be an hour of output
    typer.echo()
    say_table(
        ("part", "passed", "failed", "skipped", "seconds", "command"),
        ((r.part, r.passed, r.failed, r.skipped, round(r.seconds), r.command) for r in results),
    )
    passed, failed, skipped = (sum(getattr(r, count) for r in results) for count in ("passed", "failed", "skipped"))
    typer.echo(f"\n{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    if failed:
        raise typer.Exit(1)


def run(part: str, command: tuple[str, ...], seconds: float) -> Result:
    """Run one command of a part, with a state folder, so a broker, of its own."""
    shown = " ".join(command[1:] if command[0] == "-m" else ("lint-imports",))
    typer.echo(f"\n$ {shown}")
    sys.stdout.flush()
    is_pytest = command[: len(PYTEST)] == PYTEST
    start = time.monotonic()
    with _own_state() as (environment, folder):
        report = folder / "report.xml"
        more = [f"--junitxml={report}", "--override-ini=junit_family=xunit1"] if is_pytest else []  # which names files
        if part in ("notebooks", "browser"):
            environment.setdefault("LABKIT_PACE", PACE)
        code = _call([sys.executable, *command, *more], environment, seconds)
        told = read_report(report) if is_pytest else Report(int(code == 0), int(code != 0))
    failed, skipped = told.failed, told.skipped
    if code and not failed:  # it ended without saying which test: counted all the same
        failed = 1
        typer.echo(f"labkit: the command ended with exit code {code}", err=True)
    if part == "browser" and skipped and os.environ.get("CI") == "true":
        typer.echo("labkit: in CI a browser test that is skipped has failed", err=True)
        failed, skipped = failed + skipped, 0
    return Result(part, shown, told.passed, failed, skipped, time.monotonic() - start, told.reasons)


def read_report(path: Path) -> Report:
    """Read a JUnit report; an empty one, when it was never written."""
    try:
        root = ElementTree.parse(path).getroot()  # noqa: S314  written by the pytest we just ran
    except (OSError, ElementTree.ParseError):
        return Report()
    suites = list(root.iter("testsuite"))
    total, errors, failures, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "errors", "failures", "skipped")
    )
    failed = errors + failures
    reasons = [
        _reason(f"{case.get('file') or case.get('classname')}::{case.get('name')}", said.text or "")
        for case in root.iter("testcase")
        for said in (*case.iter("failure"), *case.iter("error"))
    ]
    return Report(max(0, total - failed - skipped), failed, skipped, tuple(reasons))


def _reason(name: str, said: str) -> str:
    """The end of what a test said: the exception, and the last of what led there."""
    lines = [line.rstrip() for line in COLOUR.sub("", said).strip().splitlines()]
    return "\n".join((f"FAILED {name}", *(f"    {line}" for line in lines[-LAST:] if line)))


def _call(command: list[str], environment: dict[str, str], seconds: float) -> int:
    """The command's exit code; past its time it is ended with all it started."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        typer.echo(f"labkit: not done after {seconds:g} s, ended", err=True)
        return 1
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    import psutil

    if process.poll() is None:
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            tree = []
        for one in tree:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                pass
    process.wait()


@contextmanager
def _own_state() -> Iterator[tuple[dict[str, str], Path]]:
    """An environment in which nothing reaches the user's running broker; what is started there ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="labkit-test-"))
    (folder / "state").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in OUTSIDE}
    environment |= {"LABKIT_STATE": str(folder / "state"), "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONUNBUFFERED": "1"}
    try:
        yield environment, folder
    finally:
        if (folder / "state" / "broker.json").exists():
            down = "from labkit.runtime import shared; shared.stop()"
            subprocess.run([sys.executable, "-c", down], env=environment, timeout=60, check=False)
        shutil.rmtree(folder, ignore_errors=True)
