"""A lab whose Kafka Connect is away, or has a connector that failed, has not come to rest: nothing is judged."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import psycopg
from processes import wait_until

from labkit import Lab, capture
from labkit.kafka.effects import Sent
from labkit.kafka.errors import LabkitError
from labkit.runtime.connect import Connection

BAD = {
    "transforms": "key,route,bad",
    "transforms.bad.type": "org.apache.kafka.connect.transforms.ExtractField$Value",
    "transforms.bad.field": "nope",
}


def test_what_kafka_connect_has_not_brought_is_not_judged(connection: Connection, dsn: str) -> None:
    sent = [Sent("1", "1", 0)]
    with psycopg.connect(dsn, autocommit=True) as table, Lab("settling-connect") as lab:
        table.execute("create table things (id int primary key)")
        table.execute("insert into things values (1)")
        topic, connect = lab.topic("rows", 1), lab.connect()
        connector = capture(dsn, "things", topic)
        with suppress(LabkitError):  # it may be said to run before its first record
            connect.start(replace(connector, config={**connector.config, **BAD}))
        wait_until(lambda: connect.status().loc[connector.name, "state"] == "failed", 30, "its end")
        assert str(lab.verdict(sent, topic).reason).startswith(f"connector {connector.name} failed: IllegalArgument")
        connect.stop(connector.name)
        assert lab.settle()
        connect.kill()
        assert lab.verdict(sent, topic).reason == "Kafka Connect is down: recover it first"
