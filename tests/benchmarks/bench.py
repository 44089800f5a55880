"""What benchmarks share: a broker for throughput, topics, and runs that take turns."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from labkit.kafka.cluster import Cluster
from labkit.kafka.topics import Topic
from labkit.runtime import shared_broker
from labkit.runtime.broker import Broker, prepare
from labkit.runtime.child import Child
from labkit.runtime.home import STATE


class Figures(NamedTuple):
    """Of one run."""

    rate: float
    """Records a second."""
    cpu: float
    """Seconds this process computed in a whole run: on a busy machine a better measure than time."""


def wait(condition: Callable[[], Any], timeout: float = 300.0) -> None:
    """Until something is so, which nothing tells of."""
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("the benchmark waits for what does not come")
        time.sleep(0.005)


class Bench:
    """A folder and a broker of its own, for as long as the `with` block lasts. Nothing is left of them."""

    def __init__(self, rounds: int = 5) -> None:
        self.rounds = rounds
        self._numbers = itertools.count(1)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="labkit-bench-")))
        for name in ("KAFKA_BOOTSTRAP_SERVERS", "KAFKA_CLIENT_CONFIG"):  # a person's own Kafka is none of our business
            os.environ.pop(name, None)
        os.environ[STATE] = str(self.folder / "state")
        self._stack.callback(shared_broker.stop)  # whatever an interrupted benchmark left of it
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(None, None, None)

    @cached_property
    def cluster(self) -> Cluster:
        """One broker for all benchmarks of throughput, started when the first of them asks.

        Labs start theirs with Java's first compiler only, which is quick to start and slower ever after: here Java
        compiles what is used much. (The AOT cache is for a lab's flags, hence `extra=[]`.)
        """
        kafka = prepare()
        broker = Broker.create(self.folder / "broker", kafka)
        command = [flag for flag in kafka.command(broker.folder, extra=[]) if "TieredStopAtLevel" not in flag]
        child = self._stack.enter_context(Child(command, cwd=broker.folder, output=broker.log))
        broker.wait_until_ready(lambda: child.poll() is None)
        return broker.cluster

    def topic(self, name: str, partitions: int, value: Any = bytes) -> Topic[Any]:
        """A new topic."""
        topic = Topic(self.cluster, f"{name}-{next(self._numbers)}", partitions, value)
        topic.create()
        return topic

    def group(self) -> str:
        """A group nobody has used."""
        return f"bench-{next(self._numbers)}"

    def alternate(self, runs: Mapping[str, Callable[[], float]]) -> dict[str, Figures]:
        """The figures of the median round, by the ratio of the first run to the second. They take turns (A B A B …):
        what disturbs one disturbs its neighbour, so a ratio within a round says more than one of two medians.

        Before, the first runs once and counts for nothing: meanwhile Java compiles what this needs of it.
        """
        found: dict[str, list[Figures]] = {name: [] for name in runs}
        next(iter(runs.values()))()
        for turn in range(1, self.rounds + 1):
            for name, run in runs.items():
                cpu = time.process_time()
                rate = run()
                found[name].append(Figures(rate, time.process_time() - cpu))
                say(f"  round {turn} of {self.rounds}: {name} {rate:,.0f}/s, {found[name][-1].cpu:.2f} s of CPU")
        first, second, *_ = found.values()
        ratios = [ours.rate / peer.rate for ours, peer in zip(first, second, strict=True)]
        median = ratios.index(statistics.median_low(ratios))
        return {name: rounds[median] for name, rounds in found.items()}


def say(text: str) -> None:
    """Progress, which is no result: to stderr."""
    print(text, file=sys.stderr, flush=True)
