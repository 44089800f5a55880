"""A Kafka Connect that does not know, when it is started again, how far it has read."""

import uuid

from labkit.runtime.kafka_connect import KafkaConnect

_launch = KafkaConnect._launch


def _forgetful(self):  # type: ignore[no-untyped-def]
    settings = self.folder / "worker.properties"
    settings.write_text(f"{settings.read_text()}offset.storage.topic={self.prefix}connect-{uuid.uuid4().hex}\n")
    return _launch(self)


KafkaConnect._launch = _forgetful  # type: ignore[method-assign]
