"""Handlers of events: one function for each kind, which changes the fleet. `fleet.apply` calls them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from ...schemas.inventory import address
from ...schemas.operations import Drains
from ...schemas.requests import Lease, LeaseEvent, LeaseState
from ...schemas.system_processes import is_system_process
from ...schemas.telemetry import DeviceEvent, Inventory, ProcessBatch, SampleBatch, Severity
from ...schemas.work.runs import RUNNER_LABEL
from .blocking import block, count_idle, rebook, refresh, uncount_idle
from .device import Device, Fault, last_tick
from .events import (
    Booked,
    ClockSet,
    HostForgotten,
    HostLost,
    HostSeen,
    LeaseEnded,
    RunnerGone,
    RunnerSeen,
    RunnerUnready,
)
from .faults import left, placed, remember
from .holdings import free, hold, part_gone, relate, sharing_memory
from .host import Host
from .known import Claim, Fleet
from .occupancy import UNIDENTIFIED, Listed
from .order import REREAD_NS, is_past, told_ns
from .state import STALE, UNLIMITED
from .topology import levels_of

K = TypeVar("K")

CLOCK_STEP_NS: Final = 1_000_000_000
PROCESSES_KNOWN_SECONDS: Final = 60.0
"""Time for which a list of processes is valid."""
REPORTS_SECONDS: Final = 90.0
"""A host that was heard within this time keeps its devices, even if another host lists them: an inventory comes each
minute. Another name of the same machine gets them sooner, once the first one's samples are stale."""


def _inventory(fleet: Fleet, event: Inventory) -> None:
    name = event.host.name
    host = fleet.hosts.get(name)
    shape = None if host is None else _shape(host)
    stored_ns = told_ns(fleet.stored_at, event.time_ns)
    if host is None:
        host = fleet.hosts[name] = Host(name)
    elif is_past(stored_ns, host.inventory_ns):
        return
    if event.agent != host.agent:
        host.agent, host.lag = event.agent, math.inf
        host.processes_ns = -1
    host.inventory_ns = stored_ns
    host.heard_at = max(host.heard_at, fleet.now)
    host.address = address(event.host.address)
    host.labels = _labels(fleet, name, event.host.labels)
    host.cpus_total = event.host.cpus * 1000 or UNLIMITED
    host.memory_total = event.host.memory_bytes or UNLIMITED
    host.cpus_held, host.memory_held = fleet.on_host.get(name, (0, 0))
    host.lost = name in fleet.lost_hosts
    host.left = event.agent if event.leaving else ""
    host.machine_ids = frozenset(event.host.machine_ids)
    _adopt(fleet, host, event, shape)
    if event.leaving and fleet.claims:
        for other, claim in list(fleet.claims.items()):
            if name in claim.owners.values():
                claim_again(fleet, other)


def _labels(fleet: Fleet, name: str, labels: dict[str, str]) -> dict[str, str]:
    """Labels of a host, with the one of hosts that have a runner: a collector can't set that."""
    found = {key: value for key, value in labels.items() if key != RUNNER_LABEL}
    return {**found, RUNNER_LABEL: "yes"} if name in fleet.runners else found


def _adopt(fleet: Fleet, host: Host, event: Inventory, shape: object) -> None:
    """Give a host the devices of its inventory, except those that belong to another host which still reports."""
    name = host.name
    others: dict[str, str] = {}
    parents = {info.mig_parent for info in event.devices if info.mig_parent}
    old = {device.uuid: device for device in host.devices}
    devices: dict[str, Device] = {}
    for info in event.devices:
        device = old.pop(info.uuid, None)
        if device is None and info.uuid not in devices:
            device = _new_device(fleet, info.uuid, host, others)
        if device is not None:
            device.describe(info, fleet.model(info), info.mig_enabled or info.uuid in parents)
            devices[info.uuid] = device
    for gone in old.values():
        if fleet.devices.get(gone.uuid) is gone:
            del fleet.devices[gone.uuid]
            left(fleet, gone)
            part_gone(fleet, gone.uuid)
    host.devices = list(devices.values())
    relate(fleet, host)
    # The matrix has a row for each listed device: it does not fit if one of them was left out.
    host.topology = fleet.topology(levels_of(event)) if len(devices) == len(event.devices) else None
    host.batch_devices = None
    if _shape(host) != shape:  # most inventories bring nothing new
        fleet.shape_version += 1
    count_idle(fleet, host)
    block(fleet, host)
    refresh(fleet, host)
    if others:
        _claim(fleet, host, event, others)
    elif fleet.claims:
        fleet.claims.pop(name, None)


