"""The clients that a process keeps for a cluster, from their first use until the cluster has ended."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from labkit.kafka.cluster import Cluster

C = TypeVar("C")

_kept: dict[tuple[Any, ...], Any] = {}  # by factory, cluster and further arguments
_changing = threading.Lock()
_inherited: list[object] = []


def kept(make: Callable[..., C], cluster: Cluster, *more: Any, most: int | None = None) -> C:
    """The result of `make(cluster, *more)`, made once in this process. If there would be more than `most`, the oldest
    is let go."""
    key = (make, cluster, *more)
    found: C | None = _kept.get(key)
    oldest = None  # it is destroyed after the lock is released
    if found is None:
        with _changing:
            found = _kept.get(key)
            if found is None:
                same = [one for one in _kept if one[0] is make]
                if most is not None and len(same) >= most:
                    oldest = _kept.pop(same[0])
                found = _kept[key] = make(cluster, *more)
    del oldest
    return found


def forget(cluster: Cluster, make: Callable[..., object] | None = None) -> None:
    """Let go of the clients of a cluster, or only of those that `make` made. What they have not sent is lost.

    Clients of a cluster that has ended would try to reach it for ever.
    """
    with _changing:
        keys = [key for key in _kept if key[1] == cluster and make in (None, key[0])]
        gone = [_kept.pop(key) for key in keys]
    del gone  # outside the lock, because destroying a client takes time


def _leave_inherited() -> None:
    """Keep the parent's clients in a forked process: they have no threads there, and destroying one would crash."""
    global _kept, _changing
    _inherited.append(_kept)
    _kept, _changing = {}, threading.Lock()


os.register_at_fork(after_in_child=_leave_inherited)
