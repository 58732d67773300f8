"""Strain of a device: heat, load, foreign memory, throttling, health warnings. Policies subtract it from a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ...fleet.state import HEAT_LEVELS, LOAD_LEVELS, DeviceState, HostState

STRAIN_WEIGHTS: Final = {"temperature": 0.15, "utilization": 0.15, "occupied": 0.2, "throttled": 0.25, "warned": 0.25}
"""Maximum penalties on a device's score: for heat (at `HEAT_LEVELS`), load, memory full of processes without a lease,
clocks that are lowered because of heat or power, and a health warning within the hour. They sum to 1, so that together
they do not outweigh one unit of a policy's score."""


def strain_parts(device: DeviceState) -> dict[str, float]:
    """Penalties of strain on a device's score, by name; 0 or negative each."""
    return {
        "temperature": -STRAIN_WEIGHTS["temperature"] * device.heat / HEAT_LEVELS,
        "utilization": -STRAIN_WEIGHTS["utilization"] * device.load / LOAD_LEVELS,
        "occupied": -STRAIN_WEIGHTS["occupied"] * _occupied(device),
        "throttled": -STRAIN_WEIGHTS["throttled"] if device.throttled else 0.0,
        "warned": -STRAIN_WEIGHTS["warned"] if device.warned else 0.0,
    }


def strain(device: DeviceState) -> float:
    """Strain of a device, the sum of its penalties: 0 to 1, the greater the worse; cached in the state."""
    found = device.strain
    if found is None:
        found = device.strain = -math.fsum(strain_parts(device).values())
    return found


def strain_of(state: HostState, chosen: Sequence[int]) -> float:
    """Sum of the strain of the chosen devices."""
    total = 0.0
    for at in chosen:
        total += strain(state.devices[at])
    return total


def _occupied(device: DeviceState) -> float:
    """Part of the memory that is used without any lease, less what the driver may reserve (up to 5 %)."""
    total = device.model.memory_bytes
    if device.leased or not total:
        return 0.0
    return max(0.0, 0.95 - device.memory_free / total)
