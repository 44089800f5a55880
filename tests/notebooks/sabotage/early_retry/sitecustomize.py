"""Retries at half their time: every Python process of the run imports this."""

from labkit.patterns.retries import exponential

_delay = exponential.delay


def _half(self, attempt):  # type: ignore[no-untyped-def]
    delay = _delay(self, attempt)
    return delay if delay is None else delay / 2


exponential.delay = _half  # type: ignore[method-assign]
