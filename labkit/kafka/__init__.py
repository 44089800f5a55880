"""Kafka: the cluster, typed topics, the one consumer, and the errors that a program catches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.lazy import lazy_names

if TYPE_CHECKING:
    from labkit.kafka.cluster import Cluster as Cluster
    from labkit.kafka.consumer import Consumer as Consumer
    from labkit.kafka.errors import ClientRefused as ClientRefused
    from labkit.kafka.errors import ClusterUnreachable as ClusterUnreachable
    from labkit.kafka.errors import DeliveryFailed as DeliveryFailed
    from labkit.kafka.errors import LabkitError as LabkitError
    from labkit.kafka.errors import PoisonRecord as PoisonRecord
    from labkit.kafka.errors import RecordsDeleted as RecordsDeleted
    from labkit.kafka.errors import TopicMismatch as TopicMismatch
    from labkit.kafka.errors import TopicMissing as TopicMissing
    from labkit.kafka.errors import Unavailable as Unavailable
    from labkit.kafka.reader import Reader as Reader
    from labkit.kafka.records import Record as Record
    from labkit.kafka.topics import Topic as Topic
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "cluster": "Cluster",
            "consumer": "Consumer",
            "errors": "ClientRefused ClusterUnreachable DeliveryFailed LabkitError PoisonRecord RecordsDeleted"
            " TopicMismatch TopicMissing Unavailable",
            "reader": "Reader",
            "records": "Record",
            "topics": "Topic",
        },
    )
