"""Notices without their channel: every Python process of the run imports this."""

from labkit.kafka.producer import Producer

_send = Producer.send


def _keyless(self, topic, value, key=None, *more, **named):  # type: ignore[no-untyped-def]
    _send(self, topic, value, None if topic.endswith(".notices") else key, *more, **named)


Producer.send = _keyless  # type: ignore[method-assign]
