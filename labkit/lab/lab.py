"""The lab: what a notebook holds. It connects, names a run, and makes topics, deployments, load, board and verdict."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from labkit.kafka.errors import LabkitError
from labkit.kafka.records import T, decoder
from labkit.kafka.topics import Topic
from labkit.lab import remains, runs
from labkit.lab.board.board import Board
from labkit.lab.board.panels import Panel, completed_panel, lag_panel, retries_panel, store_panels
from labkit.lab.board.sampler import Sampler
from labkit.lab.brokers import Brokers
from labkit.lab.faults.control_socket import Control
from labkit.lab.faults.kafka_connect import Connect
from labkit.lab.faults.planned import Planned, Plans
from labkit.lab.faults.servers import Cache, Database, kafka_away
from labkit.lab.faults.service import Service, Switch
from labkit.lab.faults.target import Action, Target
from labkit.lab.history import History
from labkit.lab.load import Load, identifier
from labkit.lab.observing import Observing
from labkit.lab.pods.deployment import Deployment, GroupMember, pane
from labkit.lab.pods.process import Runnable
from labkit.lab.pods.telemetry import PodReport
from labkit.lab.pods.travel import pack
from labkit.lab.results import Results
from labkit.lab.retry_console import RetryConsole
from labkit.lab.status import kafka_line, lab_table, status_line
from labkit.lab.verdict.settling import Settling
from labkit.runtime.broker import held_port
from labkit.runtime.server import ServerState
from labkit.runtime.which_kafka import connect, private

S = TypeVar("S", Database, Cache, Connect)

PACE = "LABKIT_PACE"  # environment variable: how much faster than told loads run and waits end; tests set it

LEAVE = 20.0  # seconds that `close` waits for the sessions of killed pods to end, so that their group can be deleted

_open: dict[str, Lab] = {}  # by notebook: a cell may run again. A lab lives until it is closed, forgotten or not


class Lab(Observing, Brokers):
    """A run of one notebook on a Kafka: names of its own, and everything that happens in it.

    `notebook` is its name, used in the names of topics and groups. `pace` makes loads faster and fault windows shorter
    (2: twice as fast); the number of records stays. Making a Lab of the same name again closes the one before.
    `cluster`: "shared" is the Kafka that `connect()` finds; "private" is a broker of this lab alone, which `lab.broker`
    can break, or with `brokers=3` a cluster of three, `lab.brokers`.

    Raises LabkitError when no Kafka can be had.
    """

    _stays_in_the_notebook = "a handler runs in a pod: use topics, stores and plain values there, not the lab"

    def __init__(
        self,
        notebook: str,
        pace: float | None = None,
        cluster: Literal["shared", "private"] = "shared",
        brokers: int = 1,
    ) -> None:
        if not runs.plain(notebook, "notebook"):
            raise LabkitError(f"{notebook!r} cannot be a notebook's name: use letters, digits and '-'")
        self.notebook = notebook
        self.pace = _pace() if pace is None else pace
        if self.pace <= 0:
            raise LabkitError(f"pace must be positive, not {self.pace!r}")
        if cluster not in ("shared", "private"):
            raise LabkitError(f"cluster is 'shared' or 'private', not {cluster!r}")
        if not isinstance(brokers, int) or brokers not in (1, 3):
            raise LabkitError(f"a lab has 1 broker, or 3 (then one may be missing), not {brokers!r}")
        if brokers > 1 and cluster != "private":
            raise LabkitError(f"{brokers} brokers are a lab's own: Lab({notebook!r}, cluster='private', brokers=3)")
        if (before := _open.get(notebook)) is not None:
            before._end(0)
        self.connection = private(brokers) if cluster == "private" else connect()
        self.cluster = self.connection.cluster
        with ExitStack() as undo:
            undo.callback(self.connection.close)
            self._begin(undo)
            undo.pop_all()

    def _begin(self, undo: ExitStack) -> None:
        self.collected = runs.collect(self.cluster, self.connection.cluster_id)
        remains.warn_of_namesakes(self.connection)
        self.run = runs.Run(self.notebook, self.connection.cluster_id, self.connection.origin == "private")
        undo.callback(self.run.forget)
        self.deployments: dict[str, Deployment] = {}
        self.loads: list[Load[Any]] = []
        self.topics: dict[str, Topic[Any]] = {}
        self._plans = Plans()
        self._at_end: list[Callable[[], object]] = []
        self._history = History()
        self._know_brokers(self.notebook, self._history)
        self._targets: list[Database | Cache | Connect | Service] = []
        self._ports: dict[str, socket.socket] = {}
        self._boards: dict[tuple[str, ...], Board] = {}
        self._consoles: dict[str, RetryConsole] = {}
        self._telemetry = Topic(self.cluster, self.run.name("telemetry"), 1, PodReport)
        self.run.create(self._telemetry, {"retention.ms": "3600000"})
        self._sampler = Sampler(self._history, self._telemetry, self.deployments, self.loads, self._look_at_kafka)
        self._settling = Settling(
            self.cluster, self.brokers, lambda: self._workers, self.deployments, self.loads, self._plans, self._history
        )
        self._deploying = threading.Lock()
        self._closing = self._closed = False
        self._control = Control(self.run.folder, lambda: self.targets)
        self._results = None if self.connection.origin == "private" else Results(self.cluster, self.run)
        _open[self.notebook] = self

    # -- making things ---------------------------------------------------------------------------------------------

    def topic(
        self,
        name: str,
        partitions: int = 4,
        value: type[T] = dict,  # type: ignore[assignment]
        compacted: bool = False,
        config: Mapping[str, str] | None = None,
    ) -> Topic[T]:
        """A topic of this run, made if it is not there. `value` is the type its values decode to; `config` are Kafka's
        own settings of a topic.

        Raises LabkitError for a name Kafka would not take, NotAllowed, CannotTravel for a type that pods cannot have,
        TopicMismatch for one that is there with other partitions.
        """
        self._check_open()
        _check_partitions(partitions)
        pack(value)
        try:
            decoder(value)
        except (TypeError, NameError) as error:
            raise LabkitError(f"values of topic {name} cannot be of type {value!r}: {error}") from error
        topic = Topic(self.cluster, self.run.name(name), partitions, value)
        self.run.create(topic, {**({"cleanup.policy": "compact"} if compacted else {}), **(config or {})})
        self.topics[name] = topic
        return topic

    def add_partitions(self, topic: Topic[T], partitions: int) -> Topic[T]:
        """Give a topic of this run more partitions, so that it has this many, while it is written and read. Returns it
        as it is now. Who reads it notices within a second or two: `wait_ready` waits for that.

        New records of a key may lie in another partition than its old ones, and be handled before them. Where order
        counts, let loads end and the lab settle first. What keeps a state or a store by partition ends, and says so.

        Raises TopicMismatch when it has more: Kafka takes none away.
        """
        self._check_open(topic)
        _check_partitions(partitions)
        grown = replace(topic, partitions=partitions)
        if self.cluster.add_partitions(topic.name, partitions):
            self._history.note("add partitions", topic.short, f"{topic.short}: {partitions} partitions")
        self.topics[topic.short] = grown
        return grown

    def deploy(self, name: str, runnable: Runnable, replicas: int = 1) -> Deployment:
        """Keep `replicas` pods running `runnable`, under this name. One of that name is drained and replaced.

        A consumer without a group gets one of the deployment's name, so a replacement goes on where the one before
        stopped. Waits until that one has left, so that nothing of it acts or answers any more; not for pods to start.
        Interrupted meanwhile, that one leaves all the same, and nothing takes its place until it is deployed again.
        Raises CannotTravel when the handler uses what cannot live in another process, ClusterUnreachable when topics of
        its own cannot be made; what ran goes on then.
        """
        with self._deploying:
            self._check_open(*(runnable.sources if isinstance(runnable, GroupMember) else ()))
            full = self.run.name(name)
            if isinstance(runnable, GroupMember):
                runnable = replace(runnable, group=runnable.group or full)
            made = Deployment(name, runnable, replicas, self._telemetry, self._history)
            if isinstance(runnable, GroupMember):
                made.runnable = runnable.prepare()  # when nothing can be refused any more
            if (before := self.deployments.get(name)) is not None:
                self._history.note("redeploy", name, f"redeploy {name}", stands=True)
                before.drain()  # its group's partitions are free, and its work is committed, before pods start
                self._history.end("redeploy", name, time.time())
            self.deployments[name] = made
            self._check_open()  # a lab that is being closed ends what it finds here
            made.begin()
            return made

    def load(
        self,
        topic: Topic[T],
        values: Iterable[T],
        rate: float = 100.0,
        by: str | Callable[[T], str] = "id",
        key: str | Callable[[T], str | None] | None = None,
    ) -> Load[T]:
        """Send `values` to `topic`, `rate` a second (times the lab's pace), from a thread. Returns at once.

        `by` is the business id a verdict goes by, `key` the record's key: names of fields, or functions. Without a key
        the id is the key.
        """
        self._check_open(topic)
        if rate <= 0:
            raise LabkitError(f"rate must be positive, not {rate!r}")
        made = Load(topic, values, rate * self.pace, identifier(by), identifier(by if key is None else key))
        self.loads.append(made)
        return made

    def postgres(self) -> Database:
        """A PostgreSQL of this lab alone: the real server, empty, in 0.8 s. Each call starts another one.

        Raises LabkitError when it cannot be started.
        """
        return self._server(Database)

    def valkey(self) -> Cache:
        """A Valkey of this lab alone: the real server, empty, in 0.2 s. Each call starts another one.

        Raises LabkitError where no wheel brings it, or when it cannot be started.
        """
        return self._server(Cache)

    def connect(self) -> Connect:
        """Kafka Connect: the one worker of this lab, in this lab's Kafka. A second call returns it.

        Raises LabkitError when it cannot be started.
        """
        self._check_open()
        return next(iter(self._workers), None) or self._server(Connect, self.cluster, self.run.prefix)

    def service(self, name: str, switch: Switch) -> Service:
        """What can be done to the service of this name: `switch` tells it how it is to misbehave."""
        self._check_open()
        made = Service(name, switch, self._history)
        for one in [one for one in self._targets if isinstance(one, Service) and one.name == name]:
            one.close()  # of a cell that ran before: its timers must not end what the new one begins
            self._targets.remove(one)
        self._targets.append(made)
        return made

    def stores(self, *stores: tuple[Deployment, Topic[Any]]) -> list[Panel]:
        """Panels for a board: lag, loads and entries of the stores on these topics that run in these deployments."""
        self._check_open(*(deployment for deployment, _ in stores))
        return store_panels(stores, self.deployments)

    def port(self, name: str) -> int:
        """A port on 127.0.0.1 for the service of this name, the same at each call. Nobody else gets it while this lab
        lives; several pods may listen on it at once, if they do so with SO_REUSEPORT.
        """
        self._check_open()
        if name not in self._ports:
            self._ports[name] = held_port()
        return int(self._ports[name].getsockname()[1])

    @property
    def folder(self) -> Path:
        """A folder for files of this run: the databases of views, say. It goes when the lab is closed."""
        self._check_open()
        return self.run.folder

    def at_end(self, close: Callable[[], object]) -> None:
        """Call `close` when this lab is closed, before Kafka is let go."""
        self._check_open()
        self._at_end.append(close)

    def board(
        self,
        lag: Deployment | Sequence[Deployment] = (),
        retries: Deployment | None = None,
        completed: Topic[Any] | None = None,
        by: str | Callable[[Any], str] = "id",
        pods: Sequence[Deployment] = (),
        panels: Sequence[Panel] = (),
        actions: Sequence[Action] = (),
    ) -> Board:
        """A live picture of deployments: their lag, what they try again, what took effect, with buttons for faults.

        `pods` are the deployments that the buttons break; by default those of `lag` and `retries`. `completed` is the
        topic in which work takes effect; `by` its business id. `panels` (see `panel`) and `actions` come after these. A
        cell that runs again replaces its board.
        """
        behind = [lag] if isinstance(lag, Deployment) else list(lag)
        self._check_open(*behind, retries, completed, *pods)
        retries = behind[0] if retries is None and behind else retries
        seen = [*behind, *([] if retries is None else [retries])]
        topics = [topic.short for one in behind for topic in one.topics]
        shown = [lag_panel(topics)] if behind else []
        if retries is not None:
            shown.append(retries_panel([retries.name], [] if completed is None else [completed.short]))
        if completed is not None:
            self._sampler.tally(completed, by)
            shown.append(completed_panel(completed.short, topics))
        shown += panels
        if not shown:
            raise LabkitError("a board needs something to show: lab.board(lag=…), completed= or panels=")
        for one in shown:
            self._sampler.watch(one.readers)
        names = list(dict.fromkeys(one.name for one in pods or seen))

        def deployments() -> list[Deployment]:
            return [self.deployments[name] for name in names]

        made = Board(
            self._history,
            shown,
            lambda: self._status(deployments()),
            deployments if names else None,
            lambda: pane(deployments()),
            [*actions, *(action for broker in self.brokers for action in broker.actions())],
        )
        place = (*names, *(panel.title for panel in shown), completed.short if completed else "")
        if (before := self._boards.get(place)) is not None:
            before.close()
        self._boards[place] = made
        return made

    def when(self, condition: Callable[[], bool], action: Callable[[], object]) -> Planned:
        """Do `action`, a fault say, once `condition` holds, from a thread. Returns at once, so buttons keep working.

        The condition is looked at every 20 ms. While a service that it asks does not answer (OSError) it does not hold.
        The lab does not count as settled before the action was done. A cell that runs again plans the same only once;
        one that failed is forgotten when something is planned again.
        """
        self._check_open()
        return self._plans.add(condition, action)

    @property
    def targets(self) -> dict[str, Target]:
        """All that can be broken in this lab, by name."""
        pods = [pod for deployment in list(self.deployments.values()) for pod in deployment.pods]
        return {one.name: one for one in (*pods, *self.brokers, *self._proxied, *self._targets)}

    def retry_console(self, deployment: Deployment) -> RetryConsole:
        """What this deployment cannot get past, and its dead letters, with buttons; it ends with the lab.

        Raises LabkitError for a deployment without retries.
        """
        self._check_open(deployment)
        if (before := self._consoles.get(deployment.name)) is not None:
            before.close()
        made = self._consoles[deployment.name] = RetryConsole(self, deployment)
        return made

    def close(self) -> None:
        """End pods, loads and boards; delete this run's topics and groups; let go of Kafka.

        May be called again: what an interrupt or an error kept from its end is done then.
        Takes 7 s when a pod was killed just before, as so long it stays a member of its group; at most some 20 s.
        """
        self._end(LEAVE)

    def _end(self, wait: float) -> None:
        if self._closed:
            return
        self._closing = True
        for broker in self.brokers:
            if broker.state is ServerState.FROZEN:
                broker.recover()  # what waits for its answer would wait for long
        grace = 0.0 if kafka_away(self.brokers) else 5.0  # nobody could commit
        deployments = list(self.deployments.values())  # what is added from now on does not begin
        steps: list[Callable[[], object]] = [
            self._control.close,
            *reversed(self._at_end),
            *(partial(planned.drop, "the lab was closed") for planned in self._plans),
            *(load.cancel for load in self.loads),
            *(board.close for board in self._boards.values()),
            *(deployment.scale_down for deployment in deployments),
            *(partial(deployment.drain, grace) for deployment in deployments),
            self._sampler.close,
            *(target.close for target in self._targets),
            *([self._results.close] if self._results else ()),
            partial(self.run.end, self.cluster, wait),
            self.connection.close,
            *(held.close for held in self._ports.values()),
        ]
        with ExitStack() as stack:  # each whatever becomes of those before it
            for step in reversed(steps):
                stack.callback(step)
        self._closed = True
        if _open.get(self.notebook) is self:
            del _open[self.notebook]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closing else kafka_line(self.connection)
        return f"Lab {self.notebook} (run {self.run.id}): {state}"

    def _repr_html_(self) -> str:
        closed = self._again if self._closing else ""
        return lab_table(self.notebook, self.run, self.connection, self.deployments.values(), closed)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _server(self, kind: type[S], *more: Any) -> S:
        """Start one. From the second of its kind on, its name has a number."""
        self._check_open()
        count = 1 + sum(isinstance(one, kind) for one in self._targets)
        made = kind(f"{kind.kind.name}-{count}" if count > 1 else kind.kind.name, self._history, *more)
        self._targets.append(made)
        return made

    @property
    def _workers(self) -> list[Connect]:
        return [one for one in self._targets if isinstance(one, Connect)]

    def _look_at_kafka(self) -> None:
        """Deaths that nobody ordered are faults too: without them, what was redelivered would have no explanation."""
        deaths = 0
        with suppress(LabkitError):  # its supervisor is silent, or gone with it: nobody knows
            deaths = self.connection.deaths()
        if not self._closing:
            for broker in self.brokers:
                broker.look(deaths)
            for worker in self._workers:
                worker.look()

    def _status(self, deployments: Sequence[Deployment]) -> str:
        return status_line(deployments, self._sampler, self.brokers, self._workers)


def _check_partitions(partitions: int) -> None:
    if not isinstance(partitions, int) or not 1 <= partitions <= 1000:
        raise LabkitError(f"a topic has 1 to 1000 partitions, not {partitions!r}")


def _pace() -> float:
    told = os.environ.get(PACE) or "1"
    try:
        return float(told)
    except ValueError:
        raise LabkitError(f"{PACE} must be a number, not {told!r}") from None


@atexit.register
def _close_all() -> None:
    with ExitStack() as labs:  # all, though one of them fails
        for lab in _open.values():
            labs.callback(lab._end, 0)
