"""Which `Host` names this server: a page whose name is made to lead here (DNS rebinding) has another."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from server.access.addresses import is_local_name, parse_address

ANY = "*"
ALLOWED = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]", re.IGNORECASE)  # one of --allowed-hosts
_HOST = re.compile(r"(\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(:[0-9]{0,5})?")


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts that are answered: this machine's own names and addresses, and those that were named."""

    names: Collection[str] = ()  # in lower case; *.example.com stands for every name below it
    any_address: bool = False  # an address cannot be made to lead elsewhere, unlike a name

    def allow(self, host: str) -> bool:
        """Whether a request with this `Host` is answered."""
        name = name_in(host)
        return name is not None and self._knows(name.lower().removesuffix("."))

    def _knows(self, name: str) -> bool:
        address = parse_address(name)
        if address is not None and (self.any_address or address.is_loopback):
            return True
        return is_local_name(name) or self._is_named(name)

    def _is_named(self, name: str) -> bool:
        return any(name == one.strip("[]") or (one[:2] == "*." and name.endswith(one[1:])) for one in self.names)


def name_in(host: str) -> str | None:
    """The name or address in a `Host`, without the port and without brackets; None where it is not well-formed."""
    found = _HOST.fullmatch(host)
    return (found["six"] or found["name"]) if found else None


def hosts_to_answer(allowed: Collection[str], *, loopback: bool) -> Hosts | None:
    """The rule for a server that listens on loopback or elsewhere; None: every host is answered.

    Elsewhere its names are not known, so that they are asked for only where they were given.
    """
    if ANY in allowed or not (loopback or allowed):
        return None
    return Hosts(frozenset(name.lower() for name in allowed), any_address=not loopback)
