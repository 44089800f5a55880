"""A second mirror of the same jobs, beside the first one: every Python process of the run imports this."""

from dataclasses import replace

from labkit.runtime.kafka_connect import KafkaConnect

_start = KafkaConnect.start


def _twice(self, connector, timeout=60.0):  # type: ignore[no-untyped-def]
    _start(self, connector, timeout)
    if connector.name == "jobs-out":
        _start(self, replace(connector, name="jobs-out-again"), timeout)


KafkaConnect.start = _twice  # type: ignore[method-assign]
