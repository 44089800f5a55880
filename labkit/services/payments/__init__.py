"""Payments for classes: a job scheduler, Payments Subscriptions, and a payment provider with a ledger of its own."""

from __future__ import annotations

from labkit.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "job_scheduler": "JobScheduler Schedule finished schedule",
        "ledger": "CardDeclined ProviderFailed Renewal charge charged charges due early",
        "provider": "PaymentsProvider",
        "subscriptions": "Polling Requesting costs subscribe",
    },
)
