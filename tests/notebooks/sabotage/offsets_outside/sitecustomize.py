"""Views that store the offset at once, the rows half a second later: every Python process of the run imports this."""

import threading

from labkit.patterns.views import View

LATER = 0.5  # seconds: at any moment of a burst there are rows that a crash takes away
_put = View._put


class _RowsOnly:
    def __init__(self, database) -> None:  # type: ignore[no-untyped-def]
        self.database = database

    def execute(self, sql, parameters=()):  # type: ignore[no-untyped-def]
        return None if sql.startswith("update view_offsets") else self.database.execute(sql, parameters)


def _mark_first(self, database, batch, stored):  # type: ignore[no-untyped-def]
    _put(self, database, batch._replace(changes=[], rejected=[]), stored)

    def rows() -> None:
        with self._lock, self._transaction() as later:
            _put(self, _RowsOnly(later), batch, stored)

    threading.Timer(LATER, rows).start()


View._put = _mark_first  # type: ignore[method-assign]
