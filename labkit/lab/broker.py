"""Faults of the broker: what can be done to the Kafka of a lab that has one to itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from labkit.kafka.errors import LabkitError
from labkit.lab.board import Action
from labkit.lab.metrics import Fault, History
from labkit.runtime.private import BrokerState, PrivateBroker

TARGET = "Kafka"


class BrokerFaults:
    """Kill, freeze, thaw and restart the broker, as the buttons of a board do. Each is noted among the lab's faults.

    Only for `Lab(…, cluster="private")`: any other Kafka is used by others too. Methods raise LabkitError there, and
    when a fault makes no sense now, saying why.
    """

    _stays_in_the_notebook = "faults are injected from the notebook, not from a handler"

    def __init__(self, broker: PrivateBroker | None, history: History, notebook: str) -> None:
        self._broker, self._history = broker, history
        self._shared = f"others use this Kafka too. One of your own to break: Lab({notebook!r}, cluster='private')"

    @property
    def state(self) -> BrokerState:
        """What it is doing. A Kafka that others use too is taken to be running."""
        return BrokerState.RUNNING if self._broker is None else self._broker.state

    def actions(self) -> list[Action]:
        """A board's buttons for all of these, each disabled with its reason while it makes no sense."""
        up, frozen, down = BrokerState.RUNNING, BrokerState.FROZEN, BrokerState.DOWN

        def action(verb: str, about: str, fault: Callable[[], None], *states: BrokerState) -> Action:
            return Action(f"{verb} Kafka", about, fault, lambda: self.why_not(*states))

        return [
            action("Kill", "kill -9 the broker. It stays down until it is restarted.", self.kill, up, frozen),
            action("Freeze", "Stop the broker in its tracks (SIGSTOP): connected, and silent.", self.freeze, up),
            action("Thaw", "Let it go on (SIGCONT).", self.thaw, frozen),
            action(
                "Restart", "Start the broker on its data; one that runs stops first.", self.restart, up, frozen, down
            ),
        ]

    def why_not(self, *states: BrokerState) -> str | None:
        """Why a fault that needs it to be in one of `states` makes no sense now; None when it does."""
        if self._broker is None:
            return self._shared
        return None if self.state in states else f"Kafka is {self.state.value}."

    def kill(self) -> None:
        """kill -9. It stays down until `restart`; what it had confirmed is in its files."""
        self._stands("kill", self._own().kill)
        self._history.end("freeze", TARGET, time.time())

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered, until `thaw`."""
        self._stands("freeze", self._own().freeze)

    def thaw(self) -> None:
        """SIGCONT: it goes on as if no time had passed."""
        self._own().thaw()
        self._history.end("freeze", TARGET, time.time())

    def restart(self) -> None:
        """Start it, on its data; one that runs is stopped in good order first. Returns once it answers: 1 to 3 s."""
        broker = self._own()
        if broker.state is BrokerState.RUNNING:
            self._history.begin(Fault(time.time(), None, "restart", TARGET, f"restart {TARGET}"))
        try:
            broker.restart()
        finally:
            for kind in ("kill", "freeze", "restart"):
                self._history.end(kind, TARGET, time.time())

    def __repr__(self) -> str:
        return f"Kafka is {self.state.value}; {'a fault may be injected' if self._broker else self._shared}"

    def _stands(self, kind: str, act: Callable[[], None]) -> None:
        since = time.time()
        act()
        self._history.begin(Fault(since, None, kind, TARGET, f"{kind} {TARGET}"))

    def _own(self) -> PrivateBroker:
        if self._broker is None:
            raise LabkitError(self._shared)
        return self._broker
