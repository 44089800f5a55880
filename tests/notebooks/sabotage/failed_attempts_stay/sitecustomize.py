"""What a batch changed before one of its records failed stays, and is changed again by the next attempt: every Python
process of the run imports this."""

from labkit.kafka.consumer.state import StateHandler

_called = StateHandler._called


def _one_by_one(self, state, messages):  # type: ignore[no-untyped-def]
    changes = {}
    for message in messages:
        one = _called(self, state, [message])
        state.apply(one)
        changes.update(one)
    return changes


StateHandler._called = _one_by_one  # type: ignore[method-assign]
