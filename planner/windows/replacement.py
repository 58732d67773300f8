"""Devices of a booked window that can't take work, and others in their place. Pure functions over the fleet.

A device fails, is drained, is split into instances, gets maintenance, or its host is lost, after it was chosen. Another
is chosen that is free when the window closes, or now if it has closed; on the hosts of the window if there are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from ..fleet.bookings import Booking, Party, time_words
from ..fleet.device import Device
from ..fleet.fleet import Fleet, drain_reason, why_blocked
from ..fleet.state import DRAINED, STALE, UNHEALTHY
from .choice import Candidate, Wish, able, choose

PATIENCE_SECONDS: Final = 60.0
"""Time for which a device without samples, or that its host does not list, is expected back: collectors restart."""


def missing(
    fleet: Fleet, devices: Iterable[str], times: Sequence[Booking], parties: Mapping[str, Party]
) -> dict[str, str]:
    """Devices of a window that can't take work, each with the reason.

    Args:
        fleet: at the present time.
        devices: uuids of the window's devices.
        times: occurrences that are not over.
        parties: whom the booked windows are for, by their ids.
    """
    found: dict[str, str] = {}
    for uuid in devices:
        device = fleet.devices.get(uuid)
        if device is None:
            found[uuid] = "no host lists it"
        elif reason := _reason(fleet, device) or _maintenance(device, times, parties):
            found[uuid] = reason
    return found


def passing(fleet: Fleet, uuid: str) -> bool:
    """True if a device that can't take work may be back soon by itself: it has no samples, or is not listed."""
    device = fleet.devices.get(uuid)
    return device is None or device.blocked == STALE


def substitutes(
    candidates: Sequence[Candidate], wish: Wish, parties: Mapping[str, Party], hosts: Iterable[str], by: float
) -> list[Candidate]:
    """Choose devices in place of those that are missing: as many as there are, up to the number wished.

    Args:
        candidates: devices that the window may have, and has not.
        wish: number of devices that are missing, with the occurrences that are not over.
        parties: whom the booked windows are for, by their ids.
        hosts: names of the hosts of the window's other devices.
        by: time by which a device must be free.
    """
    closes = wish.times[0].closes_at
    ready = [
        candidate._replace(free_at=min(candidate.free_at, closes))
        for candidate in candidates
        if candidate.free_at <= by
    ]
    found = able(ready, wish, parties)
    near = set(hosts)
    beside = [candidate for candidate in found if candidate.host in near and not candidate.preempts]
    chosen = choose(beside, wish, parties)
    if chosen is None:
        chosen = choose(found, wish._replace(gpus=min(wish.gpus, len(found))), parties)
    return chosen or []


def _reason(fleet: Fleet, device: Device) -> str:
    """Reason why a device takes no work, in words; empty if it does."""
    blocked = device.blocked
    if blocked & UNHEALTHY:
        host = fleet.faults.get(f"host:{device.host}")
        fault = device.fault if device.fault is not None and device.fault.fatal else host
        return f"unhealthy: {fault.message}" if fault is not None and fault.message else "unhealthy"
    if blocked & DRAINED:
        reason = drain_reason(fleet, fleet.hosts[device.host], device)
        return f"drained: {reason}" if reason else "drained"
    return ", ".join(_WORDS.get(name, name) for name in why_blocked(blocked))


_WORDS: Final = {
    "mig_parent": "split into MIG instances",
    "host_lost": "its host is lost",
    "stale": "no samples",
}


def _maintenance(device: Device, times: Sequence[Booking], parties: Mapping[str, Party]) -> str:
    """Maintenance of a device at one of a window's times; empty if there is none."""
    for other in device.bookings:
        party = parties[other.window]
        if party.nobody and any(time.closes_at < other.ends_at and other.closes_at < time.ends_at for time in times):
            return f"{party.words} from {time_words(other.starts_at)}"
    return ""
