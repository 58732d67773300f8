"""Validation of inventories: numbers that a lease and a table can hold, matrices of the right size, an address."""

from __future__ import annotations

import re
from typing import Any, Final

from msgspec.structs import replace

from .codec import DecodeError
from .telemetry import DeviceInfo, Inventory

BOARD_SLICES: Final = 7
"""Compute slices of a board that MIG splits: an SM slice is about a seventh of it
(https://docs.nvidia.com/datacenter/tesla/mig-user-guide/). Smaller boards (A30, RTX PRO 6000) have `FEW_SLICES`."""
FEW_SLICES: Final = 4
_FEW_FROM: Final = 0.2
"""A slice with at least this share of the board's multiprocessors is one of four; one of seven has 0.12 to 0.14."""
MAX_INTERVAL_SECONDS: Final = 30 * 86400.0
"""Longest interval between samples that an inventory may give: views multiply by it, and add up over all hosts."""
_NUMBERS: Final = {
    "sm_count": (31, 0),
    "sm_clock_max_megahertz": (31, 0),
    "mig_instance": (31, None),
    "memory_bytes": (63, 0),
    "memory_bandwidth_bytes_per_second": (63, 0),
}
"""Numbers of a device: the bits that each may have, and the value that stands for unknown."""
_PROFILE: Final = re.compile(r"([0-9]+)[cg]\.")
_ADDRESS: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,252}")


def check(inventory: Inventory) -> None:
    """Refuse an inventory that could not be stored.

    MessagePack has integers that are larger than a BIGINT, and no number here but a NUMA node is ever negative.

    Raises:
        DecodeError: `out_of_range` for a number, `invalid` for a matrix, with the path of the field.
    """
    count = len(inventory.devices)
    _fits(inventory.host.cpus, "$.host.cpus", 31)
    _fits(inventory.host.memory_bytes, "$.host.memory_bytes")
    if not 0 <= inventory.interval_seconds <= MAX_INTERVAL_SECONDS:  # nor is NaN
        text = f"{inventory.interval_seconds} s is no time between samples - at `$.interval_seconds`"
        raise DecodeError(text, "out_of_range", "$.interval_seconds")
    for device in inventory.devices:
        _fits(device.index, "$.devices[...].index", 31)
        for name, (bits, _) in _NUMBERS.items():
            if (number := getattr(device, name)) is not None:
                _fits(number, f"$.devices[...].{name}", bits)
        for core in device.cpu_affinity:
            _fits(core, "$.devices[...].cpu_affinity[...]", 31)
        if not _is_node(device.numa_node):
            path = "$.devices[...].numa_node"
            raise DecodeError(f"{device.numa_node} is no NUMA node - at `{path}`", "out_of_range", path)
    for name, matrix in (("links", inventory.links), ("nvlink_counts", inventory.nvlink_counts)):
        if matrix and (len(matrix) != count or any(len(row) != count for row in matrix)):
            raise DecodeError(f"Expected {count} rows of {count} - at `$.{name}`", "invalid", f"$.{name}")
    for row in inventory.nvlink_counts:
        for links in row:
            _fits(links, "$.nvlink_counts[...][...]", 31)


def possible(device: DeviceInfo) -> DeviceInfo:
    """Replace the numbers that no device can have by unknown: drivers set all bits, or the sign, of what they lack."""
    changes: dict[str, Any] = {
        name: unknown
        for name, (bits, unknown) in _NUMBERS.items()
        if (number := getattr(device, name)) is not None and not 0 <= number < 2**bits
    }
    if not _is_node(device.numa_node):
        changes["numa_node"] = None
    if not all(0 <= core < 2**31 for core in device.cpu_affinity):
        changes["cpu_affinity"] = []
    return replace(device, **changes) if changes else device


def board_part(info: DeviceInfo, board: DeviceInfo | None) -> float:
    """Share of a whole board that a device is: 1, or the compute slices of a MIG instance over all of its board.

    `1g.10gb` of an H100 is 1/7, `3g.40gb` 3/7, the compute instance `1c.3g.40gb` 1/7. The views count the same
    (`lease_spans.sql`).

    Args:
        info: the device.
        board: the board of which it is an instance, where that is known.
    """
    if not info.mig_parent:
        return 1.0
    found = _PROFILE.search(info.mig_profile)
    slices = max(1, int(found[1])) if found is not None else 1
    few = board is not None and board.sm_count and info.sm_count / slices >= _FEW_FROM * board.sm_count
    return min(1.0, slices / (FEW_SLICES if few else BOARD_SLICES))


def address(text: str) -> str:
    """A host's address if it is a name or number that is safe for ssh and a shell; empty for anything else."""
    return text if _ADDRESS.fullmatch(text) else ""


def _is_node(number: int | None) -> bool:
    return number is None or -(2**31) <= number < 2**31


def _fits(number: int, path: str, bits: int = 63) -> None:
    if not 0 <= number < 2**bits:
        raise DecodeError(f"{number} is no possible value - at `{path}`", "out_of_range", path)
