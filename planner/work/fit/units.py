"""Units to plan with: single devices, and groups of like devices of one host that can work as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ....schemas.models.description import Attention
from ....schemas.models.serving import ServeWork
from ....schemas.telemetry import DeviceInfo
from .costs import Unit
from .rates import rates_of

MOST_DEVICES: Final = 256
"""Devices that a plan considers: those with most free memory."""


class Candidate(NamedTuple):
    """A device that may take a part of the model.

    Attributes:
        info: its identity and capabilities.
        memory_bytes: memory that is free on it.
    """

    info: DeviceInfo
    memory_bytes: int


def singles(work: ServeWork, devices: Sequence[Candidate]) -> list[Unit]:
    """Each device as a unit."""
    return [
        Unit((at,), round(device.memory_bytes * work.memory_share), rates_of(device.info, work.rates), device.info.host)
        for at, device in enumerate(devices)
    ]


def divides(attention: Attention, size: int) -> bool:
    """True if a group of some size can divide the heads; heads of keys and values are copied if there are too few."""
    if attention.heads % size:
        return False
    return attention.latent is not None or attention.kv_heads % size == 0 or size % attention.kv_heads == 0


def groups(work: ServeWork, devices: Sequence[Candidate], units: Sequence[Unit], size: int) -> list[Unit]:
    """Groups of a size, of devices of one host and product; devices that are left over are in none."""
    if size < 2 or not work.tensor_parallel or not divides(work.model.attention, size):
        return []
    alike: dict[tuple[str, str, str], list[Unit]] = {}
    for unit in units:
        info = devices[unit.devices[0]].info
        if info.mig_parent is None:
            alike.setdefault((info.host, info.vendor, info.name), []).append(unit)
    found: list[Unit] = []
    for (host, _, _), members in sorted(alike.items()):
        # By free memory: a group has that of its smallest device.
        ordered = sorted(members, key=lambda unit: (-unit.memory, unit.devices))
        for start in range(0, len(ordered) - size + 1, size):
            group = ordered[start : start + size]
            indexes = tuple(sorted(unit.devices[0] for unit in group))
            found.append(Unit(indexes, group[-1].memory, group[0].rates, host))
    return found


def mixes(work: ServeWork, devices: Sequence[Candidate]) -> list[list[Unit]]:
    """Ways to see the devices as units: each alone, and for each size of groups these with what is left over."""
    units = singles(work, devices)
    found = [units]
    for size in sizes_of_groups(work, devices):
        grouped = groups(work, devices, units, size)
        inside = {at for unit in grouped for at in unit.devices}
        found.append([*grouped, *(unit for unit in units if unit.devices[0] not in inside)])
    return found


def sizes_of_groups(work: ServeWork, devices: Sequence[Candidate]) -> list[int]:
    """Sizes of groups that some host has enough like devices for: powers of two."""
    counts: dict[tuple[str, str], int] = {}
    for device in devices:
        key = (device.info.host, device.info.name)
        counts[key] = counts.get(key, 0) + 1
    most = max(counts.values(), default=0)
    return [2**power for power in range(1, 7) if 2**power <= most and divides(work.model.attention, 2**power)]
