"""The pages that a service of notifications serves, as browsers name them."""

from __future__ import annotations

import pytest

from labkit.kafka.errors import LabkitError
from labkit.services.notifications.direct import DirectNotificationService
from labkit.services.notifications.pages import origins_of


def test_of_an_address_its_origin_counts() -> None:
    assert origins_of(["https://Lab.Example.org/user/x/lab?a#b"]) == {"https://lab.example.org"}
    assert origins_of(["https://a.example:443", "http://a.example:443/"]) == {
        "https://a.example",
        "http://a.example:443",
    }
    assert origins_of(["http://localhost:8888/lab"]) == {"http://localhost:8888", "http://127.0.0.1:8888"}
    assert origins_of(["http://[::1]:80"]) == {"http://[::1]"}
    assert origins_of([]) == set()


@pytest.mark.parametrize(
    "address", ["", "*", "null", "lab.example.org", "ftp://a.example", "https://*.example.org", "http://a:x", "http://"]
)
def test_what_is_no_address_is_refused_where_the_service_is_made(address: str) -> None:
    with pytest.raises(LabkitError, match="origins"):
        DirectNotificationService(1, "a secret of some length", (address,))
