"""What people see of the fleet: the list of devices, and aggregates over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..schemas.requests import DeviceFilter, DeviceStatus, FleetSummary
from .device import Device
from .fleet import Fleet, Host, advance, drain_reason, why_blocked
from .state import MIG_PARENT


def devices(fleet: Fleet, now: float, only: DeviceFilter | None = None) -> list[DeviceStatus]:
    """Every device that the filter lets through, by host and index."""
    advance(fleet, now)
    found: list[DeviceStatus] = []
    for name, host in sorted(fleet.hosts.items()):
        if only is not None and not _match(name, only.hosts):
            continue
        found.extend(
            status(fleet, host, device, now)
            for device in host.devices
            if only is None
            or (_match(device.info.name.lower(), _lower(only.models)) and _match(device.uuid, only.devices))
        )
    return found


def status(fleet: Fleet, host: Host, device: Device, now: float) -> DeviceStatus:
    """One device as the planner sees it."""
    fault = device.fault
    own = fault.message if fault is not None and fault.fatal else fault.warning if device.warned and fault else ""
    usable = not device.blocked
    return DeviceStatus(
        uuid=device.uuid,
        host=device.host,
        index=device.index,
        model=device.info.name,
        usable=usable,
        why_not=why_blocked(device.blocked),
        memory_total_bytes=device.memory_total,
        memory_used_bytes=device.memory_used,
        memory_free_bytes=device.memory_free if device.share_free else 0,
        share_free=device.share_free / 1000,
        utilization_percent=device.utilization,
        temperature_celsius=device.temperature,
        power_watts=device.power,
        throttled=device.throttled,
        sample_age_seconds=None if math.isinf(device.seen_at) else max(0.0, now - device.seen_at),
        leases=sorted(device.holders),
        drain_reason=drain_reason(fleet, host, device),
        health=own or _host_health(fleet, host),
        mig_parent=device.info.mig_parent,
    )


def summary(fleet: Fleet, now: float, only: DeviceFilter | None = None) -> FleetSummary:
    """Aggregates over the devices that the filter lets through. A MIG parent counts with its instances, once."""
    listed = [s for s in devices(fleet, now, only) if not fleet.devices[s.uuid].blocked & MIG_PARENT]
    fresh = [s for s in listed if "stale" not in s.why_not]
    models: dict[str, int] = {}
    for entry in listed:
        models[entry.model] = models.get(entry.model, 0) + 1
    usable = [s for s in listed if s.usable]
    leases = {lease for s in listed for lease in s.leases}
    if only is None:
        leases = set(fleet.leases)
    return FleetSummary(
        hosts=len({s.host for s in listed}) if only is not None else len(fleet.hosts),
        devices=len(listed),
        usable_devices=len(usable),
        leased_devices=sum(1 for s in listed if s.leases),
        active_leases=len(leases),
        memory_total_bytes=sum(s.memory_total_bytes for s in listed),
        memory_used_bytes=sum(s.memory_used_bytes or 0 for s in listed),
        memory_free_bytes=sum(s.memory_free_bytes for s in usable),
        share_free=sum(round(s.share_free * 1000) for s in usable) / 1000,
        utilization_percent_mean=_mean([s.utilization_percent for s in fresh]),
        temperature_celsius_mean=_mean([s.temperature_celsius for s in fresh]),
        power_watts_total=_sum([s.power_watts for s in fresh]),
        models=dict(sorted(models.items())),
    )


def _host_health(fleet: Fleet, host: Host) -> str:
    fault = fleet.faults.get(f"host:{host.name}")
    return fault.message if fault is not None and fault.fatal else ""


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _match(text: str, globs: Sequence[str]) -> bool:
    return not globs or any(fnmatchcase(text, glob) for glob in globs)


def _lower(globs: Sequence[str]) -> list[str]:
    return [glob.lower() for glob in globs]
