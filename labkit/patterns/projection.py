"""Pattern 1, consume and project: a service makes a view of its own from a topic, and asks no owner of the objects.

A *projection* is a topic, a function from a record to rows, and a view (see `views`). No crash harms the view, and
its next generation can be built while readers use the present one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, cast

from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.failures import Decision, FailedRecord, Stop, keep_trying
from labkit.kafka.errors import ClusterUnreachable, LabkitError, PoisonRecord, Unavailable, error_text
from labkit.kafka.lag import end_offsets, start_offsets
from labkit.kafka.reader import has_records
from labkit.kafka.records import Record, T
from labkit.kafka.topics import Topic
from labkit.patterns.views import LARGEST_BATCH, Batch, Change, Row, View, ViewOutdated, ViewTakenBack

VERSION = "version"  # the field of a value, or the header of a tombstone, that says how new it is


def version_of(record: Record[Any]) -> int | None:
    """The value's field `version`; for a tombstone the header of that name.

    Of two records with one version the first one counts. The other is left out without a word, because it looks like
    the first one, come again: whoever changes an object must raise its version.

    A tombstone without a version counts as the newest whenever it comes: replayed after later versions, it takes the
    view back. Give tombstones versions where records may come again.
    """
    if record.value is None:
        header = record.headers.get(VERSION)
        return None if header is None else int(header)
    return cast(int, record.value[VERSION] if isinstance(record.value, dict) else getattr(record.value, VERSION))


@dataclass(frozen=True)
class Projection(Generic[T]):
    """A topic, a function from a record to rows, and a view.

    The key of a record is the key in the view. A tombstone deletes the key; so does a function that returns None. A
    record is *rejected* when it does not decode, when the function raises, or when the database refuses its rows:
    `view.rejected()` names it, and the view goes on.
    """

    topic: Topic[T]
    rows: Callable[[Record[T]], Iterable[Row] | None]
    view: View
    version: Callable[[Record[T]], int | None] = version_of
    """How new a record's object is: one that is not newer than the stored one changes nothing, as in `version_of`.
    `lambda record: None` takes records in the order of the topic."""

    def consumer(self, group: str = "", batch: int = 500) -> Consumer:
        """The consumer that writes the view, in one process or many: up to `batch` records in a transaction.

        It reads on where the view says, whatever the group has committed. It waits for a database that is away or
        locked, and ends with ViewOutdated if the view must be built anew.
        """
        if not 1 <= batch <= LARGEST_BATCH:
            raise LabkitError(
                f"a batch is 1 to {LARGEST_BATCH:,} records, as databases limit a statement, not {batch!r}"
            )
        return Consumer(
            self.topic,
            self.write,
            group,
            on_failure=self.decide,
            workers=1,  # a view takes one writer at a time: more threads would only wait
            max_ahead=max(1000, 4 * batch),
            batch=batch,
            positions=self.positions,
        )

    def positions(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """The offsets at which the view says to read on."""
        name = self.topic.name
        topic_id = self.topic.cluster.topic_id(name)
        found = self.view.begin(name, topic_id, [number for _, number in partitions])
        return {(name, number): at for number, at in found.items()}

    def write(self, batch: Sequence[Record[T] | PoisonRecord]) -> None:
        """The consumer's handler: puts a batch of one partition into the view, without records that the view has."""
        partition, last = batch[0].partition, batch[-1]
        after = self.view.reached(partition)  # before the user's function runs: another writer may come meanwhile
        changes: list[tuple[int, Change]] = []
        rejected: list[tuple[int, str]] = []
        for record in batch:
            try:
                if isinstance(record, PoisonRecord):
                    raise record
                changes.append((record.offset, self.change(record)))
            except Unavailable:
                raise  # by a service that the function asks: the batch comes again
            except Exception as error:
                rejected.append((record.offset, _reason(error)))
        moment = time.time() if isinstance(last, PoisonRecord) else last.timestamp
        try:
            self.view.apply(Batch(partition, after, last.offset + 1, moment, changes, rejected))
        except Exception as error:
            if len(batch) > 1 or not self.view.is_about_rows(error):
                raise  # the consumer hands them over again, one by one
            rejected = [(last.offset, _reason(error))]
            self.view.apply(Batch(partition, after, last.offset + 1, moment, [], rejected))

    def change(self, record: Record[T]) -> Change:
        """The change that a record means to the view. Raises LabkitError, or what the function raises."""
        if record.key is None:
            raise LabkitError("it has no key")
        version = self.version(record)
        if version is not None and (not isinstance(version, int) or not 0 <= version < 2**63):
            raise LabkitError(f"its version is {version!r}, not a number from 0 on")
        found = None if record.value is None else self.rows(record)
        rows = None if found is None else list(found)
        for row in rows or ():
            if not isinstance(row, tuple) or len(row) != len(self.view.columns):
                raise LabkitError(f"{row!r} is no row of {', '.join(self.view.columns)}")
        return Change(record.key, version, rows)

    @staticmethod
    def decide(failed: FailedRecord) -> Decision:
        """Wait for a database that is away; end where waiting would not help."""
        ends = isinstance(failed.error, ViewOutdated | ViewTakenBack)
        return Stop() if ends else keep_trying(cap=5.0)(failed)


