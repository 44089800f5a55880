"""Orders of a shop: what was paid for becomes parcels, stock movements and invoices, each in a database of its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.services.orders.checkout import CartItem as CartItem
    from labkit.services.orders.checkout import Carts as Carts
    from labkit.services.orders.checkout import CartUnknown as CartUnknown
    from labkit.services.orders.checkout import OrderCheckoutCompleted as OrderCheckoutCompleted
    from labkit.services.orders.checkout import OrderPurchaseCompleted as OrderPurchaseCompleted
    from labkit.services.orders.checkout import purchases as purchases
    from labkit.services.orders.downstream import GUARDS as GUARDS
    from labkit.services.orders.downstream import Booking as Booking
    from labkit.services.orders.downstream import Downstream as Downstream
    from labkit.services.orders.downstream import delivery as delivery
    from labkit.services.orders.downstream import inventory as inventory
    from labkit.services.orders.downstream import invoices as invoices
    from labkit.services.orders.locks import Costs as Costs
    from labkit.services.orders.mail import MailService as MailService
    from labkit.services.orders.mail import mails as mails
    from labkit.services.orders.mail import send_mail as send_mail

# Imported when asked for: what only decodes orders waits for no database and no web server.
_HOME = {
    "checkout": "CartItem CartUnknown Carts OrderCheckoutCompleted OrderPurchaseCompleted purchases",
    "downstream": "GUARDS Booking Downstream delivery inventory invoices",
    "locks": "Costs",
    "mail": "MailService mails send_mail",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = [*_MODULE]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
