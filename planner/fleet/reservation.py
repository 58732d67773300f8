"""What is kept for requests that wait: parts of devices, cores and RAM.

A reservation is not a lease: it holds nothing, is written nowhere, and is taken off and put back as requests of other
rank are decided. It stays with a device while that is leased or blocked, and counts once the device comes free.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Reservation(NamedTuple):
    """What one request that waits would take.

    Attributes:
        owner: of the request.
        devices: (uuid, billionths of it, bytes of its memory) each.
        hosts: (name, thousandths of cores, bytes of RAM) each.
        busy: leases that must end before the request can be granted there.
    """

    owner: str
    devices: tuple[tuple[str, int, int], ...]
    hosts: tuple[tuple[str, int, int], ...]
    busy: int = 0


class Reserved:
    """What is kept of one device or of one host's cores and RAM.

    Attributes:
        amount: billionths of the device, or thousandths of a core.
        memory: bytes, of the device or of RAM.
        owners: for whom, one entry for each request.
    """

    __slots__ = ("amount", "memory", "owners")

    def __init__(self) -> None:
        self.amount = 0
        self.memory = 0
        self.owners: list[str] = []


def owners_of(reserved: Iterable[Reserved]) -> list[str]:
    """For whom something is kept, each once."""
    return list(dict.fromkeys(owner for kept in reserved for owner in kept.owners))
