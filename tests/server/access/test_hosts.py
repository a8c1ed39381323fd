"""Which Host names this server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.hosts import Hosts, hosts_to_answer

HERE = ("localhost", "localhost:8000", "LOCALHOST", "localhost.", "app.localhost:80", "127.0.0.1", "127.0.0.1:8000")
HERE_SIX = ("127.9.9.9", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]:80")
ELSEWHERE = (
    "",
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "notlocalhost",
    "127.0.0.1.evil.example",
    "127.1",
    "0x7f000001",
    "2130706433",
    "localhost@evil.example",
    "localhost/",
    "localhost:80:80",
    "localhost, evil.example",
    "local host",
    "[::1",
    "::1",
    "[::2]",
    "[::1%25eth0]",
    "localhost:eighty",
)


@pytest.mark.parametrize("host", [*HERE, *HERE_SIX])
def test_this_machine_is_answered(host: str) -> None:
    assert Hosts().allow(host)


@pytest.mark.parametrize("host", [*ELSEWHERE, "192.168.1.5", "0.0.0.0:8000"])
def test_others_are_not(host: str) -> None:
    assert not Hosts().allow(host)


@pytest.mark.parametrize(
    ("names", "host", "allowed"),
    [
        ({"images.example.com"}, "images.example.com", True),
        ({"images.example.com"}, "Images.Example.Com.:443", True),
        ({"images.example.com"}, "evil.images.example.com", False),
        ({"images.example.com"}, "example.com", False),
        ({"*.example.com"}, "images.example.com", True),
        ({"*.example.com"}, "a.b.example.com:1", True),
        ({"*.example.com"}, "example.com", False),
        ({"*.example.com"}, "evilexample.com", False),
        ({"192.168.1.5"}, "192.168.1.5:8000", True),
        ({"[fd00::5]"}, "[fd00::5]:8000", True),
        ({"images.example.com"}, "localhost", True),
        ({"images.example.com"}, "192.168.1.5", False),
    ],
)
def test_named_hosts_are_answered_too(names: set[str], host: str, allowed: bool) -> None:
    assert Hosts(names).allow(host) == allowed


def test_the_rule_follows_from_where_the_server_listens() -> None:
    assert hosts_to_answer((), loopback=True) == Hosts(frozenset())
    assert hosts_to_answer((), loopback=False) is None
    assert hosts_to_answer(("*",), loopback=True) is None
    elsewhere = hosts_to_answer(("Images.example.com",), loopback=False)
    assert elsewhere is not None
    assert elsewhere.allow("images.example.com")
    assert elsewhere.allow("10.0.0.7:8000"), "probes ask by address, which nobody can make lead elsewhere"
    assert not elsewhere.allow("evil.example")


@given(st.text(st.characters(max_codepoint=255), max_size=40))
def test_any_text_is_decided(host: str) -> None:
    if Hosts().allow(host):
        assert "localhost" in host.lower() or "127." in host or "1]" in host
