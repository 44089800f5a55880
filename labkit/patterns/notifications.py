"""Pattern 2: notifications. What happened anywhere reaches the one page that it concerns.

    topic.send(notice, channel)                                # in any service
    notifications = Notifications(topic).wait_ready()          # in each process that holds connections
    subscription = notifications.open(channel, position, wake)
    subscription.take()

Every process reads the whole topic, without a group, and keeps the newest notices in memory: the *window*. So it does
not matter to which of them a page is connected. A page tells the position up to which it has seen its channel, and
hears one of three things: nothing was missed, these were missed, or too much was missed: start over from the state.

A subscriber that does not take what is there is dropped at a bound: it holds up nobody, and memory does not grow.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Generic, Protocol, Self, TypeVar

import msgspec

from labkit.kafka.consumer.steps import Measured
from labkit.kafka.errors import (
    ClientRefused,
    LabkitError,
    RecordsDeleted,
    TopicMissing,
    Unavailable,
)
from labkit.kafka.lag import end_offsets, start_offsets
from labkit.kafka.reader import Reader
from labkit.kafka.records import Message, parser
from labkit.kafka.topics import Topic
from labkit.patterns.notice_window import Bounds, Entry, Position, Window
from labkit.patterns.periodic_check import PeriodicCheck

PATIENCE = 30.0  # seconds for the window to be read
TURN = 0.1  # seconds to wait for a notice, before looking whether this was closed
LOOK = 3.0  # seconds from one look at the topic to the next
SHORT = 2  # looks in which the topic may end before what was read
AGAIN = 0.5  # seconds until the window is read again after a failure

ENCODE = msgspec.json.Encoder().encode
log = logging.getLogger(__name__)


class HasId(Protocol):
    """A notice. Its id says what happened, however often that is told: a page shows each id once."""

    @property
    def id(self) -> str: ...


N = TypeVar("N", bound=HasId)


class Outcome(Enum):
    """What a page hears first, and again when the topic was made anew or lost records."""

    NOTHING_MISSED = "nothing missed"
    MISSED = "missed"
    """What it missed follows, in order."""
    START_OVER = "start over"
    """Nobody knows what it missed. It reads the state where that is kept, and goes on from here."""


class Told(msgspec.Struct, frozen=True, gc=False):
    """Something for a subscriber: an outcome, a notice, or just the position."""

    position: str
    """What the page tells when it comes back. It has no meaning to the page."""
    outcome: Outcome | None = None
    id: str = ""
    notice: bytes | None = None
    """As JSON."""


class Subscription:
    """One page that listens to a channel. What comes for it waits here until it is taken.

    `wake` is called, from another thread, when there is something to be taken, and when it was dropped.
    """

    def __init__(self, channel: str, bounds: Bounds, wake: Callable[[], object], lock: threading.Lock) -> None:
        self.channel = channel
        self.dropped = False
        """Nothing comes any more, and what was waiting is gone: the page has to come back."""
        self.seen: Mapping[int, int] = {}
        """Up to where the page says it has seen the channel: of that it is told nothing again."""
        self._bounds, self._wake, self._lock = bounds, wake, lock
        self._window: Window
        self._first: Told | None = None
        self._waiting: deque[Entry] = deque()
        self._size = 0

    def take(self, most: int = 100) -> list[Told]:
        """What is there, at most so many; an outcome comes first."""
        found: list[Told] = []
        with self._lock:
            if self._first is not None:
                found.append(self._first)
                self._first = None
            epoch = self._window.epoch
            while self._waiting and len(found) < most:
                entry = self._waiting.popleft()
                self._size -= len(entry.notice)
                found.append(Told(f"{epoch}.{entry.partition}:{entry.offset + 1}", None, entry.id, entry.notice))
        return found

    def beat(self) -> Told | None:
        """The position of a page that has been told all there is; None if something waits.

        To be told from time to time: the position of a quiet channel would leave the window.
        """
        with self._lock:
            if self._waiting or self._first is not None or self.dropped:
                return None
            return Told(str(self._window.position(self.seen)))

    def _begin(self, window: Window, position: Position | None) -> None:
        """Begin in this window, at that position if it can be. Under the lock."""
        self._window = window
        self._waiting.clear()
        missed = None if position is None else window.since(self.channel, position)
        if missed is not None and self._too_much(missed):
            missed = None
        if position is None or missed is None:
            self.seen = {}
            self._first = Told(str(window.position()), Outcome.START_OVER)
        elif missed:
            self.seen = position.nexts
            self._first = Told(str(position), Outcome.MISSED)  # it is still where it was
            self._waiting.extend(missed)
        else:
            self.seen = position.nexts
            self._first = Told(str(window.position(self.seen)), Outcome.NOTHING_MISSED)
        self._size = sum(len(one.notice) for one in self._waiting)

    def _too_much(self, entries: Sequence[Entry]) -> bool:
        size = sum(len(one.notice) for one in entries)
        return len(entries) > self._bounds.waiting or size > self._bounds.waiting_bytes

    def _offer(self, entry: Entry) -> bool:
        """Whether somebody has to be woken. Under the lock."""
        if self.dropped or entry.offset < self.seen.get(entry.partition, 0):
            return False
        self._waiting.append(entry)
        self._size += len(entry.notice)
        if len(self._waiting) > self._bounds.waiting or self._size > self._bounds.waiting_bytes:
            self._drop()
            return True
        return len(self._waiting) == 1

    def _drop(self) -> None:
        self.dropped, self._size, self._first = True, 0, None
        self._waiting.clear()


class Notifications(Generic[N]):
    """Follows a topic of notices, each with its channel as the key, for the pages that are connected to this process.

    It begins to read when it is made. What is no notice is passed over and counted (`ignored`): one without a channel,
    one that does not decode, one that is too large.
    """

    def __init__(self, topic: Topic[N], bounds: Bounds = Bounds()) -> None:  # noqa: B008 - it never changes
        self.topic, self.bounds = topic, bounds
        self.ignored = self.dropped = self.told = 0
        self._parse = parser(topic.value)
        self._lock = threading.Lock()  # of the window and of all subscriptions
        self._window: Window | None = None
        self._channels: dict[str, list[Subscription]] = {}
        self._known = threading.Event()  # the window was read, or never will be
        self._stop = threading.Event()
        self._failure: LabkitError | None = None
        self._short = 0  # looks, one after the other, in which the topic ended before what was read
        self._trouble = "it has only just begun"
        self._thread = threading.Thread(target=self._run, name=f"notifications {topic.short}", daemon=True)
        self._thread.start()

    # -- for those who hold connections ----------------------------------------------------------------------------

    def wait_ready(self, timeout: float = PATIENCE) -> Self:
        """Wait until the window is read. Raises Unavailable, saying what it waits for; ClientRefused."""
        if not self._known.wait(timeout):
            raise Unavailable(f"topic {self.topic.short} was not read within {timeout:g} s: {self._trouble}")
        if self._failure is not None:
            raise self._failure
        return self

    @property
    def subscribers(self) -> int:
        """How many pages listen."""
        return sum(map(len, self._channels.copy().values()))

    def position(self) -> str:
        """That of a page that begins now. Raises Unavailable while the topic cannot be read."""
        with self._lock:
            return str(self._readable().position())

    def open(self, channel: str, position: str, wake: Callable[[], object]) -> Subscription:
        """Listen to a channel, from a position on. What is no position is one of which nothing is known.

        Raises Unavailable while the topic cannot be read.
        """
        subscription = Subscription(channel, self.bounds, wake, self._lock)
        pushed_out: Subscription | None = None
        with self._lock:
            subscription._begin(self._readable(), Position.parse(position))
            others = self._channels.setdefault(channel, [])
            others.append(subscription)
            if len(others) > self.bounds.subscribers:
                pushed_out = others.pop(0)
                pushed_out._drop()
                self.dropped += 1
        if pushed_out is not None:
            pushed_out._wake()
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """Nothing more for this one. May be called again."""
        with self._lock:
            self._leave(subscription)

    def measured(self) -> Measured:
        """Its figures, to be reported as Step.MEASURED."""
        short = self.topic.short
        window = self._window
        return Measured(
            {f"{short} told": self.told, f"{short} dropped": self.dropped, f"{short} ignored": self.ignored},
            {f"{short} open": float(self.subscribers), f"{short} window": float(len(window) if window else 0)},
        )

    def close(self) -> None:
        """Stop reading. Whoever listens is told nothing more."""
        self._stop.set()
        self._thread.join(5.0)

    def __enter__(self) -> Self:
        try:
            return self.wait_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def _readable(self) -> Window:
        if self._window is None:
            raise Unavailable(f"topic {self.topic.short} cannot be read now: {self._trouble}")
        return self._window

    def _leave(self, subscription: Subscription) -> None:
        subscription._drop()
        others = self._channels.get(subscription.channel, [])
        if subscription in others:
            others.remove(subscription)
            if not others:
                del self._channels[subscription.channel]

    # -- following the topic ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Read a window and follow the topic; begin again whenever the two do not belong together any more."""
        while not self._stop.is_set():
            try:
                self._follow()
            except ClientRefused as refused:
                self._failure = refused
                self._known.set()
                return
            except LabkitError as error:
                if str(error) != self._trouble:
                    log.warning("notifications: %s", error)
                self._trouble = str(error)
            except Exception as error:  # of the client: the pages wait, and the next attempt may do
                self._trouble = f"{type(error).__name__}: {error}"
                log.exception("notifications of %s", self.topic.short)
            with self._lock:
                self._window = None
            self._stop.wait(AGAIN)

    def _follow(self) -> None:
        """Returns when this was closed. Raises LabkitError when the window has to be read anew."""
        cluster, name = self.topic.cluster, self.topic.name
        topic_id = cluster.topic_id(name)
        lowest, ends = start_offsets(cluster, [name]), end_offsets(cluster, [name])
        most = self.bounds.window
        starts = {place[1]: max(start, ends.get(place, 0) - most) for place, start in lowest.items()}
        if not starts:
            raise TopicMissing(f"topic {self.topic.short} does not exist at {cluster.bootstrap}: create it first")
        window = Window(topic_id, starts, self.bounds)
        with Reader(self.topic, partitions=starts, starts=starts) as reader:
            for messages in reader.messages_to_end(PATIENCE):
                for channel, entry in self._entries(messages):
                    window.add(channel, entry)
                if self._stop.is_set():
                    return
            self._passed(window, reader)
            self._show(window)
            self._short = 0
            with PeriodicCheck(lambda: self._look(window, topic_id), LOOK) as look:
                while not self._stop.is_set():
                    self._deliver(window, self._entries(reader.messages(TURN)), reader)
                    look.answer()

    def _entries(self, messages: Iterable[Message]) -> list[tuple[str, Entry]]:
        """What is notices, with their channels."""
        found = []
        for message in messages:
            channel, value = message.key(), message.value()
            if channel is None or value is None:
                self.ignored += 1
                continue
            try:
                notice = self._parse(value)
                text = ENCODE(notice)  # not as it came: what nobody decoded may be no UTF-8
                entry = Entry(message.partition(), message.offset(), str(notice.id), text)
                if len(text) > self.bounds.largest:
                    self.ignored += 1
                else:
                    found.append((channel.decode(), entry))
            except Exception:  # a type's own checks, and its `id`, may raise anything
                self.ignored += 1
        return found

    def _passed(self, window: Window, reader: Reader[N]) -> None:
        for (_, partition), at in reader.positions().items():
            window.ends[partition] = max(window.ends[partition], at)

    def _show(self, window: Window) -> None:
        """From now on this is the window. Who listened in another one starts over."""
        with self._lock:
            self._window = window
            everybody = [one for others in self._channels.values() for one in others]
            for subscription in everybody:
                subscription._begin(window, None)
        self._known.set()
        for subscription in everybody:
            subscription._wake()

    def _deliver(self, window: Window, entries: list[tuple[str, Entry]], reader: Reader[N]) -> None:
        woken: list[Subscription] = []
        with self._lock:
            for channel, entry in entries:
                window.add(channel, entry)
                for subscription in self._channels.get(channel, ())[:]:
                    self.told += 1
                    if subscription._offer(entry):
                        woken.append(subscription)
                    if subscription.dropped:
                        self.dropped += 1
                        self._leave(subscription)
            self._passed(window, reader)
        for subscription in woken:
            subscription._wake()

    def _look(self, window: Window, topic_id: str) -> None:
        """Look whether the topic is the one that the window was read from. Raises LabkitError when it is not."""
        read, short = dict(window.ends), self.topic.short
        found = self.topic.cluster.topic_id(self.topic.name)
        ends = {number: end for (_, number), end in end_offsets(self.topic.cluster, [self.topic.name]).items()}
        if found != topic_id:
            raise TopicMissing(f"topic {short} was made anew: whoever listens starts over")
        if len(ends) != len(read):
            raise RecordsDeleted(
                f"topic {short} has {len(ends)} partitions now, not {len(read)}: channels lie elsewhere, and whoever "
                "listens starts over"
            )
        # A broker that just came back may say for some seconds that the topic ends earlier than it does.
        self._short = self._short + 1 if any(at > ends[number] for number, at in read.items()) else 0
        if self._short > SHORT:
            raise RecordsDeleted(f"topic {short} has lost records that were read: whoever listens starts over")
        if not self._short and self._window is window:
            self._too_far(ends)

    def _too_far(self, ends: Mapping[int, int]) -> None:
        """A page that has seen more than there is: Kafka lost records. It would be told nothing of what takes their
        place."""
        far: list[Subscription] = []
        with self._lock:
            for others in self._channels.values() if self._window is not None else ():
                far += [one for one in others if any(at > ends.get(number, 0) for number, at in one.seen.items())]
            for subscription in far:
                subscription._begin(self._readable(), None)
        for subscription in far:
            subscription._wake()
