"""Countries and their time zones: Business Manager owns countries, Bookings makes zones of them, Events reads zones."""

from __future__ import annotations

from labkit.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "bookings": "Bookings",
        "business_manager": "BusinessManager",
        "countries": "Country Zone iso_countries zone_at zones_by_country",
        "events": "Events",
    },
)
