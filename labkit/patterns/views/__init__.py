"""Views: tables in a database of the reader's own that say of themselves which records they are made of.

- The offset a view was built up to is read, and stored, in the transaction of the rows: of what a writer that was
  frozen has in hand, nothing is written that another one has written meanwhile.
- Beside it stands the topic's UUID: a topic made anew under its name is not taken for the old one.
- Of each key the newest version is kept, of deleted keys too: what comes late, or again, takes nothing back. Nor does a
  second change of the same version, which cannot be told from the first one that comes again.
"""

from __future__ import annotations

from labkit.patterns.views.changes import LARGEST_BATCH as LARGEST_BATCH
from labkit.patterns.views.changes import Batch as Batch
from labkit.patterns.views.changes import Change as Change
from labkit.patterns.views.changes import Checkpoint as Checkpoint
from labkit.patterns.views.changes import Database as Database
from labkit.patterns.views.changes import Row as Row
from labkit.patterns.views.changes import ViewOutdated as ViewOutdated
from labkit.patterns.views.changes import ViewTakenBack as ViewTakenBack
from labkit.patterns.views.changes import ViewUnavailable as ViewUnavailable
from labkit.patterns.views.changes import insert as insert
from labkit.patterns.views.changes import newest as newest
from labkit.patterns.views.postgres import PostgresView as PostgresView
from labkit.patterns.views.sqlite import SqliteView as SqliteView
from labkit.patterns.views.view import View as View
