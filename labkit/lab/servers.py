"""Faults of servers: what can be done to the Kafka of a lab that has one to itself, and to its PostgreSQL."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from labkit.kafka.errors import LabkitError
from labkit.lab.board import Action
from labkit.lab.metrics import Fault, History
from labkit.runtime.postgres import Postgres
from labkit.runtime.server import Server, ServerState
from labkit.runtime.valkey import Valkey


class ServerFaults:
    """Kill, freeze, thaw and restart a server, as the buttons of a board do. Each is noted among the lab's faults.

    `server` is None where others use it too; then `shared` says so, and what to do about it. Methods raise LabkitError
    there, and when a fault makes no sense now, saying why.
    """

    _stays_in_the_notebook = "faults are injected from the notebook, not from a handler"

    def __init__(self, name: str, server: Server | None, history: History, shared: str = "") -> None:
        self.name = name
        self._server, self._history, self._shared = server, history, shared
        self._looked, self._deaths = time.time(), 0
        self._doing = threading.Lock()  # what is being done is not to be taken for what befell it

    @property
    def state(self) -> ServerState:
        """What it is doing. One that others use too is taken to be running."""
        return ServerState.RUNNING if self._server is None else self._server.state

    def actions(self) -> list[Action]:
        """A board's buttons for all of these, each disabled with its reason while it makes no sense."""
        up, frozen, down = ServerState.RUNNING, ServerState.FROZEN, ServerState.DOWN
        return [
            self._action("Kill", "kill -9 it. It stays down until it is restarted.", self.kill, up, frozen),
            self._action("Freeze", "Stop it in its tracks (SIGSTOP): connected, and silent.", self.freeze, up),
            self._action("Thaw", "Let it go on (SIGCONT).", self.thaw, frozen),
            self._action("Restart", "Start it on its data; one that runs stops first.", self.restart, up, frozen, down),
        ]

    def why_not(self, *states: ServerState) -> str | None:
        """Why a fault that needs it to be in one of `states` makes no sense now; None when it does."""
        if self._server is None:
            return self._shared
        return None if self.state in states else f"{self.name} is {self.state.value}."

    def kill(self) -> None:
        """kill -9. It stays down until `restart`; what it had confirmed is in its files."""
        self._stands("kill", self._own().kill)
        self._history.end("freeze", self.name, time.time())

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered, until `thaw`."""
        self._stands("freeze", self._own().freeze)

    def thaw(self) -> None:
        """SIGCONT: it goes on as if no time had passed."""
        self._own().thaw()
        self._history.end("freeze", self.name, time.time())

    def restart(self) -> None:
        """Start it, on its data; one that runs is stopped in good order first. Returns once it answers: 0.1 to 3 s."""
        server = self._own()
        if server.state is ServerState.RUNNING:
            self._history.begin(Fault(time.time(), None, "restart", self.name, f"restart {self.name}"))
        try:
            server.restart()
        finally:
            for kind in ("kill", "freeze", "restart"):
                self._history.end(kind, self.name, time.time())

    def look(self, deaths: int = 0) -> None:
        """Note a death that nobody ordered. `deaths` is how often one that is started again by itself has died."""
        before, self._looked = self._looked, time.time()
        if deaths > self._deaths:
            self._deaths = deaths
            self._history.begin(Fault(before, self._looked, "death", self.name, f"{self.name} died"))
        with self._doing:
            if self._server is None or self.state is not ServerState.DOWN:
                return
            if not any((one.kind, one.target) == ("kill", self.name) for one in self._history.standing()):
                self._history.begin(Fault(before, None, "kill", self.name, f"{self.name} died"))

    def __repr__(self) -> str:
        return f"{self.name} is {self.state.value}; {'a fault may be injected' if self._server else self._shared}"

    def _repr_html_(self) -> str:
        return f"<span>{html.escape(repr(self))}</span>"

    def _action(self, verb: str, about: str, fault: Callable[[], None], *states: ServerState) -> Action:
        return Action(f"{verb} {self.name}", about, fault, lambda: self.why_not(*states))

    def _stands(self, kind: str, act: Callable[[], None]) -> None:
        since = time.time()
        with self._doing:
            act()
            self._history.begin(Fault(since, None, kind, self.name, f"{kind} {self.name}"))

    def _own(self) -> Server:
        if self._server is None:
            raise LabkitError(self._shared)
        return self._server


class Database(ServerFaults):
    """A lab's own PostgreSQL, and what can be done to it: kill and restart. It ends with the lab."""

    _stays_in_the_notebook = "give a handler its `dsn`, which is a text"

    def __init__(self, server: Postgres, history: History) -> None:
        super().__init__(server.name, server, history)
        self.dsn = server.dsn
        """How to reach it, for psycopg and any other client of libpq."""
        self.close = server.close
        self._committed: tuple[float, int] | None = None

    def transactions(self) -> float:
        """Transactions a second since it was asked last, for a panel; 0 while it is down."""
        import psycopg

        before, self._committed = self._committed, None
        sql = "select xact_commit from pg_stat_database where datname = current_database()"
        with suppress(psycopg.Error), psycopg.connect(self.dsn, connect_timeout=1) as client:
            self._committed = time.monotonic(), client.execute(sql).fetchall()[0][0]
        if before is None or self._committed is None or self._committed[0] <= before[0]:
            return 0.0
        return max(0, self._committed[1] - before[1]) / (self._committed[0] - before[0])  # a kill takes the count away

    def actions(self) -> list[Action]:
        """The board's buttons for it. It cannot be frozen: each of its connections is a process of its own."""
        return [action for action in super().actions() if action.label.split()[0] in ("Kill", "Restart")]


class Cache(ServerFaults):
    """A lab's own Valkey, and what can be done to it. It ends with the lab."""

    _stays_in_the_notebook = "give a handler its `port`, which is a number"

    def __init__(self, server: Valkey, history: History) -> None:
        super().__init__(server.name, server, history)
        self.port = server.port
        """Where it answers, on 127.0.0.1."""
        self.close = server.close
