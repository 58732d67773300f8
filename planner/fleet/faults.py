"""Which faults are worth keeping: what events have said of devices and hosts, bounded in number and in bytes."""

from __future__ import annotations

from typing import Final, TypeVar

from .blocking import WARNING_SECONDS
from .device import Device, Fault
from .known import Fleet

K = TypeVar("K")

UNPLACED_MOST: Final = 4096
"""Faults that are remembered of devices which no host has (yet, or any more), the newest of them."""
_FAULT_BYTES: Final = 100
"""Of an encoded fault beside its texts and its key."""


def remember(faults: dict[K, Fault], key: K, fault: Fault) -> None:
    """Put a fault among those of devices that no host has, in place of the oldest of too many."""
    faults.pop(key, None)
    if len(faults) >= UNPLACED_MOST:
        del faults[next(iter(faults))]
    faults[key] = fault


def placed(fleet: Fleet, host: str, uuid: str) -> None:
    """A device has come to a host: what was said of it before counts from now on."""
    gone = fleet.gone.pop(uuid, None)
    fault = fleet.early.pop((host, uuid), None) or gone
    if fault is not None:
        fleet.faults[f"device:{uuid}"] = fault


def left(fleet: Fleet, device: Device) -> None:
    """No host has the device any more: a warning is over with it, a fault waits for its return."""
    fault = fleet.faults.pop(f"device:{device.uuid}", None)
    if fault is not None and fault.fatal:
        remember(fleet.gone, device.uuid, fault)


def to_keep(fleet: Fleet, now: float, most_bytes: int) -> dict[str, Fault]:
    """The faults that matter: those that keep work off, then warnings that still weigh on the rank.

    Args:
        fleet: not changed.
        now: seconds since the epoch.
        most_bytes: that they take, about. Where there are more, faults of what the fleet has go first, then those of
            devices that are gone, then warnings; the newest of each.
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
