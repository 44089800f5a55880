"""A store whose records have no key, so that Kafka could not keep the latest: every Python process imports this."""

from labkit.kafka.producer import Producer

_send = Producer.send


def _keyless(self, topic, value, key=None, headers=None, partition=-1, on_delivery=None):  # type: ignore[no-untyped-def]
    _send(self, topic, value, None if on_delivery else key, headers, partition, on_delivery)


Producer.send = _keyless  # type: ignore[method-assign]
