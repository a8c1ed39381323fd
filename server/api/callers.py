"""Who sends a request, as far as the queue is fair between callers."""

from __future__ import annotations

import ipaddress

from fastapi import Request as HttpRequest

_IPV6_PREFIX = 64  # bits: one subscriber's network, in which a client may choose any address


def caller_of(http: HttpRequest) -> str:
    """The address of the client, of IPv6 its network; empty for a Unix socket.

    Behind a proxy that is listed in FORWARDED_ALLOW_IPS, uvicorn takes it from X-Forwarded-For.
    """
    host = http.client.host if http.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a name that a proxy sent
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))
    return str(address)
