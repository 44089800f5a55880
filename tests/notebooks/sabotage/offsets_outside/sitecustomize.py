"""Views that store the offset first, and the rows a moment later: every Python process of the run imports this."""

import time

from labkit.patterns.consume_and_project import View

_put = View._put


def _mark_first(self, database, batch, stored):  # type: ignore[no-untyped-def]
    _put(self, database, batch._replace(changes=[], aside=[]), stored)
    database.execute("commit")
    time.sleep(0.3)
    self._start(database)
    _put(self, database, batch, stored)


View._put = _mark_first  # type: ignore[method-assign]
