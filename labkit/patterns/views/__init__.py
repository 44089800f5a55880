"""Views: tables in a database of the reader's own, which know up to where in the topic they are built.

- The transaction that writes rows reads and stores the view's offset, too. So a writer that wakes from a freeze cannot
  overwrite newer work.
- The topic's UUID is stored with the offset. So a topic made anew under the same name is not taken for the old one.
- The newest version of each key is stored, of deleted keys too. So a record that comes late, or again, takes nothing
  back. A second change with the same version changes nothing either: it looks like the first one, come again.
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
