"""A view in a PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.kafka.errors import LabkitError
from labkit.patterns.views.changes import Row, ViewUnavailable
from labkit.patterns.views.view import BUSY, View, closed_unless_done


class PostgresView(View):
    """A view in a PostgreSQL, named by its connection string; needs psycopg (`pip install 'labkit[postgres]'`).

    If a writer freezes in the middle of a transaction, the server ends the transaction after 5 s.
    """

    def __init__(
        self,
        dsn: str,
        table: str,
        columns: Mapping[str, str],
        indexes: Sequence[str] = (),
        key: str = "id",
        generation: int = 1,
    ) -> None:
        self.dsn = dsn
        super().__init__(table, columns, indexes, key, generation)

    def _where(self) -> str:
        try:
            from psycopg.conninfo import conninfo_to_dict

            given = conninfo_to_dict(self.dsn)
        except Exception:  # no psycopg, or no connection string: it may hold a password, and is not shown
            return "a PostgreSQL"
        shown = {name: given[name] for name in ("host", "port", "dbname") if name in given}
        return ", ".join(f"{name}={value}" for name, value in shown.items()) or "PostgreSQL"

    def _connect(self) -> _Marked:
        return _Marked(self._dial())

    def _dial(self) -> Any:
        import psycopg

        try:
            connection = psycopg.connect(self.dsn, autocommit=True, connect_timeout=int(BUSY))
            with closed_unless_done(connection):
                connection.execute(f"set idle_in_transaction_session_timeout = {int(BUSY * 1000)}")
        except psycopg.Error as error:
            raise ViewUnavailable(f"view {self.name}: its database does not answer: {error}") from error
        return connection

    def _start(self, database: Any) -> None:
        database.execute("begin")
        # One writer at a time. Two that make the tables at once would both find none. Two with different partitions may
        # have the same key, because partitions were added, and each would find no rows of it to replace.
        who = "labkit views" if self._writer is None else self.name
        database.execute("select pg_advisory_xact_lock(hashtext(?))", (who,))

    def _is_stale(self) -> bool:
        return bool(self._writer.connection.broken)

    def _read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        import psycopg

        with self._lock:
            try:
                if self._reading is None:
                    self._reading = _Marked(self._dial())
                found: list[Row] = self._reading.execute(sql, parameters).fetchall()
                return found
            except psycopg.DataError as error:
                raise LabkitError(f"view {self.table} has no such value: {error}") from error
            except psycopg.Error as error:
                reading, self._reading = self._reading, None
                reading.close()
                raise ViewUnavailable(f"view {self.table} cannot be read: {error}") from error

    def _is_about_names(self, error: Exception) -> bool:
        import psycopg

        # The statements themselves are wrong. A missing right may still be granted.
        refused = isinstance(error, psycopg.ProgrammingError)
        return refused and not isinstance(error, psycopg.errors.InsufficientPrivilege)

    def is_about_rows(self, error: Exception) -> bool:
        import psycopg

        values = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.DatatypeMismatch)
        if isinstance(error, (*values, psycopg.errors.ProgramLimitExceeded, UnicodeError)):
            return True
        return isinstance(error, psycopg.ProgrammingError) and error.sqlstate is None  # psycopg cannot send this value


class _Marked:
    """A connection of psycopg that takes `?` as the mark of a parameter."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        return self.connection.execute(sql.replace("?", "%s"), parameters)

    def close(self) -> None:
        self.connection.close()