def _claim(fleet: Fleet, host: Host, event: Inventory, owners: dict[str, str]) -> None:
    """Remember the devices of other hosts that a host lists, and set a timer for when those may have gone silent."""
    fleet.claims[host.name] = Claim(event, owners)
    due = min(fleet.hosts[owner].heard_at + _patience(fleet, fleet.hosts[owner], host) for owner in owners.values())
    fleet.at_timer(math.nextafter(max(due, fleet.now), math.inf), host.name)


def claim_again(fleet: Fleet, name: str) -> None:
    """Give a host the devices that it lists, if the hosts that they belonged to report no more; else keep the claim.

    The claim is dropped if the host itself is unknown, has left, or is silent.
    """
    claim = fleet.claims.pop(name)
    host = fleet.hosts.get(name)
    if host is None or host.left or fleet.now - host.heard_at > REPORTS_SECONDS:
        return
    owners = {uuid: owner for uuid, owner in claim.owners.items() if owner in fleet.hosts}
    if len(owners) < len(claim.owners) or not all(_reports(fleet, owner, host) for owner in owners.values()):
        _adopt(fleet, host, claim.event, _shape(host))
    else:
        _claim(fleet, host, claim.event, owners)


def _shape(host: Host) -> object:
    """Labels, devices and models of a host: a change of them moves the fleet's `shape_version`."""
    return host.labels, [(device.uuid, device.model) for device in host.devices]


def _new_device(fleet: Fleet, uuid: str, host: Host, others: dict[str, str]) -> Device | None:
    """Create a device that a host lists for the first time.

    None if it belongs to another host that still reports, which is then noted in `others`. It is taken from one that
    does not.
    """
    elsewhere = fleet.devices.get(uuid)
    if elsewhere is not None and elsewhere.host != host.name:
        if _reports(fleet, elsewhere.host, host):
            others[uuid] = elsewhere.host
            return None
        _remove_device(fleet, elsewhere, host)
    device = fleet.devices[uuid] = Device(uuid, host.name)
    device.hold(dict(fleet.on_device.get(uuid, ())))
    placed(fleet, host.name, uuid)
    return device


def _reports(fleet: Fleet, name: str, claimant: Host) -> bool:
    """True if a host was heard recently enough to keep its devices, which the host `claimant` lists, too.

    False in a fleet without samples, where nothing becomes stale, and for a host whose agent has left in order.
    """
    host = fleet.hosts.get(name)
    if host is None or math.isinf(fleet.stale_after) or (host.left and host.left == host.agent):
        return False
    return fleet.now - host.heard_at <= _patience(fleet, host, claimant)


def _patience(fleet: Fleet, host: Host, claimant: Host) -> float:
    """Seconds for which a host may be silent before `claimant` gets its devices; fewer for names of one machine."""
    return fleet.stale_after if host.machine_ids & claimant.machine_ids else REPORTS_SECONDS


def _remove_device(fleet: Fleet, device: Device, to: Host) -> None:
    """Take a device from its host: the board was moved, or its host has another name now.

    A host that has no devices and no leases left, and is an old name of the other or has left, is forgotten.
    """
    host = fleet.hosts.get(device.host)
    if host is not None:
        host.devices = [other for other in host.devices if other is not device]
        host.topology = None
        host.batch_devices = None
        renamed = host.left or host.machine_ids & to.machine_ids
        if renamed and not host.devices and host.name not in fleet.at_host:
            _host_forgotten(fleet, HostForgotten(host.name))
            return
        count_idle(fleet, host)
        block(fleet, host)
        refresh(fleet, host)


