"""The clients that a process keeps for a cluster: made when first asked for, and let go when the cluster is no more."""

from __future__ import annotations

from labkit.kafka import cluster as administration
from labkit.kafka import lag, producer
from labkit.kafka.cluster import Cluster


def forget(cluster: Cluster) -> None:
    """Let go of the clients kept for a cluster that has ended: they would try to reach it for ever."""
    producer.let_go(cluster)
    administration._admin.cache_clear()
    lag._asker.cache_clear()
