"""What change data capture needs in PostgreSQL, and leaves there: a replication slot and a publication, with one name.

PostgreSQL keeps its log until every slot's reader has read it. So a slot that a dead run has left fills the disk.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from labkit.kafka.errors import LabkitError
from labkit.runtime.connectors import Connector, dsn_of, slot_name, with_fix

if TYPE_CHECKING:
    from psycopg import Connection

RELEASE = 3.0  # seconds in which PostgreSQL notices that nobody reads a slot any more
RUN = "[0-9]{12}[0-9a-f]{4}_"  # behind the learner in a slot's name
FIND_TABLE = """select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %s and c.relname = %s and c.relkind in ('r', 'p')"""
PRIMARY_KEY = """select a.attname from pg_index i
join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any(i.indkey)
where i.indrelid = %s and i.indisprimary"""
SLOTS_AND_PUBLICATIONS = """select slot_name, active from pg_replication_slots where database = current_database()
union all select pubname, false from pg_publication"""


def check(connector: Connector) -> None:
    """Raises LabkitError, with the fix, for a table that cannot be captured. The check comes before anything is made:
    PostgreSQL refuses the updates of a table without a key that is in a publication."""
    schema, _, table = connector.config["table.include.list"].partition(r"\.")
    key = connector.config["transforms.key.field"]
    with _connected(connector) as client:
        (wal_level,) = client.execute("show wal_level").fetchall()[0]
        if wal_level != "logical":
            fix = "set wal_level = logical in postgresql.conf, and restart it"
            raise LabkitError(f"PostgreSQL has wal_level {wal_level}, and change data capture needs logical: {fix}")
        found = client.execute(FIND_TABLE, (schema, table)).fetchone()
        if found is None:
            raise LabkitError(f"there is no table {schema}.{table} to capture: make it first, or correct its name")
        primary = [name for (name,) in client.execute(PRIMARY_KEY, found)]
    if not primary:
        raise LabkitError(
            f"table {table} has no primary key, so its changes have no key, and PostgreSQL would refuse updates: "
            f"alter table {table} add primary key (…)"
        )
    if primary != [key]:
        raise LabkitError(
            f"the primary key of table {table} is {', '.join(primary)}, and not {key!r}: the key of a record must name "
            "one row, so capture a table by the one column that is its primary key"
        )


def drop(connector: Connector) -> bool:
    """Drop the slot and the publication of a connector, once nobody reads them. Returns False if that cannot be done
    now, for instance while PostgreSQL is away."""
    import psycopg

    try:
        with _connected(connector) as client:
            _drop(client, connector.config["slot.name"])
    except (psycopg.Error, LabkitError):
        return False
    return True


def how_to_drop(connector: Connector) -> str:
    """The SQL with which a person drops them, and where to run it."""
    name, where = connector.config["slot.name"], f"{_address(connector)}/{connector.config.get('database.dbname', '')}"
    return f"at {where} run: select pg_drop_replication_slot('{name}'); drop publication if exists {name}"


def collect(connector: Connector, learner: str, living: Collection[str]) -> list[str]:
    """Drop what this learner's dead runs have left in the database of a connector; returns the names. `living` are the
    prefixes of runs that live."""
    import psycopg

    mine, kept = re.compile(slot_name(f"labkit.{learner}.") + RUN), tuple(map(slot_name, living))
    gone: list[str] = []
    with suppress(psycopg.Error), _connected(connector) as client:
        found = client.execute(SLOTS_AND_PUBLICATIONS).fetchall()
        read = {name for name, active in found if active}
        for name in sorted({name for name, _ in found} - read):
            if mine.match(name) and not name.startswith(kept):
                _drop(client, name)
                gone.append(name)
    return gone


def _drop(client: Connection[Any], name: str) -> None:
    import psycopg

    until = time.monotonic() + RELEASE
    while True:
        try:
            client.execute(
                "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = %s", (name,)
            )
            break
        except psycopg.errors.ObjectInUse:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)  # there is no event for that
    client.execute(psycopg.sql.SQL("drop publication if exists {}").format(psycopg.sql.Identifier(name)))


def _connected(connector: Connector) -> Connection[Any]:
    """A connection to the connector's PostgreSQL. Raises LabkitError when there is none."""
    import psycopg

    try:
        return psycopg.connect(dsn_of(connector), connect_timeout=5, autocommit=True)
    except psycopg.OperationalError as error:
        said = " ".join(str(error).split())
        text = f"PostgreSQL at {_address(connector)} does not let {connector.name} in: {said}"
        raise LabkitError(with_fix(text)) from error


def _address(connector: Connector) -> str:
    return f"{connector.config.get('database.hostname', '')}:{connector.config['database.port']}"
