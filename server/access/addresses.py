"""Network addresses: whom they stand for, and which are this machine's own."""

from __future__ import annotations

import ipaddress

_IPV6_PREFIX = 64  # bits: one subscriber's network, in which a client may choose any address


def network_of(host: str) -> str:
    """The address of a client, and of IPv6 its network; `host` itself where it is no address."""
    address = parse_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))
    return host if address is None else str(address)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address or name `host`."""
    address = parse_address(host)
    return is_local_name(host) if address is None else address.is_loopback


def is_local_name(name: str) -> bool:
    """Whether `name` always leads to this machine itself (RFC 6761)."""
    return name.lower().removesuffix(".").rpartition(".")[2] == "localhost"


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `host` is, without a zone; IPv4 where it is IPv6's form of that; None for a name."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
