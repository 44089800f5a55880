"""Orders of a shop: what was paid for becomes parcels, stock movements and invoices, each in a database of its own."""

from __future__ import annotations

from labkit.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checkout": "CartItem CartUnknown Carts OrderCheckoutCompleted OrderPurchaseCompleted purchases",
        "downstream": "GUARDS Booking Downstream delivery inventory invoices",
        "locks": "Costs",
        "mail": "MailService mails send_mail",
    },
)
