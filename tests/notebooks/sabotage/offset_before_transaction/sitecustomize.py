"""Exactly once with its offsets committed outside the transaction: every Python process of the run imports this."""

from labkit.kafka.consumer.transactional_client import TransactionalClient
from labkit.kafka.consumer.transactions import ExactlyOnce

_commit = ExactlyOnce._commit


def _by_itself(self) -> None:  # type: ignore[no-untyped-def]
    def send_offsets(offsets, metadata, wait) -> None:  # type: ignore[no-untyped-def]
        self.client.commit(offsets=offsets, asynchronous=False)

    self.sender.send_offsets = send_offsets
    _commit(self)


assert hasattr(TransactionalClient, "send_offsets"), "what is broken here is not there any more"
ExactlyOnce._commit = _by_itself  # type: ignore[method-assign]
