"""Orders of a shop.

An order that is paid becomes parcels, stock movements and invoices, each in a database of its own (`checkout`,
`downstream`). An order that is placed goes through its steps in one of two topologies (`processors`, `event_chain`).
"""

from __future__ import annotations

from labkit.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checkout": "CartItem CartUnknown Carts OrderCheckoutCompleted OrderPurchaseCompleted purchases",
        "downstream": "GUARDS Booking Downstream delivery inventory invoices",
        "event_chain": "OrderEvent event_processor",
        "locks": "Costs",
        "mail": "MailService mails send_mail",
        "messages": "Journey Whereabouts journeys topics_of where_is",
        "processors": "Done OrderPlaced OrderStep outcomes placed_orders steps",
    },
)
