"""`make soak`: minutes of random faults against one deployment; the verdict then has to explain every record.

Pods are scaled, killed, frozen, slowed and restarted, the broker is killed, frozen and restarted, all drawn from a seed
that is printed: `make soak ARGS="--seed 7"` draws the same faults again (when they strike depends on the machine).
With `--exactly-once` no output may be there twice.

It fails if a record was lost, if an extra is not explained by a fault, if first deliveries were out of order within a
lane, or if there was too little chaos: its thread ended early, or in a long run one of the main faults never struck.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from labkit import Lab
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import DeliveryFailed, LabkitError
from labkit.kafka.reader import Reader
from labkit.kafka.records import CAUSE, Record
from labkit.kafka.topics import Topic
from labkit.lab.pods.deployment import Deployment
from labkit.lab.pods.pod import Pod, PodState

PARTITIONS, KEYS = 8, 64
MOST_PODS = 4
CALM = (0.3, 3.0)  # seconds between two faults
LONG = 100.0  # seconds of load in which each of these must have struck
MAIN = ("kill", "freeze", "scale", "kill_broker")


@dataclass
class Work:
    id: int


class Chaos:
    """Does something bad every few seconds, until it is told to make peace."""

    def __init__(self, lab: Lab, pods: Deployment, chance: random.Random) -> None:
        self.lab, self.pods, self.chance = lab, pods, chance
        self.done: Counter[str] = Counter()
        self.begun = time.monotonic()
        self.ended_by: Exception | None = None
        """What its thread died of: from then on all was calm, so the run shows nothing."""
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, name="chaos")
        self.thread.start()

    def run(self) -> None:
        try:
            self.strike()
        except Exception as error:
            traceback.print_exc()
            self.ended_by = error

    def strike(self) -> None:
        faults: list[tuple[Callable[[], None], int]] = [
            (self.kill, 5),
            (self.freeze, 3),
            (self.scale, 4),
            (self.restart, 2),
            (self.slow, 1),
            (self.kill_broker, 2),
            (self.freeze_broker, 1),
            (self.restart_broker, 1),
        ]
        acts, weights = zip(*faults, strict=True)
        first = self.chance.sample(acts, len(acts))  # each once: even a short run has every kind
        while not self.stop.wait(self.chance.uniform(*CALM)):
            act = first.pop() if first else self.chance.choices(acts, weights)[0]
            begun = time.monotonic()
            try:
                act()
                self.done[act.__name__] += 1
            except (LabkitError, IndexError):  # the pod was just gone
                self.done["struck nothing"] += 1
            else:
                print(f"{begun - self.begun:7.1f} s  {act.__name__}, {time.monotonic() - begun:.1f} s", flush=True)

    def too_little(self, seconds: float) -> str:
        """Why so long a run proves nothing; empty if it does."""
        if self.ended_by is not None:
            return f"the chaos ended early: {self.ended_by!r}"
        missing = [name for name in MAIN if not self.done[name]] if seconds >= LONG else []
        return f"these never struck: {', '.join(missing)}" if missing else ""

    def peace(self) -> None:
        """No more faults; what still stands is taken back."""
        self.stop.set()
        self.thread.join()
        for pod in self.pods.pods:
            pod.recover()
        self.lab.broker.recover()
        if not self.pods.pods:
            self.pods.scale(2)

    def victim(self, *states: PodState) -> Pod:
        return self.chance.choice([pod for pod in self.pods.pods if pod.state in states])

    def kill(self) -> None:
        self.victim(PodState.RUNNING, PodState.SLOW, PodState.STARTING, PodState.FROZEN).kill()

    def freeze(self) -> None:
        pod = self.victim(PodState.RUNNING)
        pod.freeze()
        # Shorter than a session, and long enough for its partitions to be given away.
        self.stop.wait(self.chance.choice([0.5, 3.0, 9.0]))
        pod.recover()

    def scale(self) -> None:
        self.pods.scale(self.chance.randint(1, MOST_PODS))

    def restart(self) -> None:
        self.victim(PodState.RUNNING).restart()

    def slow(self) -> None:
        pod = self.victim(PodState.RUNNING)
        pod.slow(0.02)
        self.stop.wait(2)
        pod.recover()

    def kill_broker(self) -> None:
        self.lab.broker.kill()
        self.stop.wait(self.chance.uniform(0, 3))
        self.lab.broker.recover()

    def freeze_broker(self) -> None:
        self.lab.broker.freeze()
        self.stop.wait(self.chance.uniform(0.5, 4))
        self.lab.broker.recover()

    def restart_broker(self) -> None:
        self.lab.broker.restart()


def disorder(source: Topic[Work], records: Iterable[Record[Work]], order: Literal["partition", "key"]) -> list[str]:
    """First deliveries that are not in the order of their lane, by their place. Both topics place keys alike."""
    lanes: defaultdict[tuple[int, str | None], list[Record[Work]]] = defaultdict(list)
    for record in sorted(records, key=lambda one: one.offset):
        lanes[record.partition, record.key if order == "key" else None].append(record)
    wrong = []
    for lane in lanes.values():
        seen: set[int] = set()
        latest = -1
        for record in lane:
            topic, _, offset = record.headers[CAUSE].rpartition("/")
            assert topic == f"{source.name}/{record.partition}"
            if int(offset) not in seen:
                seen.add(int(offset))
                if int(offset) < latest:
                    wrong.append(f"{record.place}, made by {record.headers[CAUSE]} after {latest}")
                latest = max(latest, int(offset))
    return wrong


Guarantee = Literal["at least once", "exactly once"]


def soak(seed: int, records: int, rate: float, guarantee: Guarantee = "at least once") -> bool:
    chance = random.Random(seed)
    order: Literal["partition", "key"] = chance.choice(["partition", "key"])
    print(f"seed {seed}: {records:,} records at {rate:g}/s, {guarantee}, order by {order}", flush=True)
    with Lab("soak", cluster="private") as lab:
        source, done = lab.topic("work", PARTITIONS, Work), lab.topic("done", PARTITIONS, Work)

        def handle(record: Record[Work]) -> None:
            done.send(record.value, key=record.key)

        pods = lab.deploy("soak", Consumer(source, handle, order=order, guarantee=guarantee), replicas=2)
        begun = time.monotonic()

        def works() -> Iterator[Work]:
            return map(Work, range(records))

        load = lab.load(source, works(), rate=rate, key=lambda work: f"key {work.id % KEYS}")
        chaos = Chaos(lab, pods, chance)
        try:
            while not load.done:
                with suppress(TimeoutError, DeliveryFailed):  # what went wrong, the verdict below says
                    load.wait(10)
                print(f"{time.monotonic() - begun:7.1f} s  {load.count:,} sent  {pods!r}", flush=True)
        finally:
            chaos.peace()
        settled = lab.settle(180)
        verdict = lab.verdict(load, done, exactly_once=guarantee == "exactly once", timeout=0)
        print(f"{time.monotonic() - begun:7.1f} s  {settled!r}")
        print("faults:", ", ".join(f"{name} {count}" for name, count in chaos.done.most_common()))
        print(verdict)
        print(verdict.explain())
        with Reader(done) as reader:
            wrong = disorder(source, reader.read_to_end(), order)
        print(f"first deliveries out of order within a lane: {len(wrong)}", *wrong[:5], sep="\n  ")
        if too_little := chaos.too_little(records / rate):
            print("too little chaos:", too_little)
        if verdict.result != "valid":
            lab.logs("soak", 40)
        return verdict.result == "valid" and verdict.sent == records and not wrong and not too_little


def main() -> int:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    told.add_argument("--records", type=int, default=100_000)
    told.add_argument("--rate", type=float, default=800.0, help="records a second")
    told.add_argument("--exactly-once", action="store_true", help="with this guarantee no output may be there twice")
    chosen = told.parse_args()
    guarantee: Guarantee = "exactly once" if chosen.exactly_once else "at least once"
    with tempfile.TemporaryDirectory(prefix="labkit-soak-") as state:
        os.environ["LABKIT_STATE"] = state
        passed = soak(chosen.seed, chosen.records, chosen.rate, guarantee)
    print(f"seed {chosen.seed}: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
