"""A view: its tables, the transaction that writes to them, its generations, and the ways to read it."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any, ClassVar, Self, cast

from labkit.closing import Closing
from labkit.kafka.errors import LabkitError
from labkit.patterns.views.changes import (
    Batch,
    Change,
    Checkpoint,
    Database,
    Row,
    ViewOutdated,
    ViewTakenBack,
    ViewUnavailable,
    insert,
    newest,
    placeholders,
)

NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
BUSY = 5.0  # seconds to wait for another writer of the database

_SHARED = (
    "create table if not exists view_definitions (view text primary key, name text, definition text, shown int)",
    """create table if not exists view_offsets (view text, topic text, partition int, topic_id text,
    next_offset bigint, time double precision, primary key (view, topic, partition))""",
    """create table if not exists view_rejected (view text, topic text, partition int, record bigint, reason text,
    primary key (view, topic, partition, record))""",
)


# How far a view is behind the generation that readers see, unless the topic was made anew since.
_BEHIND = """select o.topic, o.partition, o.next_offset - coalesce(n.next_offset, 0) from view_offsets o
join view_definitions d on d.view = o.view
left join view_offsets n on n.view = ? and n.topic = o.topic and n.partition = o.partition
where d.name = ? and d.shown = 1 and o.next_offset > coalesce(n.next_offset, 0) and not exists
(select 1 from view_offsets a where a.view = ? and a.topic = o.topic and a.topic_id <> o.topic_id) order by 1, 2"""


class View(Closing, ABC):
    """A table made of records, in a database of the reader's own. Use SqliteView or PostgresView.

    `table` has a column `key` and `columns` (name → SQL type). `indexes` are the columns by which keys are looked up.
    A subclass that fills its table in another way than row by row overrides `write`, and nothing else. If each record
    adds rows and replaces none, it sets `adds_up`.

    To build a view anew, project into `view.next_generation()` with a group of its own, then `promote` that.
    """

    adds_up: ClassVar[bool] = False
    """Whether every record adds its rows to those of its key, whatever its version: parcels, bookings. Only the offset
    keeps a record from counting twice, so two records with the same content count as two."""

    _of_keys = ""  # SQL behind the columns of the table of keys

    def __init__(
        self, table: str, columns: Mapping[str, str], indexes: Sequence[str] = (), key: str = "id", generation: int = 1
    ) -> None:
        for name in (table, key, *columns, *indexes):
            if not NAME.fullmatch(name):
                raise LabkitError(f"{name!r} cannot be a name in a view: use a–z, 0–9 and _, at most 41 of them")
        if unknown := set(indexes) - set(columns):
            raise LabkitError(f"view {table} has no column {', '.join(sorted(unknown))} to look up by")
        if not columns or key in columns:
            raise LabkitError(f"view {table} needs columns beside its key {key!r}, with other names; key= renames it")
        self.table, self.columns, self.indexes, self.key = table, dict(columns), tuple(indexes), key
        self.generation = generation
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        """Begin as in a new process: without a connection, and without having read anything."""
        self._lock = threading.RLock()
        self._writer: Any = None
        self._reading: Any = None
        self._topic = self._topic_id = ""
        self._reached: dict[int, int] = {}  # by partition: the offset that this writer last read or stored
        columns = ", ".join(f"t.{name}" for name in self.columns)
        sql = f"select t.{self.key}, {columns} from {self.table}_keys k left join {self.table} t "
        self._rows_of_key = f"{sql}on t.{self.key} = k.{self.key} where k.{self.key} = ? and k.deleted = 0"

    @property
    def name(self) -> str:
        """The name of this generation's table."""
        return f"{self.table}_{self.generation}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name} in {self._where()})"

    # -- what a subclass may override

    def write(self, database: Database, changes: Sequence[Change]) -> None:
        """Put these changes, one for each key, into the table `name`, in the transaction that moves the offset."""
        if before := [change.key for change in changes if change.replaces]:
            database.execute(f"delete from {self.name} where {self.key} in ({placeholders(before)})", before)
        insert(database, self.name, [(change.key, *row) for change in changes for row in change.rows or ()])

    # -- writing

    def begin(self, topic: str, topic_id: str, partitions: Iterable[int]) -> dict[int, int]:
        """The offsets at which to read on in these partitions, for those that the view has. Makes the tables.

        Raises ViewOutdated when the view was built from another topic, or for other columns; ViewUnavailable.
        """
        with self._lock:
            if self._topic not in ("", topic):
                raise LabkitError(
                    f"view {self.name} is made of topic {self._topic}, not of {topic}: make a view for each topic"
                )
            self._topic, self._topic_id = topic, topic_id
            try:
                with self._transaction() as database:
                    found = self._stored(database)
            except LabkitError:
                raise
            except Exception as error:  # the connection broke meanwhile: the next attempt makes a new one
                raise ViewUnavailable(f"the offsets of view {self.name} cannot be read: {error}") from error
            for partition in partitions:  # for the others, what this writer stored holds
                self._reached[partition] = found.get(partition, 0)
            return found

    def reached(self, partition: int) -> int:
        """The offset up to which the view had everything when this writer last looked."""
        with self._lock:
            return self._reached.get(partition, 0)

    def apply(self, batch: Batch) -> None:
        """Write a batch, in one transaction of these steps:

        1. claim:  read the stored offset, and lock it; records before it are written already;
        2. select: for each key the last change, if it is newer than the stored one; or all, in a view that adds up;
        3. write:  the rows, and the versions, those of deleted keys too;
        4. reject: write down which records could not be projected;
        5. move:   store the new offset.

        Raises ViewTakenBack when the view has lost records before the batch; ViewOutdated, ViewUnavailable.
        """
        with self._lock:
            with self._transaction() as database:
                stored = self._claim(database, batch)
                if stored < batch.next_offset:
                    self._put(database, batch, stored)
            self._reached[batch.partition] = max(stored, batch.next_offset)

    def _claim(self, database: Database, batch: Batch) -> int:
        partition = (self.name, self._topic, batch.partition)
        absent = "insert into view_offsets values (?, ?, ?, ?, 0, 0) on conflict do nothing"
        database.execute(absent, (*partition, self._topic_id))
        sql = "select next_offset, topic_id from view_offsets where view = ? and topic = ? and partition = ?"
        stored, topic_id = database.execute(sql, partition).fetchone()
        self._check_topic(topic_id)
        if stored < batch.after:
            raise ViewTakenBack(
                f"view {self.name} had {self._topic}/{batch.partition} up to offset {batch.after:,}, and now only up "
                f"to {stored:,}: start the writer again, and it reads on from there"
            )
        return cast(int, stored)

    def _put(self, database: Database, batch: Batch, stored: int) -> None:
        fresh = [change for offset, change in batch.changes if offset >= stored]
        if self.adds_up:
            changes = [change._replace(replaces=False) for change in fresh if change.rows is not None]
        else:
            changes = newest(fresh, self._versions(database, fresh))
        if changes:
            self.write(database, changes)
            keys = {change.key: (change.key, change.version or 0, int(change.rows is None)) for change in changes}
            newer = f"({self.key}) do update set version = excluded.version, deleted = excluded.deleted"
            insert(database, f"{self.name}_keys", list(keys.values()), newer)
        partition = (self.name, self._topic, batch.partition)
        rejected = [(*partition, *one) for one in batch.rejected if one[0] >= stored]
        insert(database, "view_rejected", rejected, "do nothing")
        moved = "update view_offsets set next_offset = ?, time = ? where view = ? and topic = ? and partition = ?"
        database.execute(moved, (batch.next_offset, batch.time, *partition))

    def _versions(self, database: Database, changes: Sequence[Change]) -> dict[str, int]:
        keys = list({change.key for change in changes})
        if not keys:
            return {}
        sql = f"select {self.key}, version from {self.name}_keys where {self.key} in ({placeholders(keys)})"
        return dict(database.execute(sql, keys).fetchall())

    def _stored(self, database: Database) -> dict[int, int]:
        sql = "select partition, next_offset, topic_id from view_offsets where view = ? and topic = ?"
        rows = database.execute(sql, (self.name, self._topic)).fetchall()
        for _, _, topic_id in rows:
            self._check_topic(topic_id)
        return {partition: offset for partition, offset, _ in rows}

    def _check_topic(self, topic_id: str) -> None:
        if topic_id != self._topic_id:
            raise ViewOutdated(
                f"topic {self._topic} was deleted and made anew since view {self.name} was built: build the view anew "
                f"(generation={self.generation + 1})"
            )

    # -- generations

    def next_generation(self) -> Self:
        """The same view, one generation later: a group of its own builds it, and readers see it once it is promoted."""
        made = copy(self)
        made.generation += 1
        return made

    def promote(self, force: bool = False) -> None:
        """Let readers see this generation from now on. A read sees the one before or this one, and never fails.

        Raises LabkitError while this one is behind the generation that readers see, unless `force`.
        """
        with self._lock, self._transaction() as database:
            behind = database.execute(_BEHIND, (self.name, self.table, self.name)).fetchall()
            if behind and not force:
                lacks = ", ".join(f"{topic}/{partition} by {records:,}" for topic, partition, records in behind)
                raise LabkitError(
                    f"view {self.name} is behind the one that readers see: {lacks} records; wait for it. If the topic "
                    "has lost these records, promote(force=True)"
                )
            self._show(database)

    def _show(self, database: Database) -> None:
        for suffix, source in self._sources.items():
            database.execute(f"drop view if exists {self.table}{suffix}")
            database.execute(f"create view {self.table}{suffix} as select * from {source}")
        database.execute("update view_definitions set shown = 0 where name = ?", (self.table,))
        database.execute("update view_definitions set shown = 1 where view = ?", (self.name,))

    @property
    def _sources(self) -> dict[str, str]:
        """What readers select from, by the ends of the names; in the order of `rows`, or PostgreSQL sees a deadlock."""
        mine = f"view_offsets where view = '{self.name}'"
        return {"_keys": f"{self.name}_keys", "": self.name, "_offsets": mine}

    def _shown(self, database: Database) -> str | None:
        found = database.execute("select view from view_definitions where name = ? and shown = 1", (self.table,))
        row = found.fetchone()
        return row and cast(str, row[0])

    def _make(self, database: Database) -> None:
        """Make the tables that do not exist. Raises ViewOutdated when they exist in another form, LabkitError when the
        database does not take these names and types, and never will.
        """
        try:
            self._make_tables(database)
        except LabkitError:
            raise
        except Exception as error:
            if "already exists" in str(error):
                raise ViewOutdated(f"{error}, and is no view of labkit: use another name than {self.table}") from error
            if self._is_about_names(error):
                columns = ", ".join(f"{name} {kind}" for name, kind in self.columns.items())
                raise LabkitError(
                    f"view {self.table} cannot be made ({error}): the database does not know one of these names or "
                    f"types, or it is a word of SQL: {self.table}, {self.key}, {columns}"
                ) from error
            raise

    def _make_tables(self, database: Database) -> None:
        wanted = f"{self.key}; " + ", ".join(f"{name} {kind}" for name, kind in self.columns.items())
        wanted += f"; by {', '.join(self.indexes)}"
        for sql in _SHARED:
            database.execute(sql)
        there = database.execute("select definition from view_definitions where view = ?", (self.name,)).fetchone()
        if there is None:
            self._create(database)
            row = (self.name, self.table, wanted, 0)
            database.execute("insert into view_definitions values (?, ?, ?, ?)", row)
            if self._shown(database) is None:
                self._show(database)
        elif there[0] != wanted:
            raise ViewOutdated(
                f"view {self.name} has the columns [{there[0]}], not [{wanted}]: build it anew "
                f"(generation={self.generation + 1})"
            )

    def _create(self, database: Database) -> None:
        columns = "".join(f", {name} {kind}" for name, kind in self.columns.items())
        database.execute(f"create table {self.name} ({self.key} text not null{columns})")
        database.execute(f"create index {self.name}_of on {self.name} ({self.key})")
        for column in self.indexes:
            database.execute(f"create index {self.name}_{column} on {self.name} ({column}, {self.key})")
        keys = f"({self.key} text primary key, version bigint not null, deleted int not null)"
        database.execute(f"create table {self.name}_keys {keys}{self._of_keys}")

    # -- reading

    def rows(self, key: str) -> list[Row] | None:
        """The rows of a key, without the key itself; None for a key that is unknown or deleted."""
        found = self._read(self._rows_of_key, (key,))
        if not found:
            return None
        return [row[1:] for row in found] if found[0][0] is not None else []

    def keys(self, column: str, value: Any, after: str = "", limit: int = 100) -> list[str]:
        """Up to `limit` keys behind `after` that have a row with this value, in order: the reverse lookup."""
        if column not in self.indexes:
            raise LabkitError(f"view {self.table} has no index by {column!r}; it has: {', '.join(self.indexes)}")
        sql = f"select distinct {self.key} from {self.table} where {column} = ? and {self.key} > ? "
        return [row[0] for row in self._read(f"{sql}order by {self.key} limit ?", (value, after, limit))]

    def content(self) -> dict[str, list[Row]]:
        """All rows, by key: for verdicts, not for a large table."""
        found: dict[str, list[Row]] = {}
        columns = ", ".join(f"t.{name}" for name in self.columns)
        sql = f"select k.{self.key}, t.{self.key}, {columns} from {self.table}_keys k left join {self.table} t "
        for key, has_rows, *row in self._read(f"{sql}on t.{self.key} = k.{self.key} where k.deleted = 0"):
            found.setdefault(key, []).extend([tuple(row)] if has_rows is not None else [])
        return {key: sorted(rows) for key, rows in found.items()}

    def count(self) -> int:
        """How many rows it has."""
        return int(self._read(f"select count(*) from {self.table}")[0][0])

    def checkpoints(self, topic: str) -> dict[int, Checkpoint]:
        """How far the view has got, by partition."""
        sql = f"select partition, next_offset, time, topic_id from {self.table}_offsets where topic = ?"
        return {partition: Checkpoint(*one) for partition, *one in self._read(sql, (topic,))}

    def rejected(self) -> list[tuple[str, int, int, str]]:
        """The records of this generation that could not be projected: topic, partition, offset, reason."""
        sql = "select topic, partition, record, reason from view_rejected where view = ? order by 1, 2, 3"
        return cast(list[tuple[str, int, int, str]], self._read(sql, (self.name,)))

    def close(self) -> None:
        """Close the connections. The view can be used again."""
        with self._lock:
            self._disconnect()

    # -- connections

    @contextmanager
    def _transaction(self) -> Iterator[Database]:
        database = self._writable()
        try:
            self._start(database)
            yield database
            database.execute("commit")
        except BaseException:
            try:
                database.execute("rollback")
            except Exception:
                self._disconnect()
            raise

    def _writable(self) -> Any:
        if self._writer is not None and self._is_stale():
            self._disconnect()
        if self._writer is None:
            writer = self._connect()
            with closed_unless_done(writer):
                self._start(writer)
                self._make(writer)
                writer.execute("commit")
            self._writer = writer
        return self._writer

    def _disconnect(self) -> None:
        connections, self._writer, self._reading = (self._writer, self._reading), None, None
        for connection in connections:
            if connection is not None:
                with suppress(Exception):
                    connection.close()

    @abstractmethod
    def _where(self) -> str:
        """Where the database is, in words that may be shown to anybody."""

    @abstractmethod
    def _connect(self) -> Any:
        """A connection to write with."""

    @abstractmethod
    def _start(self, database: Any) -> None:
        """Begin a transaction in which nobody else writes the view or makes tables."""

    @abstractmethod
    def _is_stale(self) -> bool:
        """Whether the database that the connections lead to is gone."""

    @abstractmethod
    def _read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """The rows of a query. Raises ViewUnavailable, and LabkitError for a parameter that no such column can hold."""

    @abstractmethod
    def _is_about_names(self, error: Exception) -> bool:
        """Whether the error says that the database does not take the view's names or types."""

    @abstractmethod
    def is_about_rows(self, error: Exception) -> bool:
        """Whether the error says that the database refuses these rows, and always will."""


@contextmanager
def closed_unless_done(connection: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(Exception):
            connection.close()
        raise
