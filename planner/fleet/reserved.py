"""What is kept for requests that wait: parts of devices, cores and RAM that decisions do not see while it is applied.

A reservation is not a lease: it holds nothing, is written nowhere, and is taken off and put back as requests of other
rank are decided. It stays with a device while that is leased or blocked, and counts once the device comes free.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from .standing import refresh

if TYPE_CHECKING:
    from .fleet import Fleet


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


def reserve(fleet: Fleet, reservation: Reservation) -> None:
    """Hide what is reserved from the decisions that follow."""
    for kept, parts in ((fleet.reserved, reservation.devices), (fleet.reserved_hosts, reservation.hosts)):
        for key, amount, memory in parts:
            found = kept.get(key)
            if found is None:
                found = kept[key] = Reserved()
            found.amount += amount
            found.memory += memory
            found.owners.append(reservation.owner)
    _touch(fleet, reservation)


def unreserve(fleet: Fleet, reservation: Reservation) -> None:
    """Let decisions see it again."""
    for kept, parts in ((fleet.reserved, reservation.devices), (fleet.reserved_hosts, reservation.hosts)):
        for key, amount, memory in parts:
            found = kept[key]
            found.amount -= amount
            found.memory -= memory
            found.owners.remove(reservation.owner)
            if not found.owners:
                del kept[key]
    _touch(fleet, reservation)


def owners_of(reserved: Iterable[Reserved]) -> list[str]:
    """For whom something is kept, each once."""
    return list(dict.fromkeys(owner for kept in reserved for owner in kept.owners))


def _touch(fleet: Fleet, reservation: Reservation) -> None:
    """Only hosts that had something to hide look different: a device that is leased or blocked shows nothing anyway."""
    names = {name for name, amount, memory in reservation.hosts if amount or memory}
    for uuid, _, _ in reservation.devices:
        device = fleet.devices.get(uuid)
        if device is not None and not device.blocked and device.share_left:
            names.add(device.host)
    for name in sorted(names):
        host = fleet.hosts.get(name)
        if host is not None:
            refresh(fleet, host)
