"""A store that calls itself loaded before it has read anything: every Python process of the run imports this."""

from labkit.patterns import key_value_store

key_value_store._behind = lambda positions, ends: 0
