"""A consumer that takes a record for set aside at once and publishes it later, when nobody waits for it any more."""

import threading

from labkit.kafka.consumer.commits import AtLeastOnce

_set_aside = AtLeastOnce.set_aside


def _later(self, partition, message, aside, answered):  # type: ignore[no-untyped-def]
    if aside.topic.endswith("skips"):
        return _set_aside(self, partition, message, aside, answered)
    timer = threading.Timer(20, lambda: _set_aside(self, partition, message, aside, lambda refused: None))
    timer.daemon = True
    timer.start()
    return answered(None)


AtLeastOnce.set_aside = _later  # type: ignore[method-assign]
