"""Servers that a lab can break: the brokers of a Kafka of its own, its databases and its caches."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import cast

from labkit.lab.faults.target import Target
from labkit.lab.history import History
from labkit.runtime.postgres import Postgres
from labkit.runtime.server import Server, ServerState
from labkit.runtime.valkey import Valkey

_UP, _FROZEN, _DOWN = ServerState.RUNNING, ServerState.FROZEN, ServerState.DOWN


class ServerFaults(Target):
    """Kill, freeze, restart and recover a server.

    `server` is None if others use it too; then `shared` says so, and what to do about it. `needed`: work cannot be done
    while it is broken, because no other server takes its place.
    """

    verbs: Mapping[str, Collection[Enum]] = {
        "kill": (_UP, _FROZEN),
        "freeze": (_UP,),
        "restart": (_UP,),
        "recover": (_FROZEN, _DOWN),
    }

    def __init__(
        self, name: str, server: Server | None, history: History, shared: str = "", needed: bool = True
    ) -> None:
        super().__init__(name, history)
        self._server, self._shared, self._needed = server, "" if server else shared, needed
        self._looked, self._deaths = time.time(), 0
        self._doing = threading.Lock()  # while we break it, its death is not unexpected

    @property
    def state(self) -> ServerState:
        """Its state. A shared server counts as running."""
        return _UP if self._server is None else self._server.state

    def why_not(self, verb: str) -> str | None:
        return self._shared or super().why_not(verb)

    def kill(self) -> None:
        """kill -9 it. It stays down until it recovers; what it had confirmed is in its files."""
        if self.state is not _DOWN:
            self._stands("kill")
            self._ended("freeze")

    def freeze(self) -> None:
        """Stop it in its tracks (SIGSTOP): connections stay open and nothing is answered, until it recovers."""
        if self.state is not _FROZEN:
            self._stands("freeze")

    def restart(self) -> None:
        """Stop it in good order, and start it on its data.

        Returns once it answers.
        """
        server = self._own("restart")
        self._began("restart", f"restart {self.name}")
        try:
            server.restart()
        finally:
            self._ended("restart")

    def recover(self) -> str:
        """Let it go on (SIGCONT) if it is frozen, as if no time had passed; start it on its data if it is down.

        Returns once it answers, and says what was mended, or that there was nothing to mend. It does not wait for a
        server that needs others before it can answer.
        """
        state = self.state
        if not self._shared and state not in (_FROZEN, _DOWN):
            return self._nothing()
        server = self._own("recover")
        mend = server.thaw if state is _FROZEN else server.restart
        mend()
        self._ended()
        if state is _FROZEN:
            return f"{self.name} goes on"
        waits_for = server.waits_for
        return f"{self.name} starts; it answers when {waits_for} is there" if waits_for else f"{self.name} is up again"

    @property
    def away(self) -> bool:
        return self.state in (_DOWN, _FROZEN)

    def look(self, deaths: int = 0) -> None:
        """Note an unexpected death. `deaths` counts those of a server that is restarted automatically."""
        before, self._looked = self._looked, time.time()
        if deaths > self._deaths:
            self._deaths = deaths
            self.history.note("death", self.name, f"{self.name} died", since=before)
        with self._doing:
            killed = any((one.kind, one.target) == ("kill", self.name) for one in self.history.standing())
            if self.state is _DOWN and not killed:
                self._began("kill", f"{self.name} died", before, needs_mending=self._needed)

    def close(self) -> None:
        """End it, and remove its data."""
        if self._server is not None:
            self._server.close()

    def _stands(self, verb: str) -> None:
        server, since = self._own(verb), time.time()
        with self._doing:
            getattr(server, verb)()
            self._began(verb, f"{verb} {self.name}", since, needs_mending=self._needed)

    def _own(self, verb: str) -> Server:
        self._check(verb)
        return cast(Server, self._server)  # else the check would have refused


def kafka_away(brokers: Sequence[ServerFaults]) -> str | None:
    """Why Kafka does not work, and what mends it; None when a majority of its brokers is there."""
    away = [one for one in brokers if one.away]
    if 2 * len(away) < len(brokers):
        return None
    said = ", ".join(f"{one.name} is {one.state.value}" for one in away)
    if len(brokers) == 1:
        return f"{said}: lab.broker.recover() mends it"
    return f"{said}, which leaves no majority of {len(brokers)} brokers: recover() them in lab.brokers"


class Database(ServerFaults):
    """A lab's own PostgreSQL, and what can be done to it: kill, restart, recover. It ends with the lab."""

    _stays_in_the_notebook = "give a handler its `dsn`, which is a text"

    # It cannot be frozen: each of its connections is a process of its own.
    verbs: Mapping[str, Collection[Enum]] = {how: when for how, when in ServerFaults.verbs.items() if how != "freeze"}

    kind = Postgres

    def __init__(self, name: str, history: History) -> None:
        super().__init__(name, server := Postgres(), history)
        self.dsn = server.dsn
        """How to reach it, for psycopg and any other client of libpq."""
        self._committed: tuple[float, int] | None = None

    def transactions(self) -> float:
        """Transactions a second since the last call, for a panel; 0 while it is down."""
        import psycopg

        before, self._committed = self._committed, None
        sql = "select xact_commit from pg_stat_database where datname = current_database()"
        with suppress(psycopg.Error), psycopg.connect(self.dsn, connect_timeout=1) as client:
            self._committed = time.monotonic(), client.execute(sql).fetchall()[0][0]
        if before is None or self._committed is None or self._committed[0] <= before[0]:
            return 0.0
        return max(0, self._committed[1] - before[1]) / (self._committed[0] - before[0])  # a kill resets the count


class Cache(ServerFaults):
    """A lab's own Valkey, and what can be done to it. It ends with the lab."""

    _stays_in_the_notebook = "give a handler its `port`, which is a number"

    kind = Valkey

    def __init__(self, name: str, history: History) -> None:
        super().__init__(name, server := Valkey(), history)
        self.port = server.port
        """Where it answers, on 127.0.0.1."""
