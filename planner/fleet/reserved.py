"""Hiding what is kept for requests that wait (`reservation.py`) from decisions, and showing it again."""

from __future__ import annotations

from .blocking import refresh
from .known import Fleet
from .reservation import Reservation, Reserved


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
