"""Encodes thousands of devices in a few bytes for the heat map: colors, groups and changes. Pure functions."""

from __future__ import annotations

import base64
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from msgspec import Struct

from ..client.fleet_view import DeviceState, device_state, holder, matches
from ..client.notebook import short_model
from ..schemas.operations import DeviceStatus
from ..schemas.requests import Lease

UNKNOWN: Final = 255
STEPS: Final = 250
"""Number of levels of a color scale; level 255 is an unknown value."""


class Metric(StrEnum):
    """Metric that determines the color of the cells."""

    UTILIZATION = "utilization"
    MEMORY = "memory"
    TEMPERATURE = "temperature"
    HEALTH = "health"


class GroupBy(StrEnum):
    """Property by which devices are grouped."""

    HOST = "host"
    MODEL = "model"
    OWNER = "owner"


DOMAINS: Final[dict[Metric, tuple[float, float]]] = {
    Metric.UTILIZATION: (0.0, 100.0),
    Metric.MEMORY: (0.0, 100.0),
    Metric.TEMPERATURE: (25.0, 95.0),
}
"""Lowest and highest value of each color scale: percent, percent, °C."""


def state_words(device: DeviceStatus) -> str:
    """State of a device as text, with its reason."""
    match device_state(device):
        case DeviceState.STALE:
            return "host lost" if "host_lost" in device.why_not else "no samples"
        case DeviceState.UNHEALTHY:
            return f"unhealthy: {device.health}" if device.health else "unhealthy"
        case DeviceState.DRAINED:
            return f"drained: {device.drain_reason}" if device.drain_reason else "drained"
        case DeviceState.UNUSABLE:
            return ", ".join(why.replace("_", " ") for why in device.why_not) or "unusable"
        case DeviceState.THROTTLED:
            return "throttled"
        case DeviceState.LEASED:
            return "leased, throttled" if device.throttled else "leased"
        case DeviceState.SHARED:
            return f"{1 - device.share_free:.0%} leased{', throttled' if device.throttled else ''}"
        case DeviceState.IN_USE:
            throttled = ", throttled" if device.throttled else ""
            return f"in use{throttled}: {device.in_use_reason}" if device.in_use_reason else f"in use{throttled}"
        case DeviceState.RESERVED:
            return f"reserved: {device.booked}"
        case DeviceState.FREE:
            return "free"


def value(device: DeviceStatus, metric: Metric) -> float | None:
    """Value of a device for a metric: percent for utilization and memory, °C for temperature, its state for health."""
    if metric is Metric.UTILIZATION:
        return device.utilization_percent
    if metric is Metric.TEMPERATURE:
        return device.temperature_celsius
    if metric is Metric.MEMORY:
        used, total = device.memory_used_bytes, device.memory_total_bytes
        return 100.0 * used / total if used is not None and total else None
    return float(device_state(device))


def levels(devices: Sequence[DeviceStatus], states: Sequence[DeviceState], metric: Metric) -> bytes:
    """One byte per device: its level on the color scale from 0 to 250, or 255 if unknown; for health, its state."""
    if metric is Metric.HEALTH:
        return bytes(states)
    low, high = DOMAINS[metric]
    scale = STEPS / (high - low)
    found = bytearray()
    for device, how in zip(devices, states, strict=True):
        number = value(device, metric)
        if number is None or number != number or how is DeviceState.STALE:
            found.append(UNKNOWN)
        else:
            found.append(round((min(max(number, low), high) - low) * scale))
    return bytes(found)


class Update(Struct, frozen=True):
    """Update of a canvas: all levels, or only those that have changed.

    Attributes:
        full: base64 of one byte per device; empty if only changes are sent.
        at: base64 of the positions of the devices that changed, as `<u2`; as `<u4` if they are wide.
        to: base64 of their levels, one byte per device.
    """

    full: str = ""
    at: str = ""
    to: str = ""


