"""Kafka's jars: fetched once by exact Maven coordinates, and checked against committed SHA-256s at every start."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labkit.kafka.errors import LabkitError
from labkit.runtime.home import cache_dir, locked

KAFKA = "4.3.1"
TRIES = 3  # to fetch a jar
MTIME = 1_000_000_000  # any fixed time, as Java's AOT cache depends on it: a jar fetched anew is still the same jar
LIST = Path(__file__).with_name(f"kafka-{KAFKA}.jars")
STREAMS = Path(__file__).with_name(f"kafka-streams-{KAFKA}.jars")
CONNECT = Path(__file__).with_name(f"kafka-connect-{KAFKA}.jars")
DEBEZIUM = Path(__file__).with_name("debezium-3.7.0.Final.jars")
LISTS = {"Apache Kafka": LIST, "Kafka Streams": STREAMS, "Kafka Connect": CONNECT, "Debezium": DEBEZIUM}
"""Lists by their names in messages. All but the first only have what is needed beside Kafka's jars."""
_CONNECT = ("Kafka Connect", "Debezium")
NOTEBOOKS = {
    "consume-and-project": ("01", ("Apache Kafka", *_CONNECT)),
    "end-to-end": ("02", ("Apache Kafka", *_CONNECT)),
    "key-value-store": ("03", ("Apache Kafka",)),
    "events-in-transactions": ("05", ("Apache Kafka",)),
    "event-aggregation": ("06", ("Kafka Streams",)),
}
"""By the name of its lab: a notebook's number, and the lists that it needs on any Kafka, for one of its own or in a
section."""


@dataclass(frozen=True)
class Jar:
    """One line of the list: Maven coordinates and the SHA-256 of the file."""

    group: str
    artifact: str
    version: str
    classifier: str
    sha256: str

    @property
    def file_name(self) -> str:
        return "-".join(filter(None, (self.artifact, self.version, self.classifier))) + ".jar"

    def is_intact(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


class JarsMissing(LabkitError):
    """Jars are not on this machine, and could not be fetched."""


Fetch = Callable[[Jar, Path], Path]  # puts the jar somewhere below the folder, and returns its path


def read_list(path: Path = LIST) -> list[Jar]:
    """The jars of the class path, in its order."""
    jars = []
    for line in path.read_text().splitlines():
        coordinates, sha256 = line.split()
        group, artifact, version, *classifier = coordinates.split(":")
        jars.append(Jar(group, artifact, version, "".join(classifier), sha256))
    return jars


def streams_jars(rocksdb: bool) -> list[Path]:
    """Kafka's jars and those of Kafka Streams. RocksDB has 73 MB, so it is fetched only on demand."""
    return jar_files() + jar_files(jars=_streams(rocksdb), what="Kafka Streams")


def connect_jars() -> list[Path]:
    """Kafka's jars, those of Kafka Connect with MirrorMaker, and Debezium's for PostgreSQL."""
    return jar_files() + jar_files(what="Kafka Connect") + jar_files(what="Debezium")


def fetch(what: str, source: Path | None = None) -> Path:
    """Fetch what is missing of a list, so that no network is needed later: from the jars of a bundle, if `source` is
    their folder. Returns the folder. Raises JarsMissing.
    """
    copied = None if source is None else _copied(source / LISTS[what].stem)
    return jar_files(jars=_of_notebooks(what), fetch=copied, what=what)[0].parent


def missing(notebook: str = "") -> list[str]:
    """The lists that are not all here, those that this notebook needs or all. It looks at names only."""
    wanted = NOTEBOOKS[notebook][1] if notebook in NOTEBOOKS else () if notebook else tuple(LISTS)
    return [what for what in wanted if not all((_folder(what) / jar.file_name).exists() for jar in _of_notebooks(what))]


def _of_notebooks(what: str) -> list[Jar]:
    return _streams(rocksdb=False) if what == "Kafka Streams" else read_list(LISTS[what])


def _streams(rocksdb: bool) -> list[Jar]:
    return [jar for jar in read_list(STREAMS) if rocksdb or jar.artifact != "rocksdbjni"]


def _folder(what: str) -> Path:
    return cache_dir() / "jars" / LISTS[what].stem


def jar_files(
    folder: Path | None = None,
    jars: Sequence[Jar] | None = None,
    fetch: Fetch | None = None,
    what: str = "Apache Kafka",
) -> list[Path]:
    """The paths of the jars, every one checked (0.1 s). Those that are missing or damaged are fetched first.

    Raises JarsMissing when that is impossible, saying what to do instead.
    """
    folder = folder or _folder(what)
    jars = read_list(LISTS[what]) if jars is None else jars
    paths = [folder / jar.file_name for jar in jars]
    if _broken(jars, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"), _quiet("jgo", "urllib3"):  # another process may be fetching them right now
            if broken := _broken(jars, folder):
                _fetch_all(broken, folder, fetch or _maven(), what)
    return paths


def _broken(jars: Sequence[Jar], folder: Path) -> list[Jar]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        intact = pool.map(lambda jar: jar.is_intact(folder / jar.file_name), jars)
        return [jar for jar, good in zip(jars, intact, strict=True) if not good]


def _fetch_all(jars: Sequence[Jar], folder: Path, fetch: Fetch, what: str) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    def get(jar: Jar) -> None:
        for _ in range(TRIES - 1):
            try:
                fetched = fetch(jar, below)
                break
            except OSError:  # one connection in a hundred breaks off
                continue
        else:
            fetched = fetch(jar, below)
        if not jar.is_intact(fetched):
            raise ValueError("its SHA-256 is not the one in labkit's list: refused")
        os.utime(fetched, (MTIME, MTIME))
        os.replace(fetched, folder / jar.file_name)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("jars"))
    for unfinished in folder.glob(".fetch-*/"):  # left by a killed process
        shutil.rmtree(unfinished, ignore_errors=True)
    below = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder))
    pool = ThreadPoolExecutor(8)
    try:
        with Progress(*columns, transient=True) as progress:
            version = LISTS[what].stem.rpartition("-")[2]
            task = progress.add_task(f"Fetching {what} {version} (once)", total=len(jars))
            futures = {pool.submit(get, jar): jar for jar in jars}
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, Exception):
                    raise JarsMissing(_what_to_do(futures[future], error, folder, what)) from error
                future.result()
                progress.advance(task)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(below, ignore_errors=True)


def _maven() -> Fetch:
    """Download from Maven Central through jgo: the files themselves, with no POM and no resolving."""
    from jgo.maven import MavenContext

    def fetch(jar: Jar, below: Path) -> Path:
        component = MavenContext(repo_cache=below).project(jar.group, jar.artifact).at_version(jar.version)
        return Path(component.artifact(classifier=jar.classifier, packaging="jar").resolve())

    return fetch


def _copied(folder: Path) -> Fetch:
    return lambda jar, below: Path(shutil.copy(folder / jar.file_name, below))


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence these loggers: our own error says it, once."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _what_to_do(jar: Jar, error: Exception, folder: Path, what: str) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"{what} could not be fetched: {jar.file_name} ({jar.group}): {reason}\n"
        "Run `labkit fetch` once where there is a network: from then on none is needed. "
        f"Or copy the jars listed in {LISTS[what]} into {folder}"
    )
