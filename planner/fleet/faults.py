"""Retention of faults that events have reported of devices and hosts, limited in number and in bytes."""

from __future__ import annotations

from typing import Final, TypeVar

from .blocking import WARNING_SECONDS
from .device import Device, Fault
from .known import Fleet

K = TypeVar("K")

MAX_UNPLACED: Final = 4096
"""Number of faults that are kept of devices which no host has (yet, or any more); the oldest are evicted."""
_FAULT_BYTES: Final = 100
"""Bytes of an encoded fault without its texts and its key."""


def remember(faults: dict[K, Fault], key: K, fault: Fault) -> None:
    """Add a fault of a device that no host has; the oldest is evicted if there are too many."""
    faults.pop(key, None)
    if len(faults) >= MAX_UNPLACED:
        del faults[next(iter(faults))]
    faults[key] = fault


def placed(fleet: Fleet, host: str, uuid: str) -> None:
    """Apply to a device that has come to a host the fault that was remembered for it."""
    gone = fleet.gone.pop(uuid, None)
    fault = fleet.early.pop((host, uuid), None) or gone
    if fault is not None:
        fleet.faults[f"device:{uuid}"] = fault


def left(fleet: Fleet, device: Device) -> None:
    """Remove the fault of a device that no host has any more: a warning ends, a fatal fault is kept for its return."""
    fault = fleet.faults.pop(f"device:{device.uuid}", None)
    if fault is not None and fault.fatal:
        remember(fleet.gone, device.uuid, fault)


def to_keep(fleet: Fleet, now: float, most_bytes: int) -> dict[str, Fault]:
    """Faults to store in the bucket: fatal ones, which keep work off, and warnings that still affect the ranking.

    Args:
        fleet: not changed.
        now: seconds since the epoch.
        most_bytes: approximate limit on their size. If it is too small for all, faults of known hosts and devices take
            precedence, then those of devices that are gone, then warnings; of each the newest.
    """
    ranked: list[tuple[int, float, str, Fault]] = []
    for key, fault in fleet.faults.items():
        kind, _, name = key.partition(":")
        known = name in (fleet.hosts if kind == "host" else fleet.devices)
        if fault.fatal:
            ranked.append((0 if known else 1, -fault.time_ns, key, fault))
        elif known and now < fault.warned_at + WARNING_SECONDS:
            ranked.append((2, -fault.warned_at, key, fault))
    ranked.extend((1, -fault.time_ns, f"device:{uuid}", fault) for uuid, fault in fleet.gone.items())
    ranked.sort(key=lambda entry: entry[:3])
    kept: dict[str, Fault] = {}
    for _, _, key, fault in ranked:
        texts = len(fault.message.encode()) + len(fault.warning.encode())
        most_bytes -= _FAULT_BYTES + len(key.encode()) + texts
        if most_bytes < 0:
            break
        kept[key] = fault
    return kept
