"""A skip that is never taken back and does not look at the offset: every Python process of the run imports this."""

from labkit.patterns.blocked_lanes import Commands, Skip

_command = Commands._command


def _any(self, failed):  # type: ignore[no-untyped-def]
    seen = self.__dict__.setdefault("_sabotaged", {})
    _command(self, failed)
    if isinstance(failed.command, Skip):
        seen[failed.partition] = failed.command
    elif failed.partition in seen:
        failed.put_command(seen[failed.partition])


Commands._command = _any  # type: ignore[method-assign]
