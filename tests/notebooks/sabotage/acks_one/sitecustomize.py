"""Producers that take the word of the leader alone, where there are several brokers: every Python process of the run
imports this."""

from labkit.kafka.cluster import Cluster

_config = Cluster.config


def _leader_alone(self, own):  # type: ignore[no-untyped-def]
    made = _config(self, own)
    if "enable.idempotence" in made and "," in self.bootstrap:
        made |= {"enable.idempotence": False, "acks": 1}
    return made


Cluster.config = _leader_alone  # type: ignore[method-assign]
