"""A producer that sends every record of the learner's topics twice: every Python process of the run imports this."""

from labkit.kafka.producer import Producer

_send = Producer.send


def _twice(self, topic, *args, **more):  # type: ignore[no-untyped-def]
    _send(self, topic, *args, **more)
    if topic.endswith("renewals"):
        _send(self, topic, *args, **more)


Producer.send = _twice  # type: ignore[method-assign]
