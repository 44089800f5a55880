"""Exactly once: what goes out with a commit, that is what handlers sent and copies of what was set aside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
from confluent_kafka import KafkaError
from confluent_kafka import Message as DeliveryReport

from labkit.kafka.producer import Output
from labkit.kafka.records import Message, coordinates

# Refusals for which another attempt is no use: of a record, and of a topic.
RECORD_REFUSED = (
    *(KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE, KafkaError.INVALID_RECORD),
    *(KafkaError.INVALID_MSG, KafkaError.INVALID_TIMESTAMP, KafkaError.POLICY_VIOLATION),
)
TOPIC_REFUSED = (
    *(KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION),
    *(KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.TOPIC_EXCEPTION),
)

Refusals: TypeAlias = "dict[int, tuple[Held, int, str]]"
"""By the id of a Held: itself, and code and text of the error with which one of its outputs was refused."""


class Held(msgspec.Struct, eq=False, gc=False):
    """What the handler of these records sent, or the copy of a record that was set aside, until it is committed.
    Without records: the changes of a state.

    It is also the client's callback when one of its outputs is refused. There are thousands at a time, so the garbage
    collector does not look at them. (One more object for each output cost a tenth of the speed.)
    """

    messages: Sequence[Message]
    outputs: list[Output]
    refusals: Refusals
    is_aside: bool = False

    @property
    def what(self) -> str:
        """A name for its outputs, for errors."""
        if not self.messages:
            return "a value of the handler's state"
        return f"what the handler of {coordinates(self.messages[0])} sent"

    def __call__(self, error: KafkaError | None, message: DeliveryReport | None) -> None:
        """Note a refusal."""
        if error is not None and error.code() in RECORD_REFUSED + TOPIC_REFUSED:
            topic = "" if message is None else f"{message.topic()}: "
            self.refusals[id(self)] = self, error.code(), f"{topic}{error.str()}"
