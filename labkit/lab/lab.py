"""The lab: what a notebook holds. It connects, names a run, and makes topics, deployments, load, board and verdict."""

from __future__ import annotations

import atexit
import html
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import psutil

from labkit.kafka.effects import Sent
from labkit.kafka.errors import LabkitError, error_text
from labkit.kafka.reader import Reader
from labkit.kafka.records import T, decoder
from labkit.kafka.topics import Topic
from labkit.lab import comparison, evidence, runs
from labkit.lab.board import Board
from labkit.lab.comparison import Way
from labkit.lab.control import Control
from labkit.lab.deployment import Deployment, GroupMember, PodState, pane
from labkit.lab.faults import Action, Connection, Service, Switch, Target
from labkit.lab.kafka_connect import Connect
from labkit.lab.load import Load, identifier
from labkit.lab.metrics import Fault, History
from labkit.lab.panels import Panel, completed_panel, lag_panel, replica_panels, retries_panel, store_panels
from labkit.lab.planned import Planned, Plans
from labkit.lab.pod import Runnable
from labkit.lab.retry_console import RetryConsole
from labkit.lab.sampler import Sampler, undecodable
from labkit.lab.servers import Cache, Database, ServerFaults
from labkit.lab.settling import Settled, Settling, kafka_away
from labkit.lab.telemetry import PodReport
from labkit.lab.trace import trace
from labkit.lab.travel import pack
from labkit.lab.verdict import Verdict, judge
from labkit.runtime.broker import HOST, free_ports
from labkit.runtime.connect import connect, private
from labkit.runtime.server import ServerState

if TYPE_CHECKING:
    import pandas as pd

S = TypeVar("S", Database, Cache, Connect)

PACE = "LABKIT_PACE"  # environment variable: how much faster than told loads run and waits end; tests set it

LEAVE = 20.0  # seconds that `close` waits for the sessions of killed pods to end, so that their group can be deleted

_open: dict[str, Lab] = {}  # by notebook: a cell may run again. A lab lives until it is closed, forgotten or not