def _reason(error: Exception) -> str:
    return error_text(error).replace("\0", "")


class Staleness:
    """How far a view is behind its topic, as of the last `look`. One thread calls `look`; any may ask."""

    def __init__(self, topic: Topic[Any], view: View) -> None:
        self.topic, self.view = topic, view
        self.records: int | None = None
        """Records that the topic had and the view had not. None before the first look, and when the last one failed."""
        self._looks: deque[tuple[float, dict[int, int]]] = deque()
        self._since: float | None = None  # Unix time up to which the view has all that the topic had
        self._seen_complete = False
        self._topic_id = ""
        self._before: dict[int, tuple[int, int]] = {}  # by partition: where view and topic ended at the last look
        self._empty: dict[int, tuple[int, int]] = {}  # offsets between which there is no record

    def look(self) -> None:
        """Ask Kafka for the topic's ends, then the view for its offsets.

        Raises ClusterUnreachable, TopicMissing, ViewUnavailable; ViewOutdated when the view is of another topic.
        """
        moment, cluster, name = time.time(), self.topic.cluster, [self.topic.name]
        try:
            ends = {number: end for (_, number), end in end_offsets(cluster, name).items()}
            if not ends:
                raise ClusterUnreachable(f"topic {self.topic.short} is not listed by {cluster.bootstrap}")
            topic_id = cluster.topic_id(self.topic.name)  # asked after the ends: so they are of no later topic
            if topic_id != self._topic_id:
                self._topic_id, self._seen_complete = topic_id, False
                self._looks.clear()  # its ends were another topic's
                self._empty.clear()
            checkpoints = self.view.checkpoints(self.topic.name)
            if any(one.topic_id != topic_id for one in checkpoints.values()):
                raise ViewOutdated(
                    f"view {self.view.table} was made of another topic {self.topic.short}, which was deleted and made "
                    "anew: build the view's next generation, and promote it"
                )
            beyond = [number for number, one in checkpoints.items() if one.next_offset > ends.get(number, 0)]
            now = end_offsets(cluster, name) if beyond else {}  # the topic may just have grown
            if beyond := [one for one in beyond if checkpoints[one].next_offset > now.get((name[0], one), 0)]:
                raise ViewOutdated(
                    f"view {self.view.table} has {self.topic.short}/{beyond[0]} up to offset "
                    f"{checkpoints[beyond[0]].next_offset:,}, where the topic has no records: build the view's next "
                    "generation, and promote it"
                )
            # The view lacks nothing of what was deleted at the topic's beginning.
            starts = {} if len(checkpoints) == len(ends) else start_offsets(cluster, name)
        except LabkitError:
            self.records = None
            raise
        reached = {
            number: checkpoints[number].next_offset if number in checkpoints else starts.get((name[0], number), 0)
            for number in ends
        }
        reached = {number: self._past_markers(number, at, ends[number]) for number, at in reached.items()}
        self._looks.append((moment, ends))
        while self._looks and all(reached[number] >= self._looks[0][1].get(number, 0) for number in reached):
            self._since, self._seen_complete = self._looks.popleft()[0], True
        if len(self._looks) > 1000:  # behind for long: half of the looks tell almost as well when it catches up
            self._looks = deque(look for number, look in enumerate(self._looks) if number % 2 == 0)
        behind = [number for number, end in ends.items() if reached[number] < end]
        self.records = sum(ends[number] - reached[number] for number in behind)
        if not self._seen_complete and all(number in checkpoints for number in behind):
            # In each partition, what the view lacks is newer than what it has.
            self._since = min((checkpoints[number].time for number in behind), default=moment)

    def _past_markers(self, number: int, at: int, end: int) -> int:
        """The offset up to which the view has all records. The view stores no offsets of commit markers and aborted
        records, as no handler gets them. So if it stands still before the end, Kafka is asked whether any record is
        left."""
        stood, self._before[number] = self._before.get(number) == (at, end), (at, end)
        if self._empty.get(number) == (at, end):
            return end
        if at < end and stood and not has_records(self.topic, number, at, end):
            self._empty[number] = at, end
            return end
        return at

    @property
    def seconds(self) -> float | None:
        """How old the view is: it has all that the topic had this many seconds ago. None if that is not known."""
        return None if self._since is None else max(0.0, time.time() - self._since)
