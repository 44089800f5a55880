"""A run of a lab: a name for everything it makes, and a record of it, so that what a dead run left can be collected.

Names are `labkit.<learner>.<notebook>.<run id>.<short name>` and never used again: a topic deleted and made anew
under a running consumer silently loses records. Whatever has such a name is the run's, and goes with it.
"""

from __future__ import annotations

import calendar
import fcntl
import getpass
import os
import re
import shutil
import time
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError, NotAllowed
from labkit.kafka.topics import Topic
from labkit.patterns.own_topics import taken_apart
from labkit.runtime.home import state_dir

LEARNER = "LABKIT_LEARNER"
CAPS = {"learner": 20, "notebook": 30, "name": 40}  # a retry topic holds a group and a topic: 249 characters in all
NAMESPACE = re.compile(r"labkit\.[a-z0-9-]+\.[a-z0-9-]+\.[0-9]{12}[0-9a-f]{4}\.")  # of a run's names
CLASS_TOPIC = re.compile(r"labkit\.([a-z0-9-]+)\.class")  # no run's, but the learner's: see labkit.lab.results
FORGET = 30 * 86400.0  # seconds after which a record is dropped whose cluster has not been seen again


class _Made(msgspec.Struct):
    cluster_id: str
    prefix: str
    process: int
    started: float
    private: bool = False


class Run:
    """One run's names. Its file is locked for as long as this process lives.

    `private`: its cluster ends with it, so that nothing has to be deleted there.
    """

    def __init__(self, notebook: str, cluster_id: str, private: bool = False) -> None:
        self.id = time.strftime("%y%m%d%H%M%S", time.gmtime()) + os.urandom(2).hex()
        self.prefix = f"labkit.{learner()}.{plain(notebook, 'notebook')}.{self.id}."
        self._made = _Made(cluster_id, self.prefix, os.getpid(), time.time(), private=private)
        self._path = _folder() / f"{self.id}.json"
        self._ended = False
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        os.pwrite(self._file, msgspec.json.encode(self._made), 0)

    def name(self, short: str) -> str:
        """The full name of `short`. Raises LabkitError for one that Kafka would not take."""
        if not short or short != plain(short, "name"):
            raise LabkitError(
                f"{short!r} cannot be a name: use lower-case letters, digits and '-', at most {CAPS['name']} of them"
            )
        return self.prefix + short

    def create(self, topic: Topic[Any], config: Mapping[str, str]) -> None:
        """Make a topic of this run. Raises NotAllowed, which says what to ask for, and what `Topic.create` raises."""
        try:
            topic.create(config)
        except NotAllowed as error:
            prefix = ".".join(self.prefix.split(".")[:2]) + "."
            raise NotAllowed(
                f"{str(error).rstrip('.')}. {allowance('Create', 'topics', prefix)} If the cluster allows you another "
                f"prefix, labkit.NAME., set {LEARNER} to that name"
            ) from error

    @property
    def folder(self) -> Path:
        """A folder for this run's files, made when first asked for. It goes with the run's record."""
        folder = self._path.with_suffix("")
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def end(self, cluster: Cluster, wait: float = 0.0) -> None:
        """Delete this run's topics and groups, and its record. What cannot be deleted the next run collects.

        A group can be deleted once its last member has left, or its session is over: 6 s after it was killed. `wait`
        is how many seconds there are for that.
        """
        if self._ended:
            return
        until = time.monotonic() + wait
        shutil.rmtree(self._path.with_suffix(""), ignore_errors=True)
        try:
            while _delete(cluster, [self._made]):
                if time.monotonic() >= until:
                    return
                time.sleep(0.1)
            _drop(self._path)
            self._ended = True
        except LabkitError:
            pass
        finally:
            self.forget()

    def forget(self) -> None:
        """Let the record's lock go: from now on the run counts as dead."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def collect(cluster: Cluster, cluster_id: str) -> list[str]:
    """Delete what dead runs left on this cluster; returns their prefixes. Only runs recorded here are touched."""
    dead: dict[Path, _Made] = {}
    with ExitStack() as held:
        for path, made, lives in _records(held, fcntl.LOCK_EX):
            if lives:
                continue
            if made.cluster_id == cluster_id and not made.private:
                dead[path] = made
            elif made.private or time.time() - made.started > FORGET:
                _drop(path)
        try:
            left = _delete(cluster, dead.values())
        except LabkitError:
            return []  # not to be had now
        for path, made in dead.items():
            if made.prefix not in left:
                _drop(path)
    return [made.prefix for made in dead.values()]


def _drop(path: Path) -> None:
    folder = path.with_suffix("")
    door = folder / "control"
    if door.is_symlink():  # where its path would have been too long for a socket, `Control` made it a folder of its own
        shutil.rmtree(door.readlink().parent, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    path.unlink(missing_ok=True)


def living() -> list[tuple[str, int]]:
    """The runs that live now, in any process: prefix and process id."""
    with ExitStack() as held:
        return [(made.prefix, made.process) for _, made, lives in _records(held) if lives and made.prefix]


def recorded() -> set[str]:
    """The prefixes of all runs that this machine has a record of, dead ones too."""
    with ExitStack() as held:
        return {made.prefix for _, made, _ in _records(held)}


def folder_of(run_id: str) -> Path:
    """The folder of a run's files, whoever has it."""
    return _folder() / run_id


