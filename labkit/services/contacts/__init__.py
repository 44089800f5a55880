"""Contacts: a CSV becomes jobs, importers share the jobs, and their reports say when the whole import is done."""

from __future__ import annotations

from labkit.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "baselines": "CounterService InMemory SharedRow",
        "content": "Contact contacts write_csv write_google_csv",
        "exports": "CsvRefused",
        "formatting": "Formatting FormattingFailed FormattingService",
        "importer": "Importer bad_rows failed_jobs stored",
        "jobs": "ContactsJob Job send_jobs split",
        "newsletter": "Newsletter subscribers",
        "notices": "Counted ImportNotice Notices channel_of request_of",
        "polling": "DownstreamService PolledFront PollingBrowsers ReportsDownstream",
        "reports": "JobFinished Progress Reports progress",
        "screens": "on_screens",
        "state": "ImportState",
        "upload": "ContactsJobs",
    },
)
