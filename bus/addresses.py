"""Addresses of machines: which reach only this one, and which are in a network."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable


def is_loopback(host: str) -> bool:
    """True if only this machine can reach an address, which may be a name or in brackets."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def network(text: str) -> str:
    """Parse the address or network of a proxy, and return it as a network.

    Raises:
        ValueError: the text is neither.
    """
    try:
        return str(ipaddress.ip_network(text.strip(), strict=False))
    except ValueError:
        raise ValueError(
            f"{text!r} is not the address of a proxy: expected a form such as 10.0.0.5 or 10.0.0.0/8"
        ) from None


def is_in(address: str, networks: Iterable[str]) -> bool:
    """True if an address is in one of some networks."""
    try:
        parsed = ipaddress.ip_address(unmapped(address))
    except ValueError:
        return False
    return any(parsed in ipaddress.ip_network(each, strict=False) for each in networks)


def unmapped(address: str) -> str:
    """Convert an IPv4-mapped address (`::ffff:10.0.0.5`, from a dual-stack socket) to IPv4; others are unchanged."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def machine(address: str) -> str:
    """Key of a client in limits: its IPv4 address, or its /64 network of IPv6, all of which one machine may have."""
    found = unmapped(address)
    try:
        parsed = ipaddress.ip_address(found)
    except ValueError:
        return found
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else found
