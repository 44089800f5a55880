"""Retry topics without the group in their names: each group reads, and handles, what failed in the other one."""

import labkit.patterns.own_topics as own_topics
import labkit.patterns.retries as retries

_named = own_topics.own_topic


def _shared(topic, group, what):  # type: ignore[no-untyped-def]
    return f"{topic}_{what}" if what.startswith("retry") else _named(topic, group, what)


retries.own_topic = _shared  # type: ignore[assignment]
