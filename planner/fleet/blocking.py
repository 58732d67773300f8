"""Updates of a host: the reasons why it and its devices take no work, its state, and its place in the index."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from .device import Device
from .host import Host
from .known import Fleet
from .state import BLOCKS, DRAINED, HOST_LOST, MIG_PARENT, STALE, UNHEALTHY, UNLIMITED, WHOLE_SHARE, StateKey

HOST_WITHOUT_DEVICES_STALE_SECONDS: Final = 180.0
"""Staleness limit of a host without devices, which sends inventories alone: three of them missed."""
WARNING_SECONDS: Final = 3600.0
"""Time for which a health warning affects the ranking."""


def recheck(fleet: Fleet, host: Host) -> None:
    """Check a host when its timer is due: usually all its devices are fresh, and only the timer moves."""
    host.timer = math.inf
    again = min((device.seen_at for device in host.devices), default=-math.inf) + fleet.stale_after
    if again > fleet.now and not host.stale and not any(device.warned for device in host.devices):
        host.timer = math.nextafter(again, math.inf)
        fleet.at_timer(host.timer, host.name)
        return
    block(fleet, host)
    refresh(fleet, host)


def rebook(fleet: Fleet) -> None:
    """Update the hosts of booked windows: some begin or end now, or have changed."""
    fleet.bookings.advance(fleet.now)
    fleet.bookings_version += 1
    names: set[str] = set()
    for target in fleet.bookings.targets:
        kind, _, rest = target.partition(":")
        if kind == "device" and rest in fleet.devices:
            names.add(fleet.devices[rest].host)
    whole = any(not target.startswith("device:") for target in fleet.bookings.targets)
    for name, host in fleet.hosts.items():
        if whole or name in names or host.bookings or any(device.bookings for device in host.devices):
            reblock(fleet, name)


def reblock(fleet: Fleet, name: str) -> None:
    """Update a host now."""
    host = fleet.hosts[name]
    block(fleet, host)
    refresh(fleet, host)


def refresh(fleet: Fleet, host: Host, changed: Iterable[Device] | None = None) -> None:
    """Update a host's state, and its place in the index.

    Args:
        fleet: changed in place.
        host: of the fleet.
        changed: its devices that have changed since the last update; None for all.
    """
    fleet.forget()
    reserved = fleet.reserved
    for device in host.devices if changed is None else changed:
        device.see(fleet.device_state, reserved.get(device.uuid) if reserved else None)
    order = host.order = sorted(host.devices, key=_device_order) if host.topology is None else host.devices
    cpus, memory = host.unheld
    kept = fleet.reserved_hosts.get(host.name) if fleet.reserved_hosts else None
    if kept is not None:
        cpus, memory = _without(cpus, kept.amount), _without(memory, kept.memory)
    state = fleet.host_state(
        host.topology,
        cpus,
        memory,
        host.blocked,
        tuple([device.state for device in order]),
        host.booked_from,
    )
    if host.group is None or host.group.state is not state:
        host.group = fleet.index.move(host.name, host.group, state)


def _without(free: int, kept: int) -> int:
    """Free cores or RAM of a host, less what is reserved, which alone does not make it negative."""
    return free if free >= UNLIMITED else max(free - kept, min(free, 0))


def _device_order(device: Device) -> Any:
    return device.state.order, device.index


def block(fleet: Fleet, host: Host) -> None:
    """Determine the reasons why a host and its devices take no work, and set its timer for the next check."""
    now, limit = fleet.now, fleet.stale_after
    mask = 0
    if host.lost:
        mask |= HOST_LOST
    fault = fleet.faults.get(f"host:{host.name}")
    if fault is not None and fault.fatal:
        mask |= UNHEALTHY
    if _host_drain(fleet, host):
        mask |= DRAINED
    again = math.inf
    newest = -math.inf
    if fleet.bookings or host.bookings or any(device.bookings for device in host.devices):
        _book(fleet, host)
    for device in host.devices:
        blocked = mask
        if now - device.seen_at > limit:
            blocked |= STALE
        else:
            again = min(again, device.seen_at + limit)
        newest = max(newest, device.seen_at)
        own = fleet.faults.get(f"device:{device.uuid}")
        device.fault = own
        if own is not None and own.fatal:
            blocked |= UNHEALTHY
        device.warned = own is not None and now < own.warned_at + WARNING_SECONDS
        if device.warned and own is not None:
            again = min(again, own.warned_at + WARNING_SECONDS)
        if f"device:{device.uuid}" in fleet.drains:
            blocked |= DRAINED
        if device.parent:
            blocked |= MIG_PARENT
        device.blocked = blocked
    if host.devices:
        host.stale = now - newest > limit
    else:
        limit = max(limit, HOST_WITHOUT_DEVICES_STALE_SECONDS)
        host.stale = now - host.heard_at > limit
        if not host.stale:
            again = host.heard_at + limit
    host.blocked = mask | STALE if host.stale and not math.isinf(limit) else mask
    if again < host.timer:
        # Just after the limit, so that the comparison above is true by then.
        host.timer = math.nextafter(again, math.inf)
        fleet.at_timer(host.timer, host.name)


def _book(fleet: Fleet, host: Host) -> None:
    """Determine the times for which a host and its devices are booked, and by which leases there must have ended."""
    bookings, now = fleet.bookings, fleet.now
    host.bookings = bookings.on_host(host.name, host.labels, now)
    host.booked_from = bookings.standing(host.bookings, now)[1]
    for device in host.devices:
        device.bookings = bookings.on_device(device.uuid, device.info.mig_parent, host.bookings, now)
        device.booked_for, device.booked_from = bookings.standing(device.bookings, now)


def _host_drain(fleet: Fleet, host: Host) -> str | None:
    if not fleet.drains:
        return None
    found = fleet.drains.get(f"host:{host.name}")
    if found is not None:
        return found
    for key, value in host.labels.items():
        found = fleet.drains.get(f"label:{key}={value}")
        if found is not None:
            return found
    return None


def drain_reason(fleet: Fleet, host: Host, device: Device | None = None) -> str:
    """Reason of the drain of a host or device; empty if it is not drained."""
    own = fleet.drains.get(f"device:{device.uuid}") if device is not None else None
    return own if own is not None else _host_drain(fleet, host) or ""


def why_blocked(mask: int) -> list[str]:
    """Names of the reasons in a mask of `BLOCKS`, in order of precedence."""
    return [name for bit, name in BLOCKS.items() if mask & bit]


def _idle(device: Device) -> StateKey:
    if device.parent:
        return StateKey(device.model, blocked=MIG_PARENT)
    most = device.memory_most
    return StateKey(device.model, share=WHOLE_SHARE, memory_free=most, memory_most=most)


def count_idle(fleet: Fleet, host: Host) -> None:
    """Count in `Fleet.idle` the state that a host would have without leases, foreign processes, faults and drains."""
    states = [fleet.device_state(_idle(device)) for device in host.devices]
    if host.topology is None:
        states.sort(key=lambda state: state.order)
    idle = fleet.host_state(host.topology, host.cpus_total, host.memory_total, 0, tuple(states))
    if idle is host.idle:
        return
    uncount_idle(fleet, host)
    host.idle = idle
    fleet.idle[host.idle] = fleet.idle.get(host.idle, 0) + 1


def uncount_idle(fleet: Fleet, host: Host) -> None:
    """Undo `count_idle` for a host."""
    fleet.idle_version += 1
    if host.idle is not None:
        left = fleet.idle[host.idle] - 1
        if left:
            fleet.idle[host.idle] = left
        else:
            del fleet.idle[host.idle]
        host.idle = None
