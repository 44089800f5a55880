"""Payments for classes: a job scheduler, Payments Subscriptions, and a payment provider with a ledger of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.lazy import lazy_names

if TYPE_CHECKING:
    from labkit.services.payments.job_scheduler import JobScheduler as JobScheduler
    from labkit.services.payments.job_scheduler import Schedule as Schedule
    from labkit.services.payments.job_scheduler import finished as finished
    from labkit.services.payments.job_scheduler import schedule as schedule
    from labkit.services.payments.ledger import CardDeclined as CardDeclined
    from labkit.services.payments.ledger import ProviderFailed as ProviderFailed
    from labkit.services.payments.ledger import Renewal as Renewal
    from labkit.services.payments.ledger import charge as charge
    from labkit.services.payments.ledger import charged as charged
    from labkit.services.payments.ledger import charges as charges
    from labkit.services.payments.ledger import due as due
    from labkit.services.payments.ledger import early as early
    from labkit.services.payments.provider import PaymentsProvider as PaymentsProvider
    from labkit.services.payments.subscriptions import Polling as Polling
    from labkit.services.payments.subscriptions import Requesting as Requesting
    from labkit.services.payments.subscriptions import costs as costs
    from labkit.services.payments.subscriptions import subscribe as subscribe
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "job_scheduler": "JobScheduler Schedule finished schedule",
            "ledger": "CardDeclined ProviderFailed Renewal charge charged charges due early",
            "provider": "PaymentsProvider",
            "subscriptions": "Polling Requesting costs subscribe",
        },
    )
