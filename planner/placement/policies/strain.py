"""Live trouble of a device: heat, strangers on it, throttling, health warnings. Policies take it off a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ...fleet.state import HEAT_LEVELS, LOAD_LEVELS, DeviceState, HostState

STRAIN_WEIGHTS: Final = {"temperature": 0.15, "utilization": 0.15, "occupied": 0.2, "throttled": 0.25, "warned": 0.25}
"""What live trouble takes from a device's score at its worst: hot by 40 °C or more, busy by others, its memory full of
processes without a lease, clocks held back by heat or power, a health warning within the hour. They sum to 1, so that
no mix of them outweighs one unit of a policy's own score."""


def strain_parts(device: DeviceState) -> dict[str, float]:
    """What live trouble takes from a device's score, by name; 0 or negative each."""
    return {
        "temperature": -STRAIN_WEIGHTS["temperature"] * device.heat / HEAT_LEVELS,
        "utilization": -STRAIN_WEIGHTS["utilization"] * device.load / LOAD_LEVELS,
        "occupied": -STRAIN_WEIGHTS["occupied"] * _occupied(device),
        "throttled": -STRAIN_WEIGHTS["throttled"] if device.throttled else 0.0,
        "warned": -STRAIN_WEIGHTS["warned"] if device.warned else 0.0,
    }


def strain(device: DeviceState) -> float:
    """What live trouble takes from a device's score in all; 0 to 1, the greater the worse."""
    found = device.strain
    if found is None:
        found = device.strain = -math.fsum(strain_parts(device).values())
    return found


def strain_of(state: HostState, chosen: Sequence[int]) -> float:
    """Strain of the chosen devices together."""
    total = 0.0
    for at in chosen:
        total += strain(state.devices[at])
    return total


def _occupied(device: DeviceState) -> float:
    """Part of the memory that is taken although no lease is there; what the driver reserves (up to 5 %) aside."""
    total = device.model.memory_bytes
    if device.leased or not total:
        return 0.0
    return max(0.0, 0.95 - device.memory_free / total)
