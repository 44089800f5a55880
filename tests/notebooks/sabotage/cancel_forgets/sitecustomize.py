"""A step that is asked to cancel says that it was not done, without a look at its memory: every Python process of the
run imports this."""

from labkit.services.orders.processors import OrderStep


def _forgetful(self, order_id):  # type: ignore[no-untyped-def]
    return "cancelled"


assert hasattr(OrderStep, "cancel"), "what is broken here is not there any more"
OrderStep.cancel = _forgetful  # type: ignore[method-assign]
