"""Status of the fleet for operators: the list of devices, and aggregates over it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from ...schemas.inventory import board_part
from ...schemas.operations import DeviceFilter, DeviceStatus, FleetSummary
from ...schemas.values import globs
from .bookings import booked_words
from .device import Device
from .fleet import Fleet, Host, advance, drain_reason, why_blocked
from .state import MIG_PARENT, STALE, WHOLE_SHARE

MOST_HOSTS_NAMED: Final = 20


def devices(fleet: Fleet, now: float, only: DeviceFilter | None = None) -> list[DeviceStatus]:
    """Devices that match a filter, by host and index."""
    advance(fleet, now)
    return [status(fleet, host, device, now) for host, found in _filtered(fleet, only) for device in found]


def status(fleet: Fleet, host: Host, device: Device, now: float) -> DeviceStatus:
    """Status of one device."""
    fault = device.fault
    own = fault.message if fault is not None and fault.fatal else fault.warning if device.warned and fault else ""
    maintained = device.booked_for != "" and fleet.bookings.parties[device.booked_for].nobody
    usable = not device.blocked and not maintained
    return DeviceStatus(
        uuid=device.uuid,
        host=device.host,
        index=device.index,
        model=device.info.name,
        usable=usable,
        why_not=[*why_blocked(device.blocked), *(["maintenance"] if maintained else [])],
        memory_total_bytes=device.memory_total,
        memory_used_bytes=device.memory_used,
        memory_free_bytes=device.memory_free if device.share_left else 0,
        share_free=device.share_left / WHOLE_SHARE,
        utilization_percent=device.utilization,
        temperature_celsius=device.temperature,
        power_watts=device.power,
        throttled=device.throttled,
        sample_age_seconds=None if math.isinf(device.seen_at) else max(0.0, now - device.seen_at),
        leases=sorted(device.holders),
        drain_reason=drain_reason(fleet, host, device),
        health=own or _host_health(fleet, host),
        mig_parent=device.info.mig_parent,
        in_use=device.in_use != "",
        in_use_reason=device.in_use,
        mig_profile=device.info.mig_profile,
        booked=booked_words(device.bookings, fleet.bookings, now) if device.bookings else "",
    )


def summary(fleet: Fleet, now: float, only: DeviceFilter | None = None) -> FleetSummary:
    """Aggregates over the devices that match a filter. Of a split board (MIG) the instances count instead."""
    advance(fleet, now)
    hosts = listed = usable = leased = in_use = total = used = free = 0
    share = 0.0
    models: dict[str, int] = {}
    leases: set[str] = set()
    load: list[float] = []
    heat: list[float] = []
    power: list[float] = []
    memory_of: dict[tuple[str, str | None, int | None], str] = {}
    without_runner: list[str] = []
    unready: dict[str, str] = {}
    for host, found in _filtered(fleet, only):
        counted = 0
        for device in found:
            blocked = device.blocked
            if blocked & MIG_PARENT:
                # Its instances take the work, and the board draws the power.
                if device.power is not None and not blocked & STALE:
                    power.append(device.power)
                continue
            counted += 1
            name = device.model.name
            models[name] = models.get(name, 0) + 1
            # Compute instances of one GPU instance share its memory, which counts once.
            of_memory = device.shared_by == 1 or memory_of.setdefault(_memory_id(device), device.uuid) == device.uuid
            total += device.memory_total if of_memory else 0
            used += device.memory_used or 0 if of_memory else 0
            if device.holders:
                leased += 1
                leases.update(device.holders)
            elif device.in_use:
                in_use += 1
            if not blocked:
                usable += 1
                board = fleet.devices.get(device.info.mig_parent) if device.info.mig_parent else None
                share += device.share_left * board_part(device.info, None if board is None else board.info)
                if device.share_left and of_memory:
                    free += device.memory_free
            if blocked & STALE:
                continue
            if device.utilization is not None:
                load.append(device.utilization)
            if device.temperature is not None:
                heat.append(device.temperature)
            if device.power is not None:
                power.append(device.power)
        listed += counted
        if counted or only is None or not host.devices:
            hosts += 1
            if host.name in fleet.unready_runners:
                unready[host.name] = fleet.unready_runners[host.name]
            elif host.name not in fleet.runners:
                without_runner.append(host.name)
    return FleetSummary(
        hosts=hosts,
        devices=listed,
        usable_devices=usable,
        leased_devices=leased,
        active_leases=len(fleet.leases) if only is None else len(leases),
        memory_total_bytes=total,
        memory_used_bytes=used,
        memory_free_bytes=free,
        share_free=share / WHOLE_SHARE,
        in_use_devices=in_use,
        utilization_percent_mean=math.fsum(load) / len(load) if load else None,
        temperature_celsius_mean=math.fsum(heat) / len(heat) if heat else None,
        power_watts_total=math.fsum(power) if power else None,
        models=dict(sorted(models.items())),
        runner_hosts=hosts - len(without_runner) - len(unready),
        without_runner=without_runner[:MOST_HOSTS_NAMED],
        unready_runners=dict(list(unready.items())[:MOST_HOSTS_NAMED]),
    )


def _memory_id(device: Device) -> tuple[str, str | None, int | None]:
    return device.host, device.info.mig_parent, device.info.mig_instance


def _filtered(fleet: Fleet, only: DeviceFilter | None) -> Iterator[tuple[Host, list[Device]]]:
    """Hosts by name, with those of their devices that match a filter."""
    if only is None or not (only.hosts or only.models or only.devices):
        for _, host in sorted(fleet.hosts.items()):
            yield host, host.devices
        return
    hosts = [glob.lower() for glob in only.hosts]
    models = [glob.lower() for glob in only.models]
    for name, host in sorted(fleet.hosts.items()):
        if not _match(name.lower(), hosts):
            continue
        found = [
            device
            for device in host.devices
            if _match(device.info.name.lower(), models) and _match(device.uuid, only.devices)
        ]
        if found or not (models or only.devices):
            yield host, found


def _host_health(fleet: Fleet, host: Host) -> str:
    fault = fleet.faults.get(f"host:{host.name}")
    return fault.message if fault is not None and fault.fatal else ""


def _match(text: str, wanted: Sequence[str]) -> bool:
    return not wanted or globs.matches_any(text, wanted)