def _samples(fleet: Fleet, event: SampleBatch) -> None:
    host = fleet.hosts.get(event.host)
    if host is None or host.sampled_at - REREAD_NS * 1e-9 <= fleet.at < host.sampled_at:
        return
    tick = last_tick(event)
    if tick is None:
        return
    host.sampled_at = fleet.at
    if host.batch_devices != event.devices:
        host.batch_devices = list(event.devices)
        mine = {device.uuid: device for device in host.devices}
        host.batch_order = [mine.get(uuid) for uuid in event.devices]
    if event.agent != host.agent:
        host.agent, host.lag = event.agent, math.inf
        host.processes_ns = -1
    newest = max(tick.times_ns)
    if newest < host.newest_ns - CLOCK_STEP_NS:
        host.lag = math.inf  # its clock was set back: the lag that was learned no longer holds
    host.newest_ns = newest
    now = fleet.now
    gap = now - newest * 1e-9
    # A host's clock may differ from the NATS server's: the lag is the least delay of a message so far. It rises slowly,
    # so that it adapts after the clock was set back.
    host.lag = gap if gap < host.lag else host.lag + (gap - host.lag) * 0.02
    host.heard_at = now
    known = now - host.processes_at <= PROCESSES_KNOWN_SECONDS
    dirty = unblock = resized = False
    for at, device in enumerate(host.batch_order):
        if device is None:
            continue
        changed, sized = device.sample(tick, at, host.lag, now, known)
        dirty = dirty or changed
        resized = resized or sized
        unblock = unblock or device.blocked & STALE != 0
    if resized:
        count_idle(fleet, host)
        dirty = True
    if unblock:
        block(fleet, host)
        dirty = True
    if dirty:
        refresh(fleet, host)


def _processes(fleet: Fleet, event: ProcessBatch) -> None:
    host = fleet.hosts.get(event.host)
    stored_ns = told_ns(fleet.stored_at, event.time_ns)
    if host is None or is_past(stored_ns, host.processes_ns):
        return
    host.processes_ns = stored_ns
    host.processes_at = host.heard_at = fleet.now
    by_device: dict[str, list[Listed]] = {}
    for process in event.processes:
        service = is_system_process(process.name, process.kind)
        # If processes can't be identified, memory of a lease's work must not count as foreign.
        lease, memory = (process.lease, process.memory_used_bytes) if event.identified else (UNIDENTIFIED, None)
        by_device.setdefault(process.device, []).append(Listed(lease, memory, service))
    unreadable = frozenset(event.unreadable)
    read_at = min(event.time_ns * 1e-9 + host.lag, fleet.now) if host.lag < math.inf else fleet.now
    dirty = False
    for device in host.devices:
        found = by_device.get(device.uuid, [])
        readable = event.identified and device.uuid not in unreadable
        if device.shared_by > 1:
            together = sharing_memory(fleet, device)
            found = [process for other in together for process in by_device.get(other.uuid, ())]
            readable = event.identified and not any(other.uuid in unreadable for other in together)
        if device.processes(found, read_at, readable):
            dirty = True
    if dirty:
        refresh(fleet, host)


def _device_event(fleet: Fleet, event: DeviceEvent) -> None:
    if event.severity in (Severity.INFO, Severity.APPLICATION):
        return
    device = None
    if event.device is not None:
        device = fleet.devices.get(event.device)
        if device is None:
            _early(fleet, event, event.device)
            return
        if device.host != event.host:  # a host reports events of its own devices alone
            return
    key = f"host:{event.host}" if device is None else f"device:{device.uuid}"
    fault = fleet.faults.get(key) or Fault()
    changed = fault.after(replace(event, time_ns=told_ns(fleet.stored_at, event.time_ns)))
    if changed == fault:
        return
    fleet.faults[key] = changed
    host = fleet.hosts.get(event.host)
    if host is not None:
        block(fleet, host)
        refresh(fleet, host)


def _early(fleet: Fleet, event: DeviceEvent, uuid: str) -> None:
    """Remember an event of a device that no inventory has named yet, for when its host lists it."""
    key = (event.host, uuid)
    fault = fleet.early.get(key) or fleet.gone.get(uuid) or fleet.faults.get(f"device:{uuid}") or Fault()
    remember(fleet.early, key, fault.after(replace(event, time_ns=told_ns(fleet.stored_at, event.time_ns))))


def _lease(fleet: Fleet, event: Lease) -> None:
    if event.state is LeaseState.ACTIVE:
        held = fleet.leases.get(event.lease_id)
        if held is None:  # a renewal moves nothing but the time
            hold(fleet, event.lease_id, event.grants, event.granted_at.timestamp())
    else:
        free(fleet, event.lease_id, event.state, None if event.ended_at is None else event.ended_at.timestamp())


def _lease_event(fleet: Fleet, event: LeaseEvent) -> None:
    _lease(fleet, event.lease)


def _lease_ended(fleet: Fleet, event: LeaseEnded) -> None:
    free(fleet, event.lease_id)


