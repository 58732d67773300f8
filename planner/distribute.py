"""Work items over granted devices: every item goes to one device, or is listed as unassigned with the reason."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..schemas.requests import Distribution, Grant, Method, UnassignedItem, WeightBy, WorkItem
from ..schemas.telemetry import DeviceInfo


def distribute(
    work: Distribution, grants: Sequence[Grant], devices: Sequence[DeviceInfo]
) -> tuple[list[Grant], list[UnassignedItem]]:
    """Fill in the items of grants.

    Args:
        work: what to distribute, and how.
        grants: the devices.
        devices: their capabilities, in the order of the grants.

    Returns:
        The grants with their items, and the items that no device took.
    """
    items = _items(work)
    counts = apportion(len(items), _weights(work, grants, devices), _limits(work, grants))
    filled: list[Grant] = []
    at = 0
    for grant, count in zip(grants, counts, strict=True):
        filled.append(msgspec.structs.replace(grant, items=[item for item, _ in items[at : at + count]]))
        at += count
    return filled, [UnassignedItem(id=item, reason="all devices are full") for item, _ in items[at:]]


def apportion(total: int, weights: Sequence[float], limits: Sequence[int | None]) -> list[int]:
    """Counts in proportion to weights by the largest-remainder rule, none above its limit."""
    counts = [0] * len(weights)
    left = total
    while left > 0:
        open_ = [at for at, limit in enumerate(limits) if (limit is None or counts[at] < limit) and weights[at] > 0]
        if not open_:
            break
        scale = left / sum(weights[at] for at in open_)
        quotas = {at: weights[at] * scale for at in open_}
        parts = {at: int(quota) for at, quota in quotas.items()}
        for at in sorted(open_, key=lambda at: (parts[at] - quotas[at], at))[: left - sum(parts.values())]:
            parts[at] += 1
        for at, part in parts.items():
            limit = limits[at]
            taken = part if limit is None else min(part, limit - counts[at])
            counts[at] += taken
            left -= taken
    return counts


def _items(work: Distribution) -> list[tuple[str | int, WorkItem]]:
    if isinstance(work.items, int):
        return [(n, WorkItem(id=str(n), memory_bytes=work.memory_per_item_bytes)) for n in range(work.items)]
    return [
        (item, WorkItem(id=item, memory_bytes=work.memory_per_item_bytes)) if isinstance(item, str) else (item.id, item)
        for item in work.items
    ]


def _weights(work: Distribution, grants: Sequence[Grant], devices: Sequence[DeviceInfo]) -> list[float]:
    if work.method is Method.UNIFORM:
        return [1.0] * len(grants)
    if work.weight_by is WeightBy.GIVEN and work.weights is not None:
        return list(work.weights)
    if work.weight_by is WeightBy.MEMORY:
        found = [float(grant.memory_bytes or info.memory_bytes) for grant, info in zip(grants, devices, strict=True)]
    elif work.weight_by is WeightBy.BANDWIDTH:
        found = [info.memory_bandwidth_bytes_per_second * g.share for g, info in zip(grants, devices, strict=True)]
    else:
        found = [info.sm_count * info.sm_clock_max_megahertz * g.share for g, info in zip(grants, devices, strict=True)]
    return found if all(found) else [1.0] * len(grants)


def _limits(work: Distribution, grants: Sequence[Grant]) -> list[int | None]:
    limits: list[int | None] = []
    for grant in grants:
        limit = work.max_items_per_device
        if work.memory_per_item_bytes:
            fit = grant.memory_bytes // work.memory_per_item_bytes
            limit = fit if limit is None else min(limit, fit)
        limits.append(limit)
    return limits
