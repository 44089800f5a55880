"""The platform's sites: MetaSite, which owns them and which everybody asks, and a reader of a view of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.lazy import lazy_names

if TYPE_CHECKING:
    from labkit.services.sites.content import App as App
    from labkit.services.sites.content import Page as Page
    from labkit.services.sites.content import Site as Site
    from labkit.services.sites.content import changes as changes
    from labkit.services.sites.content import site as site
    from labkit.services.sites.content import site_id as site_id
    from labkit.services.sites.content import sites as sites
    from labkit.services.sites.content import updates as updates
    from labkit.services.sites.metasite import MetaSite as MetaSite
    from labkit.services.sites.metasite import backfill as backfill
    from labkit.services.sites.metasite import fill as fill
    from labkit.services.sites.metasite import stored as stored
    from labkit.services.sites.metasite import table_writer as table_writer
    from labkit.services.sites.view_reader import ViewReader as ViewReader
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "content": "App Page Site changes site site_id sites updates",
            "metasite": "MetaSite backfill fill stored table_writer",
            "view_reader": "ViewReader",
        },
    )
