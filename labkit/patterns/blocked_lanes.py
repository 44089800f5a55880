"""Which lanes are blocked, and the commands that unblock them, from anywhere that reaches Kafka.

A running consumer writes into a store which records it cannot get past. Whoever reads the store may write a command
into it: skip one record, or skip all that fail until `resume`. The consumer obeys at once, even in the middle of a
back-off. A skip names topic, partition and offset, and leaves a trace in a topic. Once its record is committed the
command is taken back, so it never fires again.
"""

from __future__ import annotations

import getpass
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec

from labkit.kafka.consumer.failures import FailedRecord
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import LabkitError, error_text
from labkit.kafka.producer import POD, producer
from labkit.kafka.reader import Reader
from labkit.kafka.records import Placed, encode
from labkit.kafka.topics import Topic
from labkit.patterns.group_entries import GroupEntries
from labkit.patterns.key_value_store import KeyValueStore
from labkit.patterns.own_topics import own_topic
from labkit.patterns.retry_history import history_of, shown

LANES, SKIPS = "lanes", "skips"  # how the names of the two topics end
SKIP_ALL = "skip all"  # the key of that command
TAKEN = 10.0  # seconds for a consumer to carry a command out


class Blocked(Placed, msgspec.Struct, frozen=True, tag=True):
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


class Skip(msgspec.Struct, frozen=True, tag=True):
    """A command: skip this record, or every record that fails."""

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


# -- Seen from outside -------------------------------------------------------------------------------------------------


