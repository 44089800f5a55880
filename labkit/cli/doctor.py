"""`labkit doctor`: checks everything that a lab needs, and says how to fix it. Never ends in a traceback itself."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path

import typer

from labkit.cli.output import Json, say_json

OLDEST, NEWEST = (3, 11), (3, 14)
DISK_MB = 1000  # jars 45, AOT cache 65, a broker's data and logs for a workshop
MEMORY_MB = 1000  # a broker 330, a kernel 200, a few pods 60 each
REMAKE = "make the environment anew: `make clean lab` (or pip install 'labkit[lab]')"
OTHER_KAFKA = (
    "is KAFKA_BOOTSTRAP_SERVERS or KAFKA_CLIENT_CONFIG set: correct or unset it; "
    "else `labkit down`, which removes the broker's data, and try again; or `docker compose up -d`"
)

Check = Callable[[], str]  # returns what it found


@dataclass(frozen=True)
class Finding:
    """What a check found, and the fix if that is a problem."""

    check: str
    text: str
    fix: str = ""


class Problem(Exception):
    """A check has failed: what is wrong, and the fix."""

    def __init__(self, text: str, fix: str) -> None:
        super().__init__(text)
        self.fix = fix


def examine(checks: dict[str, tuple[Check, str]]) -> Iterator[Finding]:
    """Run every check. The fix of each is for failures that it did not foresee."""
    from labkit.kafka.errors import LabkitError, error_text

    for name, (check, fix) in checks.items():
        try:
            yield Finding(name, check())
        except Problem as problem:
            yield Finding(name, str(problem), problem.fix)
        except LabkitError as error:
            yield Finding(name, str(error), fix)
        except Exception as error:
            yield Finding(name, f"the check itself failed: {error_text(error)}", fix)


def examine_own_cluster() -> Iterator[Finding]:
    """Run the checks of a cluster that is named. Whether it answers, the check `Kafka` has said."""
    from labkit.cli.own_cluster import OwnCluster
    from labkit.kafka.errors import LabkitError
    from labkit.lab.runs import Run
    from labkit.runtime.which_kafka import connect, is_named

    if is_named():
        with suppress(LabkitError), connect() as connection:
            run = Run("doctor", connection.cluster_id)
            try:
                yield from examine(OwnCluster(connection, run).checks())
            finally:
                run.end(connection.cluster)


def python() -> str:
    """The version is right, and everything that labkit depends on can be loaded."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise Problem(
            f"Python {version} at {sys.executable}; labkit needs 3.11–3.14",
            "install one of these and name it: make clean lab PYTHON=/path/to/python3.13",
        )
    needed = [line for line in metadata.requires("labkit") or [] if "extra ==" not in line]
    _load(re.split(r"[^\w.-]", line)[0].replace("-", "_") for line in needed)
    return f"{version} at {sys.executable}"


def java() -> str:
    from labkit.runtime.java import find_java

    found = find_java()
    done = subprocess.run([found.path, "-version"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Problem(
            f"{found.path} does not run: {(done.stderr or done.stdout).strip()[:200]}",
            "set LABKIT_JAVA_HOME to the folder of a Java 17 or newer",
        )
    return f"{found.version} at {found.path}"


def jars() -> str:
    """What is missing is no problem where there is a network: it is fetched when it is first needed."""
    from labkit.runtime.jars import NOTEBOOKS, missing

    lines = []
    for what in missing():
        numbers = [number for number, needs in NOTEBOOKS.values() if what in needs]
        lines.append(f"{what} is not here yet: needed by notebook {', '.join(numbers)}")
    return "\n".join([*lines, "`labkit fetch` brings it before the network is gone"]) if lines else "all are here"


def kafka() -> str:
    from labkit.runtime.which_kafka import connect

    with connect() as connection:
        return f"answers at {connection.cluster.bootstrap} ({connection.origin})"


def jupyter() -> str:
    _load(("jupyterlab", "ipywidgets", "ipykernel", "matplotlib", "pandas", "cloudpickle"))
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    from jupyter_core.paths import jupyter_path

    if not any(Path(one, "@jupyter-widgets", "jupyterlab-manager").is_dir() for one in jupyter_path("labextensions")):
        raise Problem("JupyterLab lacks the extension that draws widgets", REMAKE)
    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel as error:
        raise Problem("there is no kernel python3", REMAKE) from error
    if Path(command).name != command and Path(command).absolute() != Path(sys.executable).absolute():
        raise Problem(
            f"the kernel python3 runs {command}, not this environment",
            "`jupyter kernelspec remove python3` removes it for your user; `labkit lab` prefers its own",
        )
    return f"JupyterLab {metadata.version('jupyterlab')}, widgets {metadata.version('ipywidgets')}"


def memory() -> str:
    import psutil

    megabytes = psutil.virtual_memory().available // 1_000_000
    if megabytes < MEMORY_MB:
        raise Problem(f"{megabytes:,} MB are available; a lab needs {MEMORY_MB:,}", "close other programs")
    return f"{megabytes:,} MB available"


def disk() -> str:
    """Both folders have room, and can be written to: it tries that, as permission bits do not say everything."""
    from labkit.runtime.home import CACHE, STATE, cache_dir, state_dir

    found = []
    for variable, folder in {CACHE: cache_dir(), STATE: state_dir()}.items():
        megabytes = shutil.disk_usage(folder).free // 1_000_000
        if megabytes < DISK_MB:
            raise Problem(
                f"{megabytes:,} MB are free in {folder}; a lab needs {DISK_MB:,}",
                f"free some, or set {variable} to a folder on another disk",
            )
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise Problem(
                f"{folder} cannot be written to: {error.strerror}",
                f"make it writable, or set {variable} to a folder that is",
            ) from error
        found.append(f"{megabytes:,} MB free in {folder}")
    return "; ".join(found)


def _load(names: Iterable[str]) -> None:
    """Import these modules: an installed one may still lack a library of the system."""
    failed = []
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            failed.append(f"{name} ({error})")
    if failed:
        raise Problem(f"cannot be loaded: {', '.join(failed)}", REMAKE)


CHECKS: dict[str, tuple[Check, str]] = {
    "Python": (python, REMAKE),
    "Java": (java, "`make clean lab` brings one along; or set LABKIT_JAVA_HOME to a Java 17 or newer"),
    "Kafka": (kafka, OTHER_KAFKA),
    "jars": (jars, "run `labkit fetch` where there is a network"),
    "JupyterLab": (jupyter, REMAKE),
    "memory": (memory, REMAKE),
    "disk": (disk, "make the folder writable, or set LABKIT_CACHE or LABKIT_STATE to one that is"),
}


def doctor(as_json: Json = False) -> None:
    """Check everything that a lab needs; the exit code is 1 if something is wrong.

    Starts the broker if none runs. In a cluster of your own it makes topics, and deletes them.
    """
    findings = []
    for finding in itertools.chain(examine(CHECKS), examine_own_cluster()):
        findings.append(finding)
        if not as_json:
            mark = "PROBLEM" if finding.fix else "ok"
            typer.echo(f"{mark:<7}  {finding.check + ':':<11} {_indented(finding.text)}")
            if finding.fix:
                typer.echo(f"         {'fix:':<11} {_indented(finding.fix)}")
    problems = [finding.check for finding in findings if finding.fix]
    if as_json:
        say_json({"healthy": not problems, "checks": [asdict(finding) for finding in findings]})
    else:
        typer.echo(f"\nTo look into: {', '.join(problems)}." if problems else "\nEverything is there.")
    if problems:
        raise typer.Exit(1)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n" + " " * 21)
