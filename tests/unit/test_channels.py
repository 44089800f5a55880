"""Channels: only those are known that were made with the secret, and only to who opened them."""

from __future__ import annotations

import string

import pytest

from labkit.kafka.errors import LabkitError
from labkit.services.notifications.channels import Channel, ChannelExpired, Channels, ChannelUnknown

CHANNELS = Channels("a secret of some length")


@pytest.fixture
def channel() -> Channel:
    return CHANNELS.make(600)


def test_who_has_the_secret_knows_a_channel_and_its_owner(channel: Channel) -> None:
    assert Channels("a secret of some length").check(channel.id) == channel.expires
    assert CHANNELS.check_owner(channel.id, channel.key) == channel.expires
    assert set(channel.id) <= set(string.ascii_letters + string.digits + "-_.")  # in a URL and in a key of Kafka
    assert CHANNELS.make(600).id != channel.id


def test_what_was_changed_is_unknown(channel: Channel) -> None:
    for place, sign in enumerate(channel.id):
        for other in "A1-_.é\0":
            if other != sign:
                with pytest.raises(ChannelUnknown):
                    CHANNELS.check(channel.id[:place] + other + channel.id[place + 1 :])


def test_what_is_no_channel_and_no_key(channel: Channel) -> None:
    for text in ("", ".", "..", "x" * 100_000, "\0", "\ud800", "a.1.b", "é" * 58):
        with pytest.raises(ChannelUnknown):
            CHANNELS.check(text)
        with pytest.raises(ChannelUnknown):
            CHANNELS.check_owner(channel.id, text)


def test_of_another_secret_or_another_owner(channel: Channel) -> None:
    with pytest.raises(ChannelUnknown):
        Channels("another secret of some length").check(channel.id)
    with pytest.raises(ChannelUnknown):
        CHANNELS.check_owner(channel.id, CHANNELS.make(600).key)


def test_a_channel_whose_time_is_over() -> None:
    over = CHANNELS.make(0)
    with pytest.raises(ChannelExpired):
        CHANNELS.check_owner(over.id, over.key)


def test_a_secret_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(LabkitError, match="secret"):
        Channels("short")
