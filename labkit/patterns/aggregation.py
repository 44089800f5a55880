"""Pattern 6: event aggregation. When is the whole import done? An atomic key-value store knows.

    def count(done: int | None, command: Command[ImportKey, str]) -> int:
        if (done or 0) >= command.key.total:
            raise LabkitError("more jobs than there are")
        return (done or 0) + 1

    completed = AtomicKeyValueStore(commands, store, count, key=ImportKey.parse, callback=notify)
    completed.send(ImportKey("YYY", 6), "Job 3 completed")     # in any service
    lab.deploy("aggregator", completed.consumer(), replicas=2)
    completed.reads().get("YYY-6")                             # local, as pattern 3

An update is a command; commands of one key lie in one partition. The update function is applied by a consumer with
state, exactly once: consuming the command, writing the new value and committing the offset are one transaction, and so
is what the callback sends. Effects outside of Kafka come after that, at least once: give them an id.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar

import msgspec

from labkit.kafka.errors import LabkitError
from labkit.kafka.records import Message, Record, encode, parser, poison
from labkit.kafka.topics import Topic
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.key_value_store import KeyValueStore
from labkit.patterns.retries import RetryingConsumer, dead_letter

K = TypeVar("K")
C = TypeVar("C")
V = TypeVar("V")

AHEAD = 100_000  # commands of a partition that are read, and not committed, at most


@dataclass(frozen=True)
class ImportKey:
    """A request and how many jobs it has; on the wire `YYY-6`. Raises LabkitError for what is none."""

    request: str
    total: int

    def __post_init__(self) -> None:
        if not self.request or self.request.endswith("-"):
            raise LabkitError(f"a request is a text that does not end with '-', not {self.request!r}")
        if self.total < 1:
            raise LabkitError(f"request {self.request} has at least one job, not {self.total}")

    def __str__(self) -> str:
        return f"{self.request}-{self.total}"

    @classmethod
    def parse(cls, text: str) -> ImportKey:
        """The key that is written so."""
        request, _, total = text.rpartition("-")
        if not (total.isascii() and total.isdigit()):
            raise LabkitError(
                f"{text!r} is no key of an import: write the request and its number of jobs, such as YYY-6"
            )
        return cls(request, int(total))


class Command(msgspec.Struct, Generic[K, C], frozen=True, gc=False):
    """A command as an update function sees it."""

    key: K
    message: Any
    """The record as it came."""

    parse: Callable[[bytes], Any]

    @property
    def value(self) -> C | None:
        """What the command says, decoded when it is asked for. Raises PoisonRecord."""
        raw = self.message.value()
        try:
            return None if raw is None else self.parse(raw)
        except Exception as error:  # of a value type, whose own checks may raise anything
            raise poison(self.message, error) from error


@dataclass(frozen=True)
class AtomicKeyValueStore(Generic[K, C, V]):
    """A topic of commands, a compacted topic of values with as many partitions, and a function that updates a value.

    `update(value, command)` returns the new value; the first one of a key gets None. It must depend on nothing but its
    arguments: it may be called more than once for a command that counts once. A command for which it raises, or returns
    None or what is no value of the store, goes to the dead letters with its place, and nothing of that attempt counts.
    So does one whose key `key` does not parse.

    The commands of one key must lie in one partition, as those of `send` do. Of another client, whose partitioner puts
    them elsewhere, they count as long as all commands of a key come from such clients: their value is kept in the
    partition in which they lie. A key from clients of both kinds has two values; `reads()` tells it (`scattered`).
    """

    commands: Topic[C]
    store: Topic[V]
    update: Callable[[V | None, Command[K, C]], V]
    key: Callable[[str], K] = str  # type: ignore[assignment]
    """From a key's text to the key; `str(key)` is its text."""
    callback: Callable[[K, V | None, V], object] | None = None
    """`callback(key, old, new)` is called when a value has changed. What it sends is in the transaction of the change:
    it is there once. Changes that come together are one, so ask whether this change has *reached* something
    (`old < total <= new`). If it raises, the command fails."""

    @property
    def group(self) -> str:
        """The consumer group of those who update it."""
        return self.store.name

    def send(self, key: K, value: C) -> None:
        """Send a command through the process's producer: see `Topic.send`."""
        self.commands.send(value, str(key))

    def consumer(self, slot: str = "", commit_interval: float = 0.1, batch: int = 10_000) -> RetryingConsumer:
        """What updates it, in one process or many: each a member of the store's group. `slot` as of `Consumer`."""
        return RetryingConsumer(
            *(self.commands, self._updated, self.group),
            guarantee="exactly once",
            slot=slot,
            max_ahead=AHEAD,
            workers=1,  # the thread that polls does all of it
            commit_interval=commit_interval,
            batch=batch,
            store=self.store,
            retry=dead_letter(),
        )

    def reads(self) -> KeyValueStore[V]:
        """The values, to be read locally."""
        return KeyValueStore(self.store)

    def dead_letters(self) -> DeadLetters:
        """The commands that did not count. One that is replayed counts once; one that is replayed again while it is
        still here counts again. Before a consumer ran: TopicMissing."""
        return DeadLetters(self.commands, self.group)

    def follow(
        self,
        callback: Callable[[K, V | None, V], object],
        seen: Topic[V],
        slot: str = "",
        start: Literal["earliest", "latest"] = "earliest",
    ) -> RetryingConsumer:
        """A service of its own that calls back: the same function, in a transaction of its own.

        What it has seen of each key it keeps in `seen`, a compacted topic with as many partitions as the store. Kafka
        may have dropped values in between: `callback` gets the one that this service saw last and the one there is.
        With `start="earliest"` it is told of all keys there are; with "latest", of what changes from now on.
        """
        return RetryingConsumer(
            *(self.store, _Follower(self.key, callback), seen.name),
            guarantee="exactly once",
            slot=slot,
            start=start,
            workers=1,
            store=seen,
            retry=dead_letter(),
        )

    def _updated(self, state: Mapping[bytes, bytes], messages: Sequence[Message]) -> Mapping[bytes, bytes]:
        """The consumer's handler. The value of a key is decoded and encoded once, however many commands there are."""
        by_key: defaultdict[bytes | None, list[Message]] = defaultdict(list)
        for message in messages:
            by_key[message.key()].append(message)
        update, callback = self.update, self.callback
        parse_value, parse_command = parser(self.store.value), parser(self.commands.value)
        changes: dict[bytes, bytes] = {}
        for raw, commands in by_key.items():
            key = _key(self.key, raw)
            before = state.get(raw)  # type: ignore[arg-type]
            value = None if before is None else parse_value(before)
            for message in commands:
                value = update(value, Command(key, message, parse_command))
                if value is None:
                    raise LabkitError("the update function returned None: return the new value")
            changes[raw] = after = encode(value)  # type: ignore[index]
            new = parse_value(after)  # what cannot be read must not be written
            if callback is not None:
                callback(key, None if before is None else parse_value(before), new)
        return changes


class _Follower(Generic[K, V]):
    """The handler of `follow`."""

    def __init__(self, key: Callable[[str], K], callback: Callable[[K, V | None, V], object]) -> None:
        self.key, self.callback = key, callback

    def __call__(self, state: Mapping[str, V], record: Record[V]) -> Mapping[str, V | None]:
        if record.key is None:
            raise LabkitError("a value has a key")
        if record.value is not None:  # a tombstone's is None
            self.callback(_key(self.key, record.key.encode()), state.get(record.key), record.value)
        return {record.key: record.value}


@lru_cache(maxsize=100_000)
def _key(parse: Callable[[str], K], raw: bytes | None) -> K:
    """A key from its text. Two texts of one key would be two values. Raises what `parse` raises, LabkitError."""
    if raw is None:
        raise LabkitError("a command has a key")
    text = raw.decode()
    key = parse(text)
    if str(key) != text:
        raise LabkitError(f"the key {text!r} is written {str(key)!r}")
    return key
