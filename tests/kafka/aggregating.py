"""Aggregation in tests: update functions, stores of fresh topics, and the same in processes that can be crashed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from consuming import fresh_topic
from stores import store_topic
from transacting import values

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.patterns.aggregation import AtomicKeyValueStore, Command, ImportKey
from labkit.patterns.key_value_store import KeyValueStore
from labkit.patterns.retries import RetryingConsumer

Counts = AtomicKeyValueStore[ImportKey, str, int]


def count(done: int | None, command: Command[ImportKey, str]) -> int:
    """One job more is done."""
    if (done or 0) >= command.key.total:
        raise LabkitError("more jobs than there are")
    return (done or 0) + 1


def notify(notices: Topic[str], key: ImportKey, old: int | None, new: int) -> None:
    """The callback: the whole import is done."""
    if (old or 0) < key.total <= new:
        notices.send(key.request, key=key.request)


def counting(
    cluster: Cluster, partitions: int = 1, update: Callable[..., Any] = count, value: Any = int
) -> tuple[AtomicKeyValueStore[ImportKey, str, Any], Topic[str]]:
    """A store on topics of its own that counts an import's jobs, and where its notices are."""
    commands, notices = fresh_topic(cluster, partitions, str), fresh_topic(cluster, 1, str)
    store = store_topic(cluster, partitions, value)
    made = AtomicKeyValueStore(commands, store, update, key=ImportKey.parse, callback=partial(notify, notices))
    return made, notices


def aggregator(store: AtomicKeyValueStore[Any, Any, Any], slot: str = "one", **options: Any) -> RetryingConsumer:
    """Its consumer, which commits soon, unless the options say otherwise."""
    return replace(store.consumer(slot, 0.05), **options)


def report(store: Counts, *requests: tuple[str, int], jobs: int = 1) -> None:
    """So many more jobs of each of these requests, with their totals, are done."""
    for job in range(jobs):
        for request, total in requests:
            store.send(ImportKey(request, total), f"job {job + 1} completed")
    store.commands.flush()


def stored(store: Topic[Any]) -> dict[str, Any]:
    """What is in a store now."""
    with KeyValueStore(store) as found:
        return found.snapshot()


def noticed(notices: Topic[str]) -> list[str]:
    """The requests that notices came for, one for each notice."""
    return sorted(values(notices))
