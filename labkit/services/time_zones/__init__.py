"""Countries and their time zones: Business Manager owns the ones, Bookings makes the others of them, Events reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.lazy import lazy_names

if TYPE_CHECKING:
    from labkit.services.time_zones.bookings import Bookings as Bookings
    from labkit.services.time_zones.business_manager import BusinessManager as BusinessManager
    from labkit.services.time_zones.countries import Country as Country
    from labkit.services.time_zones.countries import Zone as Zone
    from labkit.services.time_zones.countries import iso_countries as iso_countries
    from labkit.services.time_zones.countries import zone_at as zone_at
    from labkit.services.time_zones.countries import zones_by_country as zones_by_country
    from labkit.services.time_zones.events import Events as Events
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "bookings": "Bookings",
            "business_manager": "BusinessManager",
            "countries": "Country Zone iso_countries zone_at zones_by_country",
            "events": "Events",
        },
    )
