"""Lists that are larger than a message of the bus, asked for in parts: devices by the ends of host names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from msgspec.structs import replace

from ..schemas import globs
from ..schemas.operations import DeviceFilter, Devices, DeviceStatus, LeaseFilter, Leases
from ..schemas.requests import Lease
from .errors import InvalidRequest

Ask = Callable[[DeviceFilter], Awaitable[Devices]]

_LAST: Final = (*"0123456789", "[!0-9]")
"""The last character of a host's name, in classes that exclude each other."""
_DEEPEST: Final = 6
_LEASES_AT_ONCE: Final = 500


async def all_leases(ask: Callable[[LeaseFilter], Awaitable[Leases]], wanted: LeaseFilter) -> list[Lease]:
    """Every lease that a filter lets through. One that ends in between may be left out, none is listed twice."""
    try:
        return (await ask(wanted)).leases
    except InvalidRequest as error:
        if error.code != "too_large":
            raise
    found: dict[str, Lease] = {}
    offset = 0
    while True:
        part = (await ask(replace(wanted, offset=offset, limit=_LEASES_AT_ONCE))).leases
        found.update((lease.lease_id, lease) for lease in part)
        if len(part) < _LEASES_AT_ONCE:
            return list(found.values())
        offset += len(part)


async def all_devices(ask: Ask, wanted: DeviceFilter) -> list[DeviceStatus]:
    """Every device that a filter lets through, in as many questions as it takes.

    Raises:
        InvalidRequest: one host alone has more than a message holds, or some other field is wrong.
    """
    try:
        return (await ask(wanted)).devices
    except InvalidRequest as error:
        if error.code != "too_large":
            raise
    found = await _part(ask, wanted, "", 0)
    return sorted(found, key=lambda device: (device.host, device.index))


async def _part(ask: Ask, wanted: DeviceFilter, end: str, depth: int) -> list[DeviceStatus]:
    found: list[DeviceStatus] = []
    # Names that are no longer than `end` have no character before it.
    globs = [*(f"*{last}{end}" for last in _LAST), *([end] if end else [])]
    for last, glob in zip((*_LAST, ""), globs, strict=False):
        try:
            devices = (await ask(DeviceFilter(hosts=[glob], models=wanted.models, devices=wanted.devices))).devices
        except InvalidRequest as error:
            if error.code != "too_large" or not last or depth >= _DEEPEST:
                raise
            found += await _part(ask, wanted, last + end, depth + 1)
            continue
        found += [device for device in devices if _matches(device.host, wanted.hosts)]
    return found


def _matches(host: str, wanted: Sequence[str]) -> bool:
    return not wanted or globs.matches_any(host, wanted)
