"""A producer that sends every notice twice: every Python process of the run imports this."""

from labkit.kafka.producer import Producer

_send = Producer.send


def _twice(self, topic, value, key=None, *more, **named):  # type: ignore[no-untyped-def]
    for _ in range(1 + topic.endswith(".notices")):
        _send(self, topic, value, key, *more, **named)


Producer.send = _twice  # type: ignore[method-assign]
