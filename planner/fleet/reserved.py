"""Applies reservations (`reservation.py`) to the fleet, which hides them from decisions, and removes them."""

from __future__ import annotations

from .blocking import refresh
from .known import Fleet
from .reservation import Reservation, Reserved


def reserve(fleet: Fleet, reservation: Reservation) -> None:
    """Apply a reservation: later decisions do not see what it reserves."""
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
    """Remove an applied reservation."""
    for kept, parts in ((fleet.reserved, reservation.devices), (fleet.reserved_hosts, reservation.hosts)):
        for key, amount, memory in parts:
            found = kept[key]
            found.amount -= amount
            found.memory -= memory
            found.owners.remove(reservation.owner)
            if not found.owners:
                del kept[key]
    _touch(fleet, reservation)


def _touch(fleet: Fleet, reservation: Reservation) -> None:
    """Update the hosts whose state changes: a device that is fully leased, or blocked, looks the same."""
    names = {name for name, amount, memory in reservation.hosts if amount or memory}
    for uuid, _, _ in reservation.devices:
        device = fleet.devices.get(uuid)
        if device is not None and not device.blocked and device.share_left:
            names.add(device.host)
    for name in sorted(names):
        host = fleet.hosts.get(name)
        if host is not None:
            refresh(fleet, host)
