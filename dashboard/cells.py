"""Thousands of devices as a few bytes: what each is coloured by, how they are grouped, and what has changed. Pure."""

from __future__ import annotations

import base64
import fnmatch
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from enum import IntEnum, StrEnum
from typing import Final

from msgspec import Struct

from ..client.notebook import short_model
from ..schemas.operations import DeviceStatus
from ..schemas.requests import Lease

UNKNOWN: Final = 255
STEPS: Final = 250
"""Levels of a colour scale; 255 is a value that nobody knows."""


class Metric(StrEnum):
    """What the cells are coloured by."""

    UTILIZATION = "utilization"
    MEMORY = "memory"
    TEMPERATURE = "temperature"
    HEALTH = "health"


class GroupBy(StrEnum):
    """What stands together."""

    HOST = "host"
    MODEL = "model"
    OWNER = "owner"


class State(IntEnum):
    """What a device is to somebody who wants one; the worst that holds."""

    FREE = 0
    SHARED = 1
    """Leased in part."""
    LEASED = 2
    THROTTLED = 3
    DRAINED = 4
    STALE = 5
    """Its samples have stopped, or its host is gone."""
    UNHEALTHY = 6
    UNUSABLE = 7
    """Takes no work for another reason, such as a device that is split into MIG instances."""
    IN_USE = 8
    """Somebody without a lease uses it."""


DOMAINS: Final[dict[Metric, tuple[float, float]]] = {
    Metric.UTILIZATION: (0.0, 100.0),
    Metric.MEMORY: (0.0, 100.0),
    Metric.TEMPERATURE: (25.0, 95.0),
}
"""Between which values a colour scale spans: percent, percent, °C."""


def state(device: DeviceStatus) -> State:
    """The state of a device."""
    why = set(device.why_not)
    if why & {"stale", "host_lost"}:
        return State.STALE
    if "unhealthy" in why or device.health:
        return State.UNHEALTHY
    if "drained" in why or device.drain_reason:
        return State.DRAINED
    if not device.usable:
        return State.UNUSABLE
    if device.throttled:
        return State.THROTTLED
    if device.leases:
        return State.LEASED if device.share_free <= 0 else State.SHARED
    return State.IN_USE if device.in_use else State.FREE


def state_words(device: DeviceStatus) -> str:
    """The state with its reason."""
    match state(device):
        case State.STALE:
            return "host lost" if "host_lost" in device.why_not else "no samples"
        case State.UNHEALTHY:
            return f"unhealthy: {device.health}" if device.health else "unhealthy"
        case State.DRAINED:
            return f"drained: {device.drain_reason}" if device.drain_reason else "drained"
        case State.UNUSABLE:
            return ", ".join(why.replace("_", " ") for why in device.why_not) or "unusable"
        case State.THROTTLED:
            return "throttled, leased" if device.leases else "throttled"
        case State.LEASED:
            return "leased"
        case State.SHARED:
            return f"{1 - device.share_free:.0%} leased"
        case State.IN_USE:
            return f"in use: {device.in_use_reason}" if device.in_use_reason else "in use"
        case State.FREE:
            return "free"


def value(device: DeviceStatus, metric: Metric) -> float | None:
    """What a device is coloured by: percent, percent, °C or its state."""
    if metric is Metric.UTILIZATION:
        return device.utilization_percent
    if metric is Metric.TEMPERATURE:
        return device.temperature_celsius
    if metric is Metric.MEMORY:
        used, total = device.memory_used_bytes, device.memory_total_bytes
        return 100.0 * used / total if used is not None and total else None
    return float(state(device))


def levels(devices: Sequence[DeviceStatus], states: Sequence[State], metric: Metric) -> bytes:
    """One byte a device: its place on the colour scale from 0 to 250, or 255; its state for health."""
    if metric is Metric.HEALTH:
        return bytes(states)
    low, high = DOMAINS[metric]
    scale = STEPS / (high - low)
    found = bytearray()
    for device, how in zip(devices, states, strict=True):
        number = value(device, metric)
        if number is None or number != number or how is State.STALE:
            found.append(UNKNOWN)
        else:
            found.append(round((min(max(number, low), high) - low) * scale))
    return bytes(found)


