"""Which lanes are blocked, and what to do about it: seen and said from anywhere that reaches Kafka.

A running consumer writes into a store what it cannot get past. Who looks at that store may tell it to skip a record, or
all that fail, until told to resume; it hears of that at once, in the middle of any back-off. A skip names topic,
partition and offset, leaves a trace in a topic, and is taken back once its record is committed: it never fires again.
"""

from __future__ import annotations

import getpass
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec

from labkit.kafka.errors import LabkitError, place_of
from labkit.kafka.producer import Producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import encode
from labkit.kafka.steps import Failure
from labkit.kafka.topics import Topic
from labkit.patterns.group_entries import GroupEntries
from labkit.patterns.key_value_store import KeyValueStore
from labkit.patterns.trails import error_text, own_topic, text_of

LANES, SKIPS = "lanes", "skips"  # what the two topics are called
SHOWN = 1000  # characters of a value that are shown
TAKEN = 10.0  # seconds for a consumer to do what it was told


class Blocked(msgspec.Struct, frozen=True, tag=True):
    """A record that its lane cannot get past."""

    topic: str
    partition: int
    offset: int
    key: str | None
    value: str | None
    since: float
    attempts: int
    next_attempt: float
    error: str
    member: str
    """Who holds it: a pod, or a host and process."""

    @property
    def place(self) -> str:
        """`topic/partition/offset`."""
        return place_of(self.topic, self.partition, self.offset)


class Skip(msgspec.Struct, frozen=True, tag=True):
    """A command: let this record be, or whatever fails."""

    by: str
    at: float


Entry: TypeAlias = Blocked | Skip


class Skipped(msgspec.Struct, frozen=True):
    """The trace of a skip."""

    by: str
    at: float
    topic: str
    partition: int
    offset: int
    key: str | None
    value: str | None
    attempts: int
    error: str


def lanes_topic(topic: Topic[Any], group: str) -> Topic[Entry]:
    """The compacted topic in which blocked lanes and commands are kept."""
    return Topic(topic.cluster, own_topic(topic.name, group, LANES), 1, Blocked | Skip)  # type: ignore[arg-type]


def skips_topic(topic: Topic[Any], group: str) -> Topic[Skipped]:
    """Where every skip leaves its trace."""
    return Topic(topic.cluster, own_topic(topic.name, group, SKIPS), 1, Skipped)


def _skip_key(place: str) -> str:
    return f"skip {place}"


def _skip_all_key(partition: str = "") -> str:
    return f"skip all {partition}".strip()


# -- Seen from outside -------------------------------------------------------------------------------------------------


class BlockedLanes(GroupEntries[Blocked]):
    """The records at which a group is blocked on a topic, by place, and the commands about them.

    Raises TopicMissing when no consumer with retries ever ran there.
    """

    def __init__(self, topic: Topic[Any], group: str) -> None:
        super().__init__(topic, group, lanes_topic(topic, group))
        self._skips = skips_topic(topic, group)
        self._me = f"{getpass.getuser()}@{socket.gethostname()}"

    def _now(self) -> dict[str, Blocked]:
        found = [entry for entry in self.store.snapshot().values() if isinstance(entry, Blocked)]
        return {one.place: one for one in sorted(found, key=lambda one: one.since)}

    @property
    def skipping(self) -> bool:
        """Whether all that fails is skipped, somewhere."""
        return any(key.startswith(_skip_all_key()) for key in self.store.snapshot())

    def skip(self, place: str, timeout: float = TAKEN) -> Blocked:
        """Let the record at `topic/partition/offset` be, once. Returns what was skipped, once it was.

        Raises LabkitError when that record is not what its lane is blocked by, or nobody does it within `timeout`.
        """
        now = self._now()
        if (one := now.get(place)) is None:
            here = [other for other in now if other.rpartition("/")[0] == place.rpartition("/")[0]]
            what = f"there it is {', '.join(here)}" if here else f"blocked are {', '.join(now) or 'none'}"
            raise LabkitError(f"group {self.group} is not blocked by {place}: {what}")
        self.store.put(_skip_key(place), Skip(self._me, time.time()))
        self._wait(lambda: place not in self._now(), timeout, f"skip {place}")
        return one

    def skip_all(self, partition: str = "", timeout: float = TAKEN) -> int:
        """Skip every record that fails, in `topic/partition` or everywhere, from now on until `resume`.

        Returns how many were blocked, once these are skipped. Raises LabkitError when nobody does it.
        """
        now = {place for place in self._now() if not partition or place.rpartition("/")[0] == partition}
        self.store.put(_skip_all_key(partition), Skip(self._me, time.time()))
        self._wait(lambda: not now & self._now().keys(), timeout, "skip all")
        return len(now)

    def resume(self, partition: str = "") -> None:
        """Take `skip_all` back: the next failure blocks again. Without a partition, everywhere.

        Raises LabkitError when nothing is skipped.
        """
        keys = [key for key in self.store.snapshot() if key.startswith(_skip_all_key())]
        if partition:
            keys = [key for key in keys if key == _skip_all_key(partition)]
        if not keys:
            raise LabkitError(f"group {self.group} skips nothing{f' in {partition}' if partition else ''}")
        for key in keys:
            self.store.delete(key)

    def skipped(self) -> list[Skipped]:
        """Every skip there was, oldest first. One whose consumer crashed before it committed is listed again."""
        with Reader(self._skips) as reader:
            return [record.value for record in reader.rest()]

    def _wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        until = time.monotonic() + timeout
        while not done():
            if time.monotonic() > until:
                raise LabkitError(
                    f"{what}: said, but no consumer of {self.group} has done it within {timeout:g} s. Is one alive? "
                    "The next one that meets the record will"
                )
            time.sleep(0.01)


