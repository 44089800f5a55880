"""Pattern 3: a key-value store in memory, kept in a compacted topic."""

from labkit.patterns.key_value_store.follower import StoreClosed as StoreClosed
from labkit.patterns.key_value_store.follower import StoreNotReady as StoreNotReady
from labkit.patterns.key_value_store.store import KeyValueStore as KeyValueStore
