"""A policy that says "set aside" first and publishes later, when nobody waits for it any more."""

import threading

from labkit.patterns.retries import _Retries

_publish = _Retries.publish


def _later(self, case, topic, value, key, headers=None):  # type: ignore[no-untyped-def]
    if topic.endswith("skips"):
        return _publish(self, case, topic, value, key, headers)
    timer = threading.Timer(20, lambda: self.producer.send(topic, value, key, headers))
    timer.daemon = True
    timer.start()
    return None


_Retries.publish = _later  # type: ignore[method-assign]
