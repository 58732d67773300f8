"""Which hosts and devices are kept free of new work, after an operator has asked for a change."""

from __future__ import annotations

from collections.abc import Mapping

from ..schemas.operations import DrainAction
from .fleet.fleet import Fleet
from .leases.leases import Refused


def drained(before: Mapping[str, str], action: DrainAction, fleet: Fleet) -> dict[str, str]:
    """All drains after a change.

    Args:
        before: `host:NAME`, `device:UUID` or `label:K=V` → reason.
        action: what is asked. Taking off what isn't there, or isn't known, is no mistake.
        fleet: tells which hosts and devices there are.

    Raises:
        Refused: nothing is named, nothing that the fleet has, or no reason is given.
    """
    targets = [
        *(f"device:{uuid}" for uuid in action.devices),
        *(f"host:{name}" for name in action.hosts),
        *(f"label:{key}={value}" for key, value in action.host_labels.items()),
    ]
    if not action.drain:
        return {target: reason for target, reason in before.items() if target not in targets}
    if not targets:
        raise Refused("invalid", "Name the devices, hosts or host_labels to drain", "$.devices")
    if not action.reason.strip():
        raise Refused("invalid", "Say why: a drain needs a reason", "$.reason")
    for field, names, known in (
        ("devices", action.devices, fleet.devices),
        ("hosts", action.hosts, fleet.hosts),
    ):
        for at, name in enumerate(names):
            if name not in known:
                raise Refused("not_found", f"The fleet has no {field[:-1]} {name!r}", f"$.{field}[{at}]")
    by = f" (by {action.operator})" if action.operator else ""
    return {**before, **dict.fromkeys(targets, f"{action.reason.strip()}{by}")}