# -- Seen from a running consumer --------------------------------------------------------------------------------------


class Commands:
    """What one running consumer says of its blocked lanes, and is told about them. Called from several threads."""

    def __init__(self, topic: Topic[Any], group: str, producer: Producer) -> None:
        self.topic = lanes_topic(topic, group)
        self.store: KeyValueStore[Entry] = KeyValueStore(self.topic)
        self._producer = producer
        self._mine: dict[str, tuple[Failure, Blocked]] = {}  # by place
        self._held: dict[tuple[str, int], int] = {}  # partitions, and what of them is committed
        self._lock = threading.Lock()
        self._subscription = self.store.subscribe(self._changed)

    def skip_of(self, failure: Failure) -> Skip | None:
        """The command that lets this record be."""
        partition = f"{failure.topic}/{failure.partition}"
        for key in (_skip_key(failure.place), _skip_all_key(partition), _skip_all_key()):
            with suppress(LabkitError):  # not loaded yet: then it wakes us; or somebody wrote nonsense there
                if isinstance(found := self.store.get(key), Skip):
                    return found
        return None

    def block(self, failure: Failure, attempts: int, next_attempt: float, member: str) -> None:
        """Say that a lane waits."""
        raw = failure.raw
        value = text_of(raw.value()) if raw is not None else None
        entry = Blocked(
            *(failure.topic, failure.partition, failure.offset, failure.key, value and value[:SHOWN]),
            *(failure.since, attempts, next_attempt, error_text(failure.error), member),
        )
        with self._lock:
            self._mine[failure.place] = (failure, entry)
            self._send(f"blocked {entry.place}", entry)

    def unblock(self, failure: Failure) -> None:
        """Say that it goes on, or is no longer ours."""
        with self._lock:
            if self._mine.pop(failure.place, None) is not None:
                self._send(f"blocked {failure.place}", None)

    def assigned(self, partitions: list[tuple[str, int, int]]) -> None:
        """Partitions came: whatever stands there of an owner before, who crashed, is over."""
        with self._lock:
            self._held |= {(topic, number): first for topic, number, first in partitions}
        with suppress(LabkitError):  # not loaded: each entry is looked at when it is
            for key, entry in self.store.snapshot().items():
                self._changed(key, None, entry)

    def revoked(self, partitions: list[tuple[str, int]]) -> None:
        """Partitions left."""
        with self._lock:
            for place in partitions:
                self._held.pop(place, None)

    def committed(self, positions: Mapping[tuple[str, int], int]) -> None:
        """Offsets are stored: commands about what lies before have done their work."""
        with self._lock:
            self._held |= {place: at for place, at in positions.items() if place in self._held}
        with suppress(LabkitError):
            for key, entry in self.store.snapshot().items():
                if key.startswith("skip "):
                    self._changed(key, None, entry)

    def close(self) -> None:
        """Hear no more."""
        self.store.close()

    def _changed(self, key: str, old: Entry | None, new: Entry | None) -> None:
        """Told by the store's thread of everything in it, and of every change."""
        verb, place = key.split(" ", 1) if " " in key else (key, "")
        topic, number, offset = _taken_apart(place)
        with self._lock:
            committed = self._held.get((topic, number))
            if verb == "blocked":
                if new is None and place in self._mine:  # by an owner before, who thought it still was
                    self._send(key, self._mine[place][1])
                elif new is not None and place not in self._mine and committed is not None:
                    self._send(key, None)
                return
            if verb != "skip" or new is None:
                return
            if committed is not None and 0 <= offset < committed:
                self._send(key, None)
            woken = [failure for failure, _ in self._mine.values()]
        for failure in woken:
            if self.skip_of(failure) is not None:
                failure.reconsider()

    def _send(self, key: str, entry: Entry | None) -> None:
        self._producer.send(self.topic.name, None if entry is None else encode(entry), key, told=_ignore)


def _taken_apart(place: str) -> tuple[str, int, int]:
    topic, _, offset = place.rpartition("/")
    topic, _, number = topic.rpartition("/")
    return (topic, int(number), int(offset)) if number.isdecimal() and offset.isdecimal() else ("", -1, -1)


def _ignore(refused: str | None, partition: int, offset: int) -> None:
    """A word about a lane that is lost is said again at its next attempt."""
