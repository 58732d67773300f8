"""Fetches lists that are larger than a message of the bus in parts.

Leases and the queue are fetched by offset, devices by the last characters of their hosts' names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from msgspec.structs import replace

from ..schemas.operations import (
    DeviceFilter,
    Devices,
    DeviceStatus,
    LeaseFilter,
    Leases,
    Queue,
    QueueEntry,
    QueueFilter,
)
from ..schemas.requests import Lease
from ..schemas.values import globs
from .errors import InvalidRequest

Ask = Callable[[DeviceFilter], Awaitable[Devices]]

_LAST_CHARACTERS: Final = (*"0123456789", "[!0-9]")
"""Disjoint classes of the last character of a host name."""
_MAX_DEPTH: Final = 6
_LEASES_PER_PAGE: Final = 500


async def all_leases(ask: Callable[[LeaseFilter], Awaitable[Leases]], wanted: LeaseFilter) -> list[Lease]:
    """All leases that match a filter. A lease that ends between parts may be left out; none is listed twice."""
    try:
        return (await ask(wanted)).leases
    except InvalidRequest as error:
        if error.code != "too_large":
            raise
    found: dict[str, Lease] = {}
    offset = 0
    while True:
        part = (await ask(replace(wanted, offset=offset, limit=_LEASES_PER_PAGE))).leases
        found.update((lease.lease_id, lease) for lease in part)
        if len(part) < _LEASES_PER_PAGE:
            return list(found.values())
        offset += len(part)


async def all_queued(ask: Callable[[QueueFilter], Awaitable[Queue]], wanted: QueueFilter) -> list[QueueEntry]:
    """All requests in the queue that match a filter, in queue order.

    The queue moves between parts. A request that another one pushes back is in two parts, and is listed once, at its
    later place. One that moves forward may be left out.
    """
    found: dict[tuple[str, str], QueueEntry] = {}
    offset = 0
    while True:
        part = await ask(replace(wanted, offset=offset))
        found.update(((entry.owner, entry.request_id), entry) for entry in part.entries)
        offset += len(part.entries)
        if offset >= part.total or not part.entries:  # an earlier planner lists all at once, without a total
            return sorted(found.values(), key=lambda entry: entry.position)


async def all_devices(ask: Ask, wanted: DeviceFilter) -> list[DeviceStatus]:
    """All devices that match a filter, fetched in as many requests as necessary.

    Raises:
        InvalidRequest: a single host has more devices than fit in a message, or another field is invalid.
    """
    try:
        return (await ask(wanted)).devices
    except InvalidRequest as error:
        if error.code != "too_large":
            raise
    found = await _devices_by_suffix(ask, wanted, "", 0)
    return sorted(found, key=lambda device: (device.host, device.index))


async def _devices_by_suffix(ask: Ask, wanted: DeviceFilter, end: str, depth: int) -> list[DeviceStatus]:
    found: list[DeviceStatus] = []
    # A name that is equal to `end` has no character before it, so it is asked for separately.
    globs = [*(f"*{last}{end}" for last in _LAST_CHARACTERS), *([end] if end else [])]
    for last, glob in zip((*_LAST_CHARACTERS, ""), globs, strict=False):
        try:
            devices = (await ask(DeviceFilter(hosts=[glob], models=wanted.models, devices=wanted.devices))).devices
        except InvalidRequest as error:
            if error.code != "too_large" or not last or depth >= _MAX_DEPTH:
                raise
            found += await _devices_by_suffix(ask, wanted, last + end, depth + 1)
            continue
        found += [device for device in devices if _matches(device.host, wanted.hosts)]
    return found


def _matches(host: str, wanted: Sequence[str]) -> bool:
    return not wanted or globs.matches_any(host, wanted)
