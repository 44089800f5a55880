"""A producer that loses one record in fifty and says nothing: every Python process of the run imports this."""

import itertools

from labkit.kafka.producer import Producer

_sent = itertools.count(1)
_send = Producer.send


def _lossy(self, topic, value, key=None, headers=None, partition=-1, on_delivery=None):  # type: ignore[no-untyped-def]
    if not topic.endswith("telemetry") and next(_sent) % 50 == 0:
        return
    _send(self, topic, value, key, headers, partition, on_delivery)


Producer.send = _lossy  # type: ignore[method-assign]
