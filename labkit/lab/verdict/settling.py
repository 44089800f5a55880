"""Whether a lab has come to rest: before that, missing records may still come, and nothing can be judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.kafka.lag import lag
from labkit.kafka.topics import short_name
from labkit.lab.faults.planned import Plans
from labkit.lab.faults.servers import ServerFaults, kafka_away
from labkit.lab.history import History, clock
from labkit.lab.load import Load
from labkit.lab.pods.deployment import Deployment
from labkit.lab.pods.pod import PodState

if TYPE_CHECKING:
    from labkit.lab.faults.kafka_connect import Connect

QUIET = 1.5  # seconds without work after which a plan is dropped; pods report their work sooner


@dataclass(frozen=True)
class Settled:
    """Whether a lab has come to rest: everything sent is handled, nothing waits. If not, why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return "settled: no lag, nothing waits" if self.ok else f"unknown: {self.reason}"


@dataclass(frozen=True)
class Settling:
    """Everything in a lab that has to come to rest."""

    cluster: Cluster
    brokers: Sequence[ServerFaults]
    workers: Callable[[], Sequence[Connect]]
    deployments: Mapping[str, Deployment]
    loads: Sequence[Load[Any]]
    plans: Plans
    history: History

    def settle(self, timeout: float) -> Settled:
        """Wait for it: see `Lab.settle`."""
        begun, calm, quiet_since = time.monotonic(), 0, float("inf")
        while True:
            if hopeless := self.hopeless():
                return Settled(False, hopeless)
            moving = self.moving()
            now = time.monotonic()
            quiet_since = float("inf") if moving else min(quiet_since, now)
            if now - quiet_since > QUIET:
                for planned in self.plans:  # their condition cannot become true by itself any more
                    planned.drop("all came to rest before its condition held")
            reason = moving or self.plans.waiting() or ""
            # Twice, because a record that is handled between two looks may have made one upstream of the first look.
            calm = 0 if reason else calm + 1
            if calm >= 2:
                return Settled(True)
            if now - begun > timeout:
                return Settled(False, f"after {timeout:g} s: {reason or 'only just calm'}")
            time.sleep(0.05)

    def unsettled(self) -> str | None:
        """Why it is not at rest now; None when it is."""
        return self.hopeless() or self.moving() or self.plans.waiting()

    def hopeless(self) -> str | None:
        """Why this lab cannot settle by itself; None if it can."""
        if kafka := kafka_away(self.brokers):
            return kafka
        for worker in self.workers():
            if worker.away:
                return f"{worker.name} is {worker.state.value}: recover it first"
            worker.look()
            for connector in worker.connectors:
                if connector.state == "failed":
                    return f"connector {connector.name} failed: {connector.error}"
        for deployment in self.deployments.values():
            for pod in deployment.pods:
                if pod.state is PodState.FROZEN:
                    return f"{pod.name} is frozen: recover it first"
        if failed := self.plans.failed():
            return failed
        newest = {load.topic.name: load for load in self.loads}  # a cell that runs again replaces a failed load
        for load in newest.values():
            if load.error:
                return f"the load on {load.topic.short} failed: {load.error}"
        standing = [one for one in self.history.standing() if one.needs_mending]
        if standing and (waiting := [one for one in self.deployments.values() if one.waiting]):
            return f"{self._unfinished(waiting[0])}; {standing[0].text} stands: end that first"
        return None

    def moving(self) -> str | None:
        """What is still going on; None if nothing is."""
        for load in self.loads:
            if not load.done:
                return f"the load on {load.topic.short} still sends"
        for worker in self.workers():
            for connector in worker.connectors:
                if connector.state in ("starting", "unknown"):
                    return f"connector {connector.name} is {connector.state}"
        return next(filter(None, map(self._unfinished, self.deployments.values())), None)

    def _unfinished(self, deployment: Deployment) -> str | None:
        """What a deployment still has to do, in words; None if nothing."""
        name = deployment.name
        if waiting := deployment.waiting:
            first = min(waiting, key=lambda one: one.since)
            many = "1 record" if len(waiting) == 1 else f"{len(waiting):,} records"
            since = f"{first.attempt} failed attempts since {clock(first.since)}"
            return f"{many} of {name} in a back-off: {short_name(first.place)}, {since}: {first.error}"
        if deployment.group is None:
            return None
        try:
            behind = lag(self.cluster, deployment.group, [topic.name for topic in deployment.topics])
        except LabkitError as error:
            return str(error)
        there = {topic for topic, _ in behind}
        if gone := [topic.short for topic in deployment.topics if topic.name not in there]:
            return f"{name} consumes {', '.join(gone)}, which does not exist (any more)"
        if not (records := sum(behind.values())):
            return None
        said = f"{name} is {records:,} records behind"
        if not deployment.pods:
            return f"{said} and has no pods: scale it up, or deploy it again"
        ill = [pod for pod in deployment.pods if pod.state is PodState.RESTARTING]
        return f"{said}, and {ill[0].name} keeps ending: lab.logs({name!r}) says why" if ill else said
