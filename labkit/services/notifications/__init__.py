"""Notifications reach a page through a WebSocket: channels that belong to who opened them, and the service."""

from __future__ import annotations

from labkit.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "channels": "Channel ChannelExpired ChannelUnknown Channels",
        "direct": "DirectNotices DirectNotificationService",
        "pages": "CloseCode",
        "websocket": "NotificationService",
    },
)
