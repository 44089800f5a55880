"""A store that calls itself loaded before it has read anything: every Python process of the run imports this."""

from labkit.patterns.key_value_store import follower

follower.behind = lambda positions, ends: 0
