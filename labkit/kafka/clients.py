"""The clients that a process keeps for a cluster: made when first asked for, and let go when the cluster is no more."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from labkit.kafka.cluster import Cluster

C = TypeVar("C")

_kept: dict[tuple[Any, ...], Any] = {}  # by what makes them, cluster, and what else they are made of
_changing = threading.Lock()
_inherited: list[object] = []


def kept(make: Callable[..., C], cluster: Cluster, *more: Any, most: int | None = None) -> C:
    """What `make(cluster, *more)` gives, made once in this process. Of more than `most`, the one made first goes."""
    key = (make, cluster, *more)
    found: C | None = _kept.get(key)
    oldest = None  # it ends with this call, and not while others wait
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
    """Let go of the clients kept for a cluster, or those that `make` made, with what they have not sent.

    Those of a cluster that has ended would try to reach it for ever.
    """
    with _changing:
        keys = [key for key in _kept if key[1] == cluster and make in (None, key[0])]
        gone = [_kept.pop(key) for key in keys]
    del gone  # their end may take its time


def _leave_inherited() -> None:
    """In a forked process the clients made before have no threads, and to end one would crash."""
    global _kept, _changing
    _inherited.append(_kept)
    _kept, _changing = {}, threading.Lock()


os.register_at_fork(after_in_child=_leave_inherited)