def _drains(fleet: Fleet, event: Drains) -> None:
    changed = fleet.drains.keys() ^ event.drains.keys()
    fleet.drains = dict(event.drains)
    names: set[str] = set()
    for key in changed:
        kind, _, rest = key.partition(":")
        if kind == "host":
            names.add(rest)
        elif kind == "device" and rest in fleet.devices:
            names.add(fleet.devices[rest].host)
        elif kind == "label":
            for name, host in fleet.hosts.items():
                if any(f"{label}={value}" == rest for label, value in host.labels.items()):
                    names.add(name)
    for name in sorted(names & fleet.hosts.keys()):
        host = fleet.hosts[name]
        block(fleet, host)
        refresh(fleet, host)


def _booked(fleet: Fleet, event: Booked) -> None:
    fleet.bookings = event.bookings
    rebook(fleet)


def _host_lost(fleet: Fleet, event: HostLost) -> None:
    fleet.lost_hosts.add(event.host)
    _set_lost(fleet, event.host, True)


def _host_seen(fleet: Fleet, event: HostSeen) -> None:
    fleet.lost_hosts.discard(event.host)
    _set_lost(fleet, event.host, False)


def _runner_seen(fleet: Fleet, event: RunnerSeen) -> None:
    fleet.runners.add(event.host)
    fleet.unready_runners.pop(event.host, None)
    _relabel(fleet, event.host)


def _runner_unready(fleet: Fleet, event: RunnerUnready) -> None:
    fleet.runners.discard(event.host)
    fleet.unready_runners[event.host] = event.reason
    _relabel(fleet, event.host)


def _runner_gone(fleet: Fleet, event: RunnerGone) -> None:
    fleet.runners.discard(event.host)
    fleet.unready_runners.pop(event.host, None)
    _relabel(fleet, event.host)


def _relabel(fleet: Fleet, name: str) -> None:
    host = fleet.hosts.get(name)
    if host is not None:
        host.labels = _labels(fleet, name, host.labels)
        fleet.shape_version += 1


def _set_lost(fleet: Fleet, name: str, lost: bool) -> None:
    host = fleet.hosts.get(name)
    if host is not None and host.lost != lost:
        host.lost = lost
        block(fleet, host)
        refresh(fleet, host)


def _clock_set(fleet: Fleet, event: ClockSet) -> None:
    by, by_ns = event.seconds, int(event.seconds * 1e9)
    # A query may have advanced the time by the new clock already.
    fleet.now = min(fleet.now + by, event.now)
    fleet.move_timers(by)
    _move_faults(fleet.faults, by)
    _move_faults(fleet.early, by)
    _move_faults(fleet.gone, by)
    for host in fleet.hosts.values():
        host.heard_at += by
        host.sampled_at += by
        host.processes_at += by
        host.lag += by
        host.inventory_ns += by_ns if host.inventory_ns >= 0 else 0
        host.processes_ns += by_ns if host.processes_ns >= 0 else 0
        for device in host.devices:
            device.seen_at += by
            device.load_seen_at += by
            device.occupancy.clock_set(by)
        host.timer = math.inf
        block(fleet, host)
        refresh(fleet, host)
    if fleet.bookings:
        rebook(fleet)


def _move_faults(faults: dict[K, Fault], seconds: float) -> None:
    for key, fault in faults.items():
        at = fault.time_ns + int(seconds * 1e9)
        faults[key] = replace(fault, time_ns=at, warned_at=fault.warned_at + seconds)


def _host_forgotten(fleet: Fleet, event: HostForgotten) -> None:
    host = fleet.hosts.pop(event.host, None)
    fleet.lost_hosts.discard(event.host)
    fleet.faults.pop(f"host:{event.host}", None)
    if host is None:
        return
    for device in host.devices:
        if fleet.devices.get(device.uuid) is device:
            del fleet.devices[device.uuid]
            part_gone(fleet, device.uuid)
        fleet.faults.pop(f"device:{device.uuid}", None)
    uncount_idle(fleet, host)
    fleet.index.move(host.name, host.group, None)
    fleet.shape_version += 1


FOLDS: Final[dict[type, Callable[[Fleet, Any], None]]] = {
    Inventory: _inventory,
    SampleBatch: _samples,
    ProcessBatch: _processes,
    DeviceEvent: _device_event,
    Lease: _lease,
    LeaseEvent: _lease_event,
    LeaseEnded: _lease_ended,
    Drains: _drains,
    Booked: _booked,
    HostLost: _host_lost,
    HostSeen: _host_seen,
    RunnerSeen: _runner_seen,
    RunnerUnready: _runner_unready,
    RunnerGone: _runner_gone,
    HostForgotten: _host_forgotten,
    ClockSet: _clock_set,
}
