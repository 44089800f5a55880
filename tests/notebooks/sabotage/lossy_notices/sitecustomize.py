"""A producer that loses one notice in ten and says nothing: every Python process of the run imports this."""

import itertools

from labkit.kafka.producer import Producer

_send = Producer.send
_sent = itertools.count(1)


def _lossy(self, topic, value, key=None, *more, **named):  # type: ignore[no-untyped-def]
    if not topic.endswith(".notices") or next(_sent) % 10:
        _send(self, topic, value, key, *more, **named)


Producer.send = _lossy  # type: ignore[method-assign]
