"""What a group with retries keeps about a topic, seen from outside: entries of a store, by the place of a record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any, TypeVar

from labkit.closing import Closing
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore

V = TypeVar("V")


class GroupEntries(Closing, Mapping[str, V]):
    """A mapping, oldest entry first. What one call returns is of one moment. `kept` is the store's topic.

    Raises TopicMissing when no consumer with retries ever ran there.
    """

    def __init__(self, topic: Topic[Any], group: str, kept: Topic[Any]) -> None:
        self.topic, self.group = topic, group
        self.store: KeyValueStore[Any] = KeyValueStore(kept).__enter__()  # loaded, or closed again

    @abstractmethod
    def _now(self) -> dict[str, V]:
        """All entries, oldest first."""

    def __getitem__(self, place: str) -> V:
        return self._now()[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def values(self) -> ValuesView[V]:
        """The values of one moment: some may leave while you look at them."""
        return self._now().values()

    def items(self) -> ItemsView[str, V]:
        """Places and values of one moment."""
        return self._now().items()

    def close(self) -> None:
        self.store.close()

    def __repr__(self) -> str:
        holds = f"{len(self):,}" if self.store.ready else "closed"
        return f"{type(self).__name__}({self.topic.short} of {self.group}, {holds})"
