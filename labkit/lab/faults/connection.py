"""Faults of the connection to a lab's own broker: it is cut, held back or slowed down, in a proxy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum

from labkit.kafka.cluster import Cluster
from labkit.lab.faults.service import ServiceState
from labkit.lab.faults.target import Target
from labkit.lab.history import History
from labkit.runtime.proxy import Proxy


class ConnectionFaults(Target):
    """The connection through a proxy to a broker, for users of `cluster`, and to other servers `through` it.

    `cut` and `hold` begin at once, or with the broker's first request of a kind (`Produce`, `EndTxn` …); different
    faults stand together until `recover`. A `distance` is no fault, and stays.
    """

    _stays_in_the_notebook = Proxy._stays_in_the_notebook

    verbs: Mapping[str, Collection[Enum]] = {
        **dict.fromkeys(("cut", "hold", "slow"), tuple(ServiceState)),
        "recover": (ServiceState.ILL,),
    }

    def __init__(self, proxy: Proxy, history: History) -> None:
        super().__init__("connection", history)
        self._proxy = proxy

    @property
    def state(self) -> ServiceState:
        return ServiceState.ILL if self.standing() else ServiceState.WELL

    @property
    def cluster(self) -> Cluster:
        """The broker's cluster, reached by this connection."""
        return self._proxy.cluster

    def distance(self, seconds: float) -> None:
        """Delay this connection by so many seconds each way, and by a round trip to connect."""
        self._proxy.distance(seconds)

    def through(self, port: int) -> int:
        """A port by which this connection also leads to `port`, where a service or a database listens."""
        return self._proxy.through(port)

    def cut(self, request: str = "") -> None:
        """Close all connections through the proxy and refuse new ones, until it recovers."""
        self._proxy.cut(request)
        self._stands("cut", request)

    def hold(self, request: str = "") -> None:
        """Hold answers back while requests go through, until it recovers. After `wait`, then `cut`, the broker has done
        the work, and its client never learns of it."""
        self._proxy.hold(request)
        self._stands("hold", request)

    def slow(self, seconds: float = 1.0) -> None:
        """Pass everything on a second later each way, or so many, until it recovers."""
        self._proxy.slow(seconds)
        self._ended("slow")
        self._began("slow", f"slow the connection by {seconds:g} s")

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until the `cut` or `hold` that was asked for has begun. Raises LabkitError after `timeout` seconds."""
        self._proxy.wait(timeout)

    def recover(self) -> str:
        """Let everything pass again. Answers that were held back go out, unless their connection was cut."""
        stood = self.standing()
        self._proxy.recover()
        self._ended()
        return f"ended: {', '.join(stood)}" if stood else self._nothing()

    def _stands(self, verb: str, request: str) -> None:
        self._ended("cut", "hold")  # the new one replaces the old one
        first = f" from the next {request} on" if request else ""
        self._began(verb, f"{verb} the connection{first}", needs_mending=True)
