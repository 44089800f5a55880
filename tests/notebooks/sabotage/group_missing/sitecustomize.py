"""Retry topics without the group in their names: each group reads, and handles, what failed in the other one."""

import labkit.patterns.retries as retries
import labkit.patterns.trails as trails

_named = trails.own_topic


def _shared(topic, group, what):  # type: ignore[no-untyped-def]
    return f"{topic}_{what}" if what.startswith("retry") else _named(topic, group, what)


retries.own_topic = _shared  # type: ignore[assignment]
