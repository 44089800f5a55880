"""A view in a file."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from labkit.patterns.views.changes import Row, ViewUnavailable
from labkit.patterns.views.view import BUSY, View, closed_unless_done

LOOK = 0.05  # seconds between two looks whether readers still have the right file: each is a call into the system


class SqliteView(View):
    """A view in a file, in WAL mode: any number of processes read it while one writes.

    If a power loss takes a transaction back, it takes the offset back with it. A writer that freezes in the middle of a
    transaction makes other writers wait until it goes on or ends; readers do not notice.
    """

    _of_keys = " without rowid"  # one tree instead of two
    _look_again = 0.0  # when, by the monotonic clock

    def __init__(
        self,
        path: Path | str,
        table: str,
        columns: Mapping[str, str],
        indexes: Sequence[str] = (),
        key: str = "id",
        generation: int = 1,
    ) -> None:
        self.path = str(Path(path).absolute())
        super().__init__(table, columns, indexes, key, generation)
        with closing(sqlite3.connect(":memory:")) as trial:  # an error shows here, and does not end a pod
            self._make(trial)

    def _where(self) -> str:
        return self.path

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = self._open("rwc")
            with closed_unless_done(connection):
                connection.execute("pragma journal_mode = wal")
                connection.execute("pragma synchronous = normal")
        except sqlite3.Error as error:
            raise ViewUnavailable(f"view {self.name} cannot be written: {self.path}: {error}") from error
        return connection

    def _open(self, mode: str) -> sqlite3.Connection:
        # Our lock keeps threads apart. Mode "rw" makes no file: a reader must not make an empty view.
        uri = f"{Path(self.path).as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY, isolation_level=None, check_same_thread=False)
        self._file = self._identity()
        return connection

    def _start(self, database: Any) -> None:
        try:
            database.execute("begin immediate")
        except sqlite3.OperationalError as error:
            raise ViewUnavailable(f"view {self.name} cannot be written: {self.path}: {error}") from error

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _is_stale(self) -> bool:
        """Whether the file was deleted: nobody else would see what we write to it."""
        return self._file is None or self._file != self._identity()

    def _read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        with self._lock:
            try:
                if self._reading is not None and time.monotonic() >= self._look_again:
                    self._look_again = time.monotonic() + LOOK
                    if self._is_stale():
                        self._disconnect()
                if self._reading is None:
                    self._reading = self._open("rw")
                found: list[Row] = self._reading.execute(sql, parameters).fetchall()
                return found
            except sqlite3.Error as error:
                raise ViewUnavailable(f"view {self.table} cannot be read: {self.path}: {error}") from error

    def _is_about_names(self, error: Exception) -> bool:
        said = str(error)
        words = ("syntax error", "reserved for internal use", "to delete table", "to delete view")
        return isinstance(error, sqlite3.OperationalError) and any(word in said for word in words)

    def is_about_rows(self, error: Exception) -> bool:
        kinds = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError)
        return isinstance(error, (*kinds, OverflowError, UnicodeError))
