"""Consumers and readers that see what was never committed: every Python process of the run imports this."""

from labkit.kafka.cluster import Cluster

_config = Cluster.config


def _everything(self, own):  # type: ignore[no-untyped-def]
    made = _config(self, own)
    return {**made, "isolation.level": "read_uncommitted"} if "group.id" in made else made


Cluster.config = _everything  # type: ignore[method-assign]
