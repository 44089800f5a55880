"""A skip that is never taken back and does not look at the offset: every Python process of the run imports this."""

from labkit.patterns.blocked_lanes import Commands, Skip

_skip_of = Commands.skip_of


def _any(self, failure):  # type: ignore[no-untyped-def]
    seen = self.__dict__.setdefault("_sabotaged", {})
    found = _skip_of(self, failure)
    if isinstance(found, Skip):
        seen[failure.partition] = found
    return seen.get(failure.partition)


Commands.skip_of = _any  # type: ignore[method-assign]
