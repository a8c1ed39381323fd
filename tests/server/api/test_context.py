"""The callers that the queue is fair between."""

from __future__ import annotations

import pytest
from fastapi import Request as HttpRequest

from server.api.context import caller_of


@pytest.mark.parametrize(
    ("client", "caller"),
    [
        (("192.0.2.7", 1234), "192.0.2.7"),
        (("192.0.2.7", 0), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::1", 1), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 1), "fe80::/64"),
        (("a-name", 1), "a-name"),
        (None, ""),
    ],
)
def test_a_caller_is_an_address_or_a_network_of_ipv6(client: tuple[str, int] | None, caller: str) -> None:
    assert caller_of(HttpRequest({"type": "http", "client": client})).name == caller