def update(before: bytes, now: bytes, *, wide: bool = False) -> Update | None:
    """Smallest update from one snapshot's levels to the next; None if nothing has changed.

    Args:
        before: levels that the browser has.
        now: levels that it shall have.
        wide: positions have four bytes instead of two, for more than 65,536 of them.
    """
    if before == now:
        return None
    if len(before) != len(now) or (len(now) > 2**16 and not wide):
        return Update(full=_base64(now))
    changed = [at for at, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
    if (5 if wide else 3) * len(changed) >= len(now):
        return Update(full=_base64(now))
    return Update(at=packed(changed, "I" if wide else "H"), to=_base64(bytes(now[at] for at in changed)))


def alike(devices: Sequence[DeviceStatus], states: Sequence[DeviceState]) -> list[list[DeviceStatus]]:
    """Devices in some states, or throttled; those of one host whose state is the same are together.

    Args:
        devices: all devices, by host and index.
        states: the states, in the order of the result.
    """
    found: dict[tuple[int, str, str], list[DeviceStatus]] = {}
    for device in devices:
        state = device_state(device)
        if state in states or device.throttled:
            place = states.index(state) if state in states else len(states)
            found.setdefault((place, device.host, state_words(device)), []).append(device)
    return [found[key] for key in sorted(found, key=lambda key: (key[0], natural(key[1]), key[2]))]


class Group(Struct, frozen=True, kw_only=True):
    """A group of devices.

    Attributes:
        label: name of the group.
        note: short description: the model, or the number of devices and hosts.
        devices: positions of its devices in the list of all devices.
    """

    label: str
    note: str
    devices: list[int]


def groups(devices: Sequence[DeviceStatus], leases: Sequence[Lease], by: GroupBy, words: str = "") -> list[Group]:
    """Filter and group devices; within a group they keep their order, which is by host and index.

    Groups of hosts are sorted by name, others by size, the largest first; devices without a lease come last.

    Args:
        devices: all devices.
        leases: active leases, which give the owners.
        by: property to group by.
        words: filter words, separated by spaces, as in `matches`.
    """
    owners = {lease.lease_id: lease.owner for lease in leases}
    holders = {lease.lease_id: holder(lease) for lease in leases} if words else {}
    found: dict[str, list[int]] = {}
    wanted = words.lower().split()
    for number, device in enumerate(devices):
        if wanted and not matches(device, wanted, holders):
            continue
        found.setdefault(_label(device, by, owners), []).append(number)

    # Groups of owners and models by size, and devices without a lease last; groups of hosts by name.
    def order(label: str) -> tuple[bool, int, list[tuple[int, str]]]:
        most = 0 if by is GroupBy.HOST else -len(found[label])
        return by is GroupBy.OWNER and label in (_IN_USE, _NOT_LEASED), most, natural(label)

    return [
        Group(label=label, note=_note([devices[number] for number in found[label]], by), devices=found[label])
        for label in sorted(found, key=order)
    ]


_NOT_LEASED: Final = "not leased"
_IN_USE: Final = "in use without a lease"


def natural(name: str) -> list[tuple[int, str]]:
    """Key for natural sorting, which puts `node-2` before `node-10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split("([0-9]+)", name)]


def _label(device: DeviceStatus, by: GroupBy, owners: Mapping[str, str]) -> str:
    if by is GroupBy.HOST:
        return device.host
    if by is GroupBy.MODEL:
        return device.model or "unknown model"
    named = " + ".join(sorted({owners.get(lease, "?") for lease in device.leases}))
    return named or (_IN_USE if device.in_use else _NOT_LEASED)


def _note(devices: Sequence[DeviceStatus], by: GroupBy) -> str:
    if by is GroupBy.HOST:
        return short_model(devices[0].model) if len({device.model for device in devices}) == 1 else "mixed"
    hosts = len({device.host for device in devices})
    return f"{len(devices)} on {hosts} host{'s' if hosts > 1 else ''}"


class Layout(Struct, frozen=True):
    """Order in which a canvas draws the devices.

    Attributes:
        labels: labels of the groups.
        notes: notes of the groups.
        counts: number of devices of each group.
        order: base64 of the devices' positions in the list of all devices, group after group, as `<u4`.
        indices: base64 of the devices' indices on their hosts, in the same order, as `<u2`.
        total: number of all devices, including those that the filter hides.
    """

    labels: list[str]
    notes: list[str]
    counts: list[int]
    order: str
    indices: str
    total: int


def layout(devices: Sequence[DeviceStatus], grouped: Sequence[Group]) -> Layout:
    """Layout for groups of devices."""
    order = [number for group in grouped for number in group.devices]
    return Layout(
        labels=[group.label for group in grouped],
        notes=[group.note for group in grouped],
        counts=[len(group.devices) for group in grouped],
        order=packed(order, "I"),
        indices=packed([min(devices[number].index, 65535) for number in order], "H"),
        total=len(devices),
    )


def packed(numbers: Sequence[float], format: str) -> str:
    """Encode numbers as base64 of little-endian values; `format` is a type code of `array`."""
    made = array(format, numbers)  # pyright: ignore[reportDeprecated]  # the overload for "u", which is not used
    if sys.byteorder == "big":
        made.byteswap()
    return _base64(made.tobytes())


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