def plain(text: str, what: str) -> str:
    """`text` as a part of a Kafka name: lower-case letters, digits and dashes, capped. An accent is left out."""
    return _plain(text)[: CAPS[what]].strip("-")


def _plain(text: str) -> str:
    letters = re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text.casefold()))
    return re.sub(r"[^a-z0-9]+", "-", letters).strip("-")


def learner(name: str = "") -> str:
    """The learner's part of names: of this name, else of LABKIT_LEARNER, else of the user's name.

    It is never empty, whatever alphabet they write their name in. Long names that differ only in their end stay
    different: a checksum stands for what is cut off.
    """
    try:
        name = name or os.environ.get(LEARNER) or getpass.getuser()
    except (KeyError, OSError):  # in a container a user may have no name
        name = f"u{os.getuid()}"
    part, most = _plain(name), CAPS["learner"]
    if 0 < len(part) <= most:
        return part
    checksum = f"{zlib.crc32(os.fsencode(name)):08x}"
    return f"{part[: most - 9].strip('-')}-{checksum}" if part else f"u{checksum}"


def known_as(origin: str) -> str:
    """The learner's name, for a line about a Kafka of this origin, with a hint where others may have the same one."""
    hint = f" ({LEARNER} is not set, so this is your user name: set it to a name that nobody else on this cluster has)"
    return f"as {learner()}{hint if origin == 'external' and not os.environ.get(LEARNER) else ''}"


def allowance(operation: str, what: str, prefix: str) -> str:
    """What to ask of those who keep a cluster that forbids something."""
    return f"Ask for {operation} on {what} that begin with {prefix} (an ACL whose pattern type is PREFIXED)."


def prefix_of(name: str) -> str | None:
    """The prefix of the run that a topic or a group belongs to; None if no run made it.

    A topic that a run's group has beside somebody else's topic is the run's too, unless its name is so long that it
    holds the group by its digest.
    """
    found = NAMESPACE.match(taken_apart(name)[1]) or NAMESPACE.match(name)  # beside another run's topic, too
    return found and found[0]


def by_run(names: Iterable[str]) -> defaultdict[str, list[str]]:
    """Names of topics or groups by the prefix of their run; those of no run are left out."""
    found = defaultdict(list)
    for name in names:
        if prefix := prefix_of(name):
            found[prefix].append(name)
    return found


def began(run_id: str) -> float | None:
    """When the run of this id began, in Unix seconds; None if its id does not say it."""
    try:
        return float(calendar.timegm(time.strptime(run_id[:12], "%y%m%d%H%M%S")))
    except ValueError:  # somebody's own name that looks like a run's
        return None


def short_names(text: str) -> str:
    """A text in which what runs made goes by its short name."""
    return NAMESPACE.sub("", text)


def _delete(cluster: Cluster, runs: Iterable[_Made]) -> set[str]:
    """Delete the topics and groups of runs. Returns the prefixes of runs with a group that has to wait for its last
    member's session to end."""
    prefixes = {made.prefix for made in runs if not made.private}
    if not prefixes:
        return set()
    cluster.delete_topics([name for name in cluster.topics() if prefix_of(name) in prefixes])
    cluster.delete_groups([name for name in cluster.groups() if prefix_of(name) in prefixes])
    return prefixes & {prefix_of(name) for name in cluster.groups()}


def _records(held: ExitStack, lock: int = fcntl.LOCK_SH) -> Iterator[tuple[Path, _Made, bool]]:
    """Every run's record, and whether the run lives. One that does not is locked for us until `held` ends: shared by
    those who only look, or a run that has ended would live for one of two who look at the same time."""
    for path in _folder().glob("*.json"):
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # somebody else has just collected it
        held.callback(os.close, file)
        try:
            fcntl.flock(file, lock | fcntl.LOCK_NB)
            lives = False
        except BlockingIOError:
            lives = True
        status = os.fstat(file)
        try:  # by its path it could be another file by now, or none
            yield path, msgspec.json.decode(os.pread(file, status.st_size, 0), type=_Made), lives
        except msgspec.DecodeError:  # being made now; or its process died then, before it had made anything else
            yield path, _Made("", "", 0, status.st_mtime), lives


def _folder() -> Path:
    folder = state_dir() / "runs"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
