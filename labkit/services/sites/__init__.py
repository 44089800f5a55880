"""The platform's sites: MetaSite owns them, and everybody asks it; a view reader serves a view of its own."""

from __future__ import annotations

from labkit.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "content": "App Page Site site site_id sites updates",
        "metasite": "MetaSite backfill fill stored table_writer",
        "view_reader": "ViewReader",
    },
)
