"""Change data capture that begins with the next change, without the rows that are there."""

from dataclasses import replace

from labkit.runtime import connectors

_capture = connectors.capture


def _changes_only(*args, **named):  # type: ignore[no-untyped-def]
    made = _capture(*args, **named)
    return replace(made, config={**made.config, "snapshot.mode": "no_data"})


connectors.capture = _changes_only
