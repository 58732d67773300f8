"""Reservations for queued requests: parts of devices, cores and RAM.

A reservation is not a lease: it is not stored, and is taken off and put back as requests at other places in the queue
are decided. It stays on a device that is leased or blocked, and takes effect once the device comes free.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Reservation(NamedTuple):
    """Devices, cores and RAM that are reserved for one queued request.

    Attributes:
        owner: of the request.
        devices: (uuid, billionths of it, bytes of its memory) each.
        hosts: (name, thousandths of cores, bytes of RAM) each.
        busy: number of busy devices, and of other leases, that must come free before the request can be granted there.
    """

    owner: str
    devices: tuple[tuple[str, int, int], ...]
    hosts: tuple[tuple[str, int, int], ...]
    busy: int = 0


class Reserved:
    """Sum of the reservations on one device, or on one host's cores and RAM.

    Attributes:
        amount: billionths of the device, or thousandths of a core.
        memory: bytes, of the device or of RAM.
        owners: of the requests, one entry for each.
    """

    __slots__ = ("amount", "memory", "owners")

    def __init__(self) -> None:
        self.amount = 0
        self.memory = 0
        self.owners: list[str] = []


def owners_of(reserved: Iterable[Reserved]) -> list[str]:
    """Owners of reservations, each once."""
    return list(dict.fromkeys(owner for kept in reserved for owner in kept.owners))
