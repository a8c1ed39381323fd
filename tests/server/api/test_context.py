"""The callers that the queue is fair between, and which of them are administrators."""

from __future__ import annotations

import pytest
from fastapi import Request as HttpRequest

from server.api.context import caller_of, check_administrator
from server.middleware.authentication import CALLER
from server.requests.context import Caller
from server.requests.errors import Forbidden


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


@pytest.mark.parametrize("client", [("127.0.0.1", 1), ("127.8.0.1", 1), ("::1", 1), ("::ffff:127.0.0.1", 1), None])
def test_without_keys_this_machine_administers(client: tuple[str, int] | None) -> None:
    check_administrator(HttpRequest({"type": "http", "client": client}))


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1", "10.0.0.1", "a-name"])
def test_without_keys_other_machines_do_not(address: str) -> None:
    with pytest.raises(Forbidden, match="start with --api-keys"):
        check_administrator(HttpRequest({"type": "http", "client": (address, 1)}))


def test_with_keys_only_those_of_administrators_count() -> None:
    here = {"type": "http", "client": ("127.0.0.1", 1)}
    check_administrator(HttpRequest({**here, CALLER: Caller("boss", is_admin=True)}))
    with pytest.raises(Forbidden, match="API key of an administrator"):
        check_administrator(HttpRequest({**here, CALLER: Caller("alice")}))