class Lab:
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
        self.run = runs.Run(self.notebook, self.connection.cluster_id, self.connection.origin == "private")
        undo.callback(self.run.forget)
        self.deployments: dict[str, Deployment] = {}
        self.loads: list[Load[Any]] = []
        self.topics: dict[str, Topic[Any]] = {}
        self._plans = Plans()
        self._at_end: list[Callable[[], object]] = []
        self._history = History()
        self._shared = "this Kafka is shared with other notebooks and `make lab`. "
        self._shared += f"One of your own to break: Lab({self.notebook!r}, cluster='private')"
        own = self.connection.brokers
        self.brokers = tuple(ServerFaults(one.name, one, self._history, needed=len(own) == 1) for one in own)
        """Faults of each broker."""
        if not own:
            self.brokers = (ServerFaults("Kafka", None, self._history, self._shared),)
        broker = self.connection.broker
        self._proxied = [] if broker is None else [Connection(broker.proxy, self._history)]
        self._targets: list[Database | Cache | Connect | Service] = []
        self._ports: dict[str, socket.socket] = {}
        self._boards: dict[tuple[str, ...], Board] = {}
        self._consoles: dict[str, RetryConsole] = {}
        self._telemetry = Topic(self.cluster, self.run.name("telemetry"), 1, PodReport)
        self._telemetry.create({"retention.ms": "3600000"})
        self._sampler = Sampler(self._history, self._telemetry, self.deployments, self.loads, self._look_at_kafka)
        self._settling = Settling(
            self.cluster,
            self.brokers,
            lambda: self._workers,
            self.deployments,
            self.loads,
            self._plans,
            self._history,
        )
        self._deploying = threading.Lock()
        self._closing = self._closed = False
        self._control = Control(self.run.folder, lambda: self.targets)
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

        Raises LabkitError for a name Kafka would not take, TopicMismatch for one that is there with other partitions,
        CannotTravel for a type that pods cannot have.
        """
        self._check_open()
        _check_partitions(partitions)
        pack(value)
        try:
            decoder(value)
        except (TypeError, NameError) as error:
            raise LabkitError(f"values of topic {name} cannot be of type {value!r}: {error}") from error
        topic = Topic(self.cluster, self.run.name(name), partitions, value)
        topic.create({**({"cleanup.policy": "compact"} if compacted else {}), **(config or {})})
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
            now = time.time()
            text = f"{topic.short}: {partitions} partitions"
            self._history.begin(Fault(now, now, "add partitions", topic.short, text))
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
                self._history.begin(Fault(time.time(), None, "redeploy", name, f"redeploy {name}"))
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
            self._ports[name] = _held_port()
        return int(self._ports[name].getsockname()[1])

    @property
    def broker(self) -> ServerFaults:
        """Faults of the broker. Raises LabkitError where there are several."""
        if len(self.brokers) > 1:
            raise LabkitError(
                f"this lab has {len(self.brokers)} brokers: take one of lab.brokers, or lab.leader(topic, partition)"
            )
        return self.brokers[0]

    def leader(self, topic: Topic[Any], partition: int = 0) -> ServerFaults:
        """Faults of the broker that leads this partition: its records are written there, and read from there. Kafka
        misses a broker that has died only some seconds later, and calls it the leader until then.

        Raises LabkitError for a partition that is not there, or has no leader; ClusterUnreachable.
        """
        self._check_open(topic)
        found = self.cluster.partitions(topic.name)
        if partition not in found:
            raise LabkitError(f"{topic.short} has partitions 0 to {len(found) - 1}, not {partition!r}")
        if (leader := found[partition].leader) < 0:
            raise LabkitError(
                f"{topic.short}/{partition} has no leader now: too many of lab.brokers are away, recover() them"
            )
        return self.brokers[leader - 1] if len(self.brokers) > 1 else self.brokers[0]

    def replicas(self, topic: Topic[Any]) -> list[Panel]:
        """Panels for a board: how many partitions of a topic each broker leads, and how many replicas are in sync.

        Raises LabkitError where there is one broker.
        """
        self._check_open(topic)
        if len(self.brokers) == 1:
            raise LabkitError("replicas are on several brokers: Lab(…, cluster='private', brokers=3) has three")
        return replica_panels(topic, [one.name for one in self.brokers])

    @property
    def proxy(self) -> Connection:
        """The way to this lab's own broker that can be cut, slowed down and held back. A pod takes it if its topics
        have its cluster: `replace(topic, cluster=lab.proxy.cluster)`. Board and verdict do not.

        Raises LabkitError where the broker is shared, or there are several.
        """
        self._check_open()
        if len(self.brokers) > 1:
            raise LabkitError(
                f"a lab with {len(self.brokers)} brokers has no proxy, as each of them tells clients where the others "
                "are. A lab with one broker has one: Lab(…, cluster='private')"
            )
        if not self._proxied:
            raise LabkitError(self._shared)
        return self._proxied[0]

    @property
    def folder(self) -> Path:
        """A folder for files of this run: the databases of views, say. It goes when the lab is closed."""
        self._check_open()
        return self.run.folder

    def wait_ready(self, *deployments: Deployment, timeout: float = 30.0) -> None:
        """Wait until every pod of these runs and consumers share all partitions of their topics, those too that were
        added; see `wait_until`."""
        everyone = self.deployments.values()
        there: dict[str, int] = {}
        with suppress(LabkitError):  # while Kafka is away: those with which they were deployed
            there = self.cluster.topics()
        beside = {
            one.name: [it for it in everyone if it is not one and it.group == one.group is not None]
            for one in deployments
        }
        what = f"{', '.join(beside)} to be ready"
        self.wait_until(lambda: all(one.ready(beside[one.name], there) for one in deployments), what, timeout)

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

    # -- looking at what happened ----------------------------------------------------------------------------------

    def seconds(self, told: float) -> float:
        """A length of time at this lab's pace."""
        return told / self.pace

    def figure(self, metric: str, label: str | None = None) -> float:
        """The newest value of what the history holds, NaN before its first: `lab.figure("requests/s", "clients")`. A
        panel of one line is a metric without labels: `lab.figure("charged")`."""
        return self._history.now(metric, metric if label is None else label)

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float = 60.0) -> None:
        """Wait until a condition holds, which is looked at every 20 ms. While a service that it asks does not answer
        (OSError) it does not hold.

        Raises LabkitError after `timeout` seconds: it names `what` was waited for, and has the pods' last lines.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                if answer := condition():
                    return
                why = "" if answer is False else f" ({answer!r})"
            except OSError as error:
                why = f" ({error_text(error)})"
            if time.monotonic() > until:
                raise LabkitError(f"not within {timeout:g} s: {what}{why}{self._said()}")
            time.sleep(0.02)

    def settle(self, timeout: float = 60.0) -> Settled:
        """Wait until loads are done, groups have no lag, and nothing waits for a retry. Never raises.

        What was planned by `when` and is still waiting once all is at rest is dropped. Where waiting cannot help it
        answers at once: while Kafka or Kafka Connect is down or frozen, a pod is frozen, or records are tried again
        against a service or database that somebody has to bring back (waiting would keep the buttons from working),
        and when a load, a connector, or what was planned by `when`, has failed.
        """
        return self._settling.settle(timeout)

    def unsettled(self) -> str | None:
        """Why this lab is not at rest now; None when it is."""
        return self._settling.unsettled()

    def verdict(
        self,
        sent: Load[Any] | Iterable[Load[Any]] | Iterable[Sent] | Mapping[Any, Any],
        done: Topic[Any] | evidence.Content | Callable[[], Topic[Any] | evidence.Content],
        by: str | Callable[[Any], str] = "id",
        name: str = "",
        exactly_once: bool = False,
        ordered: bool = True,
        early: Iterable[str] | Callable[[], Iterable[str]] | None = None,
        rejected: Iterable[str] | Callable[[], Iterable[str]] | None = None,
        timeout: float = 60.0,
    ) -> Verdict:
        """Wait until the lab has settled, then compare what was sent with what took effect, by business id.

        `sent`: loads, `Sent` tuples, or a mapping from an id to the value it is to have in the end. `done`: the topic
        in which work takes effect, `Effect`s (of a ledger), or a mapping from an id to the value it has (in a view).
        `early`, `rejected`: ids of what was done before its time, and of what was set aside (None: not asked). These
        three may be functions, which are called once the lab has settled.

        `exactly_once` admits no extra; `ordered`: each key is to take effect in the order of sending; `name` says what
        was looked at. The answer is `unknown`, with its reason, while the lab has not settled. If it is not `valid`,
        the pods' last lines are printed. Raises LabkitError for a value without the id, and for what cannot be
        compared.
        """
        given = sent if isinstance(sent, Mapping) else [sent] if isinstance(sent, Load) else list(sent)
        self._check_open(*given, done)
        stale = None
        was_read = any(isinstance(one, dict | list | tuple | set) for one in (done, early, rejected))
        if was_read and (reason := self.unsettled()):
            stale = f"what took effect was read before the lab had settled ({reason}): give a function that reads it"
        self.settle(timeout)
        # Looked at before the topics are read, or what comes to rest meanwhile would count as lost; and twice, since a
        # record that is handled between two looks may have made one upstream of what was looked at first.
        unknown = self.unsettled() or self.unsettled() or stale
        sends, others = evidence.sends(given, self.loads)
        effects, poison = evidence.took_effect(done() if callable(done) else done, identifier(by))
        found = judge(
            sends,
            effects,
            self._history.faults,
            name=name,
            exactly_once=exactly_once,
            ordered=ordered,
            early=early() if callable(early) else early,
            rejected=rejected() if callable(rejected) else rejected,
            others=others,
            unknown=unknown or poison,
        )
        if found.result != "valid":
            for deployment in self.deployments:
                self.logs(deployment)
        return found

    def compare(self, title: str, *ways: Way) -> pd.DataFrame:
        """Show what each way costs, the pattern last, and keep it as this notebook's row for `comparison`.

        `title` begins with the notebook's number, and ends with what the figures are for: "06 Aggregation: an import".
        """
        return comparison.write(runs.plain(self.notebook, "notebook"), title, ways)

    def comparison(self) -> pd.DataFrame:
        """The rows that notebooks beside this one have kept; a line says whose is missing."""
        return comparison.read()

    def records(self, topic: Topic[Any], last: int = 10) -> pd.DataFrame:
        """The newest records of a topic as a table: partition, offset, key, value, time (UTC).

        Records that do not decode are not in it; a line says how many.
        """
        import pandas as pd

        with Reader(topic) as reader:
            found = sorted(reader.read_to_end(), key=lambda record: record.timestamp)[-last:]
        if poison := undecodable(reader):
            print(f"Not shown: {poison}")  # noqa: T201
        rows = [(one.partition, one.offset, one.key, one.value, one.timestamp) for one in found]
        table = pd.DataFrame(rows, columns=["partition", "offset", "key", "value", "time"])
        return table.assign(time=pd.to_datetime(table["time"], unit="s").dt.round("ms"))

    def size_on_disk(self, topic: Topic[Any]) -> int:
        """Bytes of a topic's records in Kafka's files, all replicas. Raises LabkitError where Kafka is not this lab's
        own."""
        if not self.connection.brokers:
            raise LabkitError("only of a Kafka of its own does a lab know the files: Lab(…, cluster='private')")
        total = 0
        for broker in self.connection.brokers:
            for file in broker.folder.glob(f"data/{topic.name}-*/*.log"):
                with suppress(FileNotFoundError):  # Kafka has just deleted it
                    total += file.stat().st_size
        return total

    def history(self) -> pd.DataFrame:
        """Everything the sampler saw, tidy: time, seconds, metric, label, value."""
        return self._history.frame()

    def trace(self, id: object, by: str | Callable[[Any], Any] = "id") -> pd.DataFrame:  # noqa: A002 - as `by` names it
        """One record's life across pods, faults and redeliveries, oldest first.

        Columns: time (UTC), seconds since the first row, event, place, pod, detail. `by` is the business id that `id`
        is a value of. A handling shows by what it sent. Raises LabkitError when no record of this lab's topics has it.
        """
        self._check_open()
        return trace(id, by, list(self.topics.values()), self.faults)

    @property
    def faults(self) -> list[Fault]:
        """What was done to this lab, oldest first."""
        return self._history.faults

    def logs(self, name: str, lines: int = 20) -> None:
        """Print the last lines of a deployment's log: what its pods printed, and what befell them."""
        if name not in self.deployments:
            there = ", ".join(self.deployments) or "none so far"
            raise LabkitError(f"there is no deployment {name!r} in this lab: there is {there}")
        for line in self.deployments[name].log[-lines:]:
            print(line)  # noqa: T201

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
        state = "closed" if self._closing else f"{_ORIGIN[self.connection.origin]} at {self.cluster.bootstrap}"
        return f"Lab {self.notebook} (run {self.run.id}): {state}"

    def _repr_html_(self) -> str:
        rows: Mapping[str, str] = {
            **({"state": f"closed: {self._again}"} if self._closing else {}),
            "Kafka": f"{_ORIGIN[self.connection.origin]} at {self.cluster.bootstrap}",
            "run": f"{self.run.id}: topics and groups are named <code>{html.escape(self.run.prefix)}…</code>",
            "running": ", ".join(map(repr, self.deployments.values())) or "nothing yet",
            "memory": f"{_memory(self.deployments.values()) / 1e6:,.0f} MB in this notebook and its pods",
            "other labs": ", ".join(name.split(".")[2] for name, _ in runs.living() if name != self.run.prefix)
            or "none",
        }
        left = "style='text-align:left'"
        lines = "".join(f"<tr><th {left}>{name}</th><td>{text}</td></tr>" for name, text in rows.items())
        return f"<table><caption {left}><b>Lab {html.escape(self.notebook)}</b></caption>{lines}</table>"

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

    @property
    def _again(self) -> str:
        return f"run the notebook again from the cell with Lab({self.notebook!r})"

    def _check_open(self, *things: object) -> None:
        """Raises LabkitError when this lab is closed, or when one of `things` belongs to an earlier run of it."""
        if self._closing:
            raise LabkitError(f"this lab is closed: {self._again}")
        earlier = self.run.prefix.removesuffix(f"{self.run.id}.")
        for thing in things:
            topic = thing.topic if isinstance(thing, Load) else thing
            name = topic.name if isinstance(topic, Topic) else self.run.prefix
            stale = isinstance(thing, Deployment) and self.deployments.get(thing.name) is not thing
            if stale or (name.startswith(earlier) and not name.startswith(self.run.prefix)):
                raise LabkitError(f"{thing!r} belongs to an earlier run: run the notebook's cells again from the first")

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

    def _said(self) -> str:
        """How deployments stand, and the last lines of their pods."""
        return "".join("\n  ".join([f"\n{one!r}", *map(str, one.log[-10:])]) for one in self.deployments.values())

    def _status(self, deployments: Sequence[Deployment]) -> str:
        brokers = [f"{one.name} {one.state.value}" for one in self.brokers if one.state is not ServerState.RUNNING]
        kafka = brokers or [self._sampler.trouble or "Kafka up"]
        return " · ".join([*map(self._status_of, deployments), *kafka, *(one.status_line() for one in self._workers)])

    def _status_of(self, deployment: Deployment) -> str:
        pods = deployment.pods
        running = sum(pod.state in (PodState.RUNNING, PodState.SLOW) for pod in pods)
        again = [f"pod {pod.index} restarted {pod.restarts}×" for pod in pods if pod.restarts]
        more = f" ({', '.join(again)})" if again else ""
        rate = f" · {self._sampler.rate.get(deployment.name, 0.0):,.0f} records/s" if deployment.topics else ""
        return f"{deployment.name}: {running} of {len(pods)} pods running{more}{rate}"


_ORIGIN: Mapping[Literal["external", "compose", "embedded", "private"], str] = {
    "external": "your own cluster",
    "compose": "the broker of docker-compose.yml",
    "embedded": "embedded Apache Kafka",
    "private": "an embedded Apache Kafka of its own",
}


def _check_partitions(partitions: int) -> None:
    if not isinstance(partitions, int) or not 1 <= partitions <= 1000:
        raise LabkitError(f"a topic has 1 to 1000 partitions, not {partitions!r}")


def _memory(deployments: Iterable[Deployment]) -> int:
    """Bytes of memory that this process and its pods hold."""
    children = [pod.child for deployment in deployments for pod in deployment.pods]
    used = 0
    for process in (os.getpid(), *(child.pid for child in children if child is not None)):
        with suppress(psutil.Error):  # it has just ended
            used += psutil.Process(process).memory_info().rss
    return used


def _held_port() -> socket.socket:
    """A socket that is bound, and never listens: connections go to those who do, and nobody else gets its port."""
    while True:
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind((HOST, free_ports()[0]))
            return held
        except OSError:  # taken meanwhile, or connections that were closed a moment ago still have it
            held.close()


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
