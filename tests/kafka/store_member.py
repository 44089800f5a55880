"""A store in a process of its own: answers each line of JSON that it gets with one. See `stores.py`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from labkit.kafka.cluster import Cluster
from labkit.kafka.topics import Topic
from labkit.patterns.key_value_store import KeyValueStore

OPTIONS = json.loads(sys.argv[1])


def answer(store: KeyValueStore[Any], order: list[Any]) -> Any:
    match order:
        case ["put", key, value]:
            store.put(key, value, timeout=20)
        case ["delete", key]:
            store.delete(key, timeout=20)
        case ["get", key]:
            return store.get(key)
        case ["wait", key, value]:
            until = time.monotonic() + 20
            while store.get(key) != value and time.monotonic() < until:
                time.sleep(0.002)
            return store.get(key)
        case ["items"]:
            return store.snapshot()
        case ["loads", least]:
            until = time.monotonic() + 20
            while store.loads < least and time.monotonic() < until:
                time.sleep(0.002)
            return store.loads
        case ["race", key, count]:  # many writes of one key, as fast as they are confirmed
            for number in range(count):
                store.put(key, [OPTIONS["name"], number])
    return None


def main() -> None:
    topic = Topic(Cluster(OPTIONS["bootstrap"]), OPTIONS["topic"], OPTIONS["partitions"], Any)
    with KeyValueStore(topic) as store:
        print(json.dumps(len(store)), flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(store, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