class Update(Struct, frozen=True):
    """What a canvas is told: all levels, or those that have changed.

    Attributes:
        full: base64 of a byte a device; empty where only changes are told.
        at: base64 of the numbers of devices that changed, `<u2`.
        to: base64 of their levels.
    """

    full: str = ""
    at: str = ""
    to: str = ""


def update(before: bytes, now: bytes) -> Update | None:
    """The shortest way from one look to the next; None where nothing has changed."""
    if before == now:
        return None
    if len(before) != len(now) or len(now) > 2**16:
        return Update(full=_base64(now))
    changed = [at for at, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
    if 3 * len(changed) >= len(now):
        return Update(full=_base64(now))
    return Update(at=packed(changed, "H"), to=_base64(bytes(now[at] for at in changed)))


class Group(Struct, frozen=True, kw_only=True):
    """Devices that stand together.

    Attributes:
        label: names them.
        note: says something of them all.
        devices: their numbers in the list of all devices.
    """

    label: str
    note: str
    devices: list[int]


def groups(devices: Sequence[DeviceStatus], leases: Sequence[Lease], by: GroupBy, words: str = "") -> list[Group]:
    """The devices that a filter lets through, grouped; within a group by host and index.

    Args:
        devices: all.
        leases: that are active; they give owners.
        by: what stands together.
        words: as in `says`.
    """
    owners = {lease.lease_id: lease.owner for lease in leases}
    found: dict[str, list[int]] = {}
    wanted = words.lower().split()
    for number, device in enumerate(devices):
        if wanted and not says(device, wanted, owners):
            continue
        found.setdefault(_label(device, by, owners), []).append(number)

    # Whoever holds most comes first, and what nobody holds last; hosts and models go by name.
    def order(label: str) -> tuple[bool, int, list[tuple[int, str]]]:
        most = 0 if by is GroupBy.HOST else -len(found[label])
        return by is GroupBy.OWNER and label == _NOBODY, most, natural(label)

    return [
        Group(label=label, note=_note([devices[number] for number in found[label]], by), devices=found[label])
        for label in sorted(found, key=order)
    ]


_NOBODY: Final = "not leased"


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts `node-2` before `node-10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split("([0-9]+)", name)]


def _label(device: DeviceStatus, by: GroupBy, owners: Mapping[str, str]) -> str:
    if by is GroupBy.HOST:
        return device.host
    if by is GroupBy.MODEL:
        return device.model or "unknown model"
    return " + ".join(sorted({owners.get(lease, "?") for lease in device.leases})) or _NOBODY


def _note(devices: Sequence[DeviceStatus], by: GroupBy) -> str:
    if by is GroupBy.HOST:
        return short_model(devices[0].model) if len({device.model for device in devices}) == 1 else "mixed"
    hosts = len({device.host for device in devices})
    return f"{len(devices)} on {hosts} host{'s' if hosts > 1 else ''}"


def says(device: DeviceStatus, words: Sequence[str], owners: Mapping[str, str]) -> bool:
    """Whether all words (in lower case) are found in a device's host, model, uuid, lease, owner or state.

    A word with `*` or `?` is a glob over each of them.
    """
    texts = [device.host, device.model, device.uuid, state(device).name, *device.leases]
    texts += [owners.get(lease, "") for lease in device.leases]
    lowered = [text.lower() for text in texts if text]
    return all(
        any(fnmatch.fnmatchcase(text, word) if set(word) & set("*?[") else word in text for text in lowered)
        for word in words
    )


class Layout(Struct, frozen=True):
    """Where a canvas draws which device.

    Attributes:
        labels: of the groups.
        notes: of the groups.
        counts: how many devices each has.
        order: base64 of the devices' numbers, group after group, `<u4`.
        indices: base64 of the devices' indices on their hosts in that order, `<u2`.
        total: devices in all, in view or not.
    """

    labels: list[str]
    notes: list[str]
    counts: list[int]
    order: str
    indices: str
    total: int


def layout(devices: Sequence[DeviceStatus], grouped: Sequence[Group]) -> Layout:
    """The layout of groups."""
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
    """Base64 of numbers, little-endian; `format` as in `array`."""
    made = array(format, numbers)  # pyright: ignore[reportDeprecated]  # the overload for "u", which is not used
    if sys.byteorder == "big":
        made.byteswap()
    return _base64(made.tobytes())


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