class BlockedLanes(GroupEntries[Blocked]):
    """The records that block a group on a topic, by place, and the commands about them.

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
        return SKIP_ALL in self.store.snapshot()

    def skip(self, place: str, timeout: float = TAKEN) -> Blocked:
        """Skip the record at `topic/partition/offset`, once. Returns the record, after a consumer has skipped it.

        Raises LabkitError when this record blocks no lane, or no consumer skips it within `timeout` seconds.
        """
        now = self._now()
        if (one := now.get(place)) is None:
            here = [other for other in now if other.rpartition("/")[0] == place.rpartition("/")[0]]
            what = (
                f"in that partition {', '.join(here)} does that"
                if here
                else f"it is blocked by {', '.join(now) or 'nothing'}"
            )
            raise LabkitError(f"group {self.group} is not blocked by {place}: {what}")
        self.store.put(_skip_key(place), Skip(self._me, time.time()))
        self._wait(lambda: place not in self._now(), timeout, f"skip {place}")
        return one

    def skip_all(self, timeout: float = TAKEN) -> int:
        """Skip every record that fails, from now on until `resume`.

        Returns how many records blocked a lane, once these are skipped. Raises LabkitError when no consumer skips them.
        """
        now = self._now().keys()
        self.store.put(SKIP_ALL, Skip(self._me, time.time()))
        self._wait(lambda: not now & self._now().keys(), timeout, "skip all")
        return len(now)

    def resume(self) -> None:
        """Take `skip_all` back: the next failure blocks again. Raises LabkitError when nothing is skipped."""
        if not self.skipping:
            raise LabkitError(f"group {self.group} skips nothing, so there is nothing to resume")
        self.store.delete(SKIP_ALL)

    def skipped(self) -> list[Skipped]:
        """Every skip there was, oldest first. If the consumer crashed before its commit, the skip is there twice."""
        with Reader(self._skips) as reader:
            return [record.value for record in reader.read_to_end()]

    def _wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        until = time.monotonic() + timeout
        while not done():
            if time.monotonic() > until:
                raise LabkitError(
                    f"{what}: the command is stored, but no consumer of {self.group} carried it out within "
                    f"{timeout:g} s. Is one running? The next one that reaches the record will"
                )
            time.sleep(0.01)


# -- Seen from a running consumer --------------------------------------------------------------------------------------


class Commands:
    """What one running consumer has to do with the store: it writes which of its lanes are blocked, and puts a command
    on the record that the command names. It only listens to the consumer's steps, in several threads."""

    def __init__(self, topic: Topic[Any], group: str) -> None:
        self.topic = lanes_topic(topic, group)
        self.store: KeyValueStore[Entry] = KeyValueStore(self.topic)
        self._main = topic.name
        self._me = os.environ.get(POD) or f"{socket.gethostname()}/{os.getpid()}"
        self._producer = producer(topic.cluster, reports=True)
        self._mine: dict[str, tuple[FailedRecord, Blocked]] = {}  # by place
        self._held: dict[tuple[str, int], int] = {}  # partitions, and what of them is committed
        self._lock = threading.Lock()
        self._subscription = self.store.subscribe(self._changed)

    def on_step(self, step: Step, subject: Any) -> None:
        if step is Step.FAILED:
            self._command(subject)
        elif step is Step.BLOCKED:
            self._block(subject)
        elif step is Step.RECOVERED:
            with self._lock:
                if self._mine.pop(subject.place, None) is not None:
                    self._send(f"blocked {subject.place}", None)
        elif step is Step.ASSIGNED:
            with self._lock:
                self._held |= {(topic, number): first for topic, number, first in subject}
            self._look_again("")  # entries of an owner before, which crashed, are over
        elif step is Step.COMMITTED:
            with self._lock:
                self._held |= {place: at for place, at in subject.items() if place in self._held}
            self._look_again("skip ")  # commands about what lies before have done their work
        elif step in (Step.REVOKED, Step.LOST):
            with self._lock:
                for partition in subject:
                    self._held.pop(partition, None)
                gone = [place for place, (one, _) in self._mine.items() if (one.topic, one.partition) in subject]
                for place in gone:
                    del self._mine[place]

    def close(self) -> None:
        self.store.close()
        self._producer.unconfirmed(2.0)

    def _command(self, failed: FailedRecord) -> None:
        """Put the store's command about this record on it, once; take a command off that is no longer in the store."""
        with self._lock:
            found = None
            for key in (_skip_key(failed.place), SKIP_ALL):
                with suppress(LabkitError):  # not loaded yet, then the store wakes us; or somebody wrote nonsense there
                    if found is None and isinstance(entry := self.store.get(key), Skip):
                        found = entry
            if found is not None and failed.command is None:
                failed.put_command(found)  # under the lock: a command that is taken back meanwhile must not stand again
            else:
                failed.command = found

    def _block(self, failed: FailedRecord) -> None:
        """Write that a lane waits."""
        key, value = shown(failed.message.key()), shown(failed.message.value())
        own = failed.topic != self._main  # a history that comes with the main topic is forged
        history = history_of(failed.message) if own else None
        attempts = failed.attempt + (history.attempts if history is not None else 0)
        entry = Blocked(
            *(failed.topic, failed.partition, failed.offset, key, value, failed.since),
            *(attempts, failed.due, error_text(failed.refused or failed.error), self._me),
        )
        with self._lock:
            if (failed.topic, failed.partition) not in self._held:  # taken away meanwhile
                return
            self._mine[failed.place] = (failed, entry)
            self._send(f"blocked {entry.place}", entry)
        self._command(failed)  # a command may have come while nothing was blocked here

    def _look_again(self, prefix: str) -> None:
        with suppress(LabkitError):  # not loaded yet: loading passes each entry to `_changed`
            for key, entry in self.store.snapshot().items():
                if key.startswith(prefix):
                    self._changed(key, None, entry)

    def _changed(self, key: str, old: Entry | None, new: Entry | None) -> None:
        """The subscription: called for everything in the store, and for every change."""
        verb, place = key.split(" ", 1) if " " in key else (key, "")
        topic, number, offset = _coordinates(place)
        with self._lock:
            committed = self._held.get((topic, number))
            if verb == "blocked":
                if new is None and place in self._mine:  # an owner before took it out, who believed it was still his
                    self._send(key, self._mine[place][1])
                elif new is not None and place not in self._mine and committed is not None:
                    self._send(key, None)
                return
            if verb != "skip":
                return
            if new is not None and committed is not None and 0 <= offset < committed:
                self._send(key, None)
            blocked = [failed for failed, _ in self._mine.values()]
        for failed in blocked:
            self._command(failed)

    def _send(self, key: str, entry: Entry | None) -> None:
        self._producer.poll()  # of what was sent before
        self._producer.send(self.topic.name, None if entry is None else encode(entry), key, on_delivery=_ignore)


def _coordinates(place: str) -> tuple[str, int, int]:
    topic, _, offset = place.rpartition("/")
    topic, _, number = topic.rpartition("/")
    return (topic, int(number), int(offset)) if number.isdecimal() and offset.isdecimal() else ("", -1, -1)


def _ignore(refused: str | None, partition: int, offset: int) -> None:
    """A lost entry about a lane is written again at the lane's next attempt."""
