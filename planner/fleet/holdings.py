"""Accounting of what leases hold of devices and hosts, also of unknown ones, in whole numbers.

A board and the MIG instances on it are the same hardware: a lease on one holds the other, as soon as both are known. A
lease on a board holds all instances into which it is split later, and a lease on an instance holds its board.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...schemas.requests import Grant, LeaseState
from .blocking import refresh
from .device import Amounts, Device
from .host import Host
from .known import Fleet, Held
from .state import WHOLE_SHARE, milli, share_of


def hold(fleet: Fleet, lease_id: str, grants: Sequence[Grant], granted_at: float = math.inf) -> Fleet:
    """Hold what a lease was granted. The same lease again replaces what it held.

    Args:
        fleet: changed in place.
        lease_id: of the lease.
        grants: of the lease.
        granted_at: time of the grant, seconds since the epoch; infinite if just now: no sample includes its use yet.
    """
    if lease_id in fleet.leases:
        forget(fleet, lease_id)
    held = Held(lease_id, {}, {})
    for grant in grants:
        if grant.device:
            share, memory = held.devices.get(grant.device, (0, 0))
            held.devices[grant.device] = (share + share_of(grant.share), memory + grant.memory_bytes)
            if grant.mig_parent:
                # Its host may have had another name when it was granted.
                known = fleet.devices.get(grant.mig_parent) or fleet.devices.get(grant.device)
                _part_of(fleet, grant.device, grant.mig_parent, grant.host if known is None else known.host)
        cpus, ram = held.hosts.get(grant.host, (0, 0))
        held.hosts[grant.host] = (cpus + milli(grant.cpus), ram + grant.host_memory_bytes)
    fleet.leases[lease_id] = held
    for uuid, amounts in held.devices.items():
        fleet.on_device.setdefault(uuid, {})[lease_id] = amounts
    for name, (cpus, ram) in held.hosts.items():
        before = fleet.on_host.get(name, (0, 0))
        fleet.on_host[name] = (before[0] + cpus, before[1] + ram)
        fleet.at_host.setdefault(name, {})[lease_id] = None
    touched = _touched(fleet, held)
    for device in touched:
        holders = fleet.on_device.get(device.uuid)
        if not fleet.parents and holders is not None and holders is device.holders:
            share, memory = holders[lease_id]
            device.add(lease_id, share, memory, granted_at)
        else:
            device.hold(*amounts_on(fleet, device), granted_at)
    _refresh(fleet, held, touched)
    return fleet


def free(fleet: Fleet, lease_id: str, ended: LeaseState = LeaseState.RELEASED, at: float | None = None) -> Fleet:
    """Free what a lease held, if anything.

    Args:
        fleet: changed in place.
        lease_id: of the lease.
        ended: the way it ended. Released devices are idle at once. Otherwise its processes may still be there, and the
            devices are in use until they are seen idle.
        at: time of the end, seconds since the epoch; None for the fleet's time.
    """
    held = _drop(fleet, lease_id)
    if held is None:
        return fleet
    doubt = ""
    if ended is not LeaseState.RELEASED:
        doubt = f"not seen idle since lease {lease_id} ended ({ended.value})"
    touched = _touched(fleet, held)
    ended_at = fleet.now if at is None else at
    for device in touched:
        holders = fleet.on_device.get(device.uuid)
        if not fleet.parents and (holders is device.holders if holders else not device.holders):
            device.remove(lease_id, held.devices[device.uuid][0], ended_at, doubt)
        else:
            device.end(lease_id, *amounts_on(fleet, device), ended_at, doubt)
    for uuid in held.devices if fleet.parents else ():
        part_gone(fleet, uuid)
    _refresh(fleet, held, touched)
    return fleet


def extend(fleet: Fleet, lease_id: str, grants: Sequence[Grant]) -> Fleet:
    """Hold the whole devices that a lease got since; what it has already stays as it is.

    Args:
        fleet: changed in place.
        lease_id: of a lease that the fleet holds.
        grants: all of the lease.
    """
    held = fleet.leases[lease_id]
    return _change(fleet, held, [grant for grant in grants if grant.device not in held.devices], 1, math.inf)


def give_back(fleet: Fleet, lease_id: str, grants: Sequence[Grant], at: float) -> Fleet:
    """Free some of the whole devices of a lease, which its holder has given back: they are idle at once.

    Args:
        fleet: changed in place.
        lease_id: of the lease; nothing happens if the fleet does not hold it.
        grants: those that it has no more.
        at: time of the change, seconds since the epoch.
    """
    held = fleet.leases.get(lease_id)
    if held is None:
        return fleet
    return _change(fleet, held, [grant for grant in grants if grant.device in held.devices], -1, at)


def _change(fleet: Fleet, held: Held, grants: Sequence[Grant], sign: int, at: float) -> Fleet:
    """Add whole devices to what a lease holds, or remove them, each with its part of cores and RAM."""
    part = Held(held.lease_id, {}, {})
    for grant in grants:
        share, memory = part.devices[grant.device] = (share_of(grant.share), grant.memory_bytes)
        cpus, ram = part.hosts.get(grant.host, (0, 0))
        part.hosts[grant.host] = (cpus + milli(grant.cpus), ram + grant.host_memory_bytes)
        holders = fleet.on_device.setdefault(grant.device, {})
        if sign > 0:
            held.devices[grant.device] = holders[held.lease_id] = (share, memory)
        else:
            del held.devices[grant.device], holders[held.lease_id]
            if not holders:
                del fleet.on_device[grant.device]
    for name, (cpus, ram) in part.hosts.items():
        for amounts in (held.hosts, fleet.on_host):
            before = amounts.get(name, (0, 0))
            amounts[name] = (before[0] + sign * cpus, before[1] + sign * ram)
        fleet.at_host.setdefault(name, {})[held.lease_id] = None
    left = {device.host for uuid in held.devices if (device := fleet.devices.get(uuid)) is not None}
    for name in part.hosts.keys() - left if sign < 0 else ():
        if not any(held.hosts[name]):
            del held.hosts[name], fleet.at_host[name][held.lease_id]
            if not fleet.at_host[name]:
                del fleet.at_host[name]
            if not any(fleet.on_host[name]):
                del fleet.on_host[name]
    touched = _touched(fleet, part)
    for device in touched:
        if sign > 0:
            device.hold(*amounts_on(fleet, device), at)
        else:
            device.end(held.lease_id, *amounts_on(fleet, device), at, "")
    _refresh(fleet, part, touched)
    return fleet


def forget(fleet: Fleet, lease_id: str) -> Fleet:
    """Remove what a lease holds, without an end of the lease: it is about to be set anew."""
    held = _drop(fleet, lease_id)
    if held is not None:
        touched = _touched(fleet, held)
        for device in touched:
            device.hold(*amounts_on(fleet, device))
        _refresh(fleet, held, touched)
    return fleet


def _drop(fleet: Fleet, lease_id: str) -> Held | None:
    held = fleet.leases.pop(lease_id, None)
    if held is None:
        return None
    for uuid in held.devices:
        holders = fleet.on_device[uuid]
        del holders[lease_id]
        if not holders:
            del fleet.on_device[uuid]
    for name, (cpus, ram) in held.hosts.items():
        # Several leases without cores or RAM share one entry of zeros.
        before = fleet.on_host.pop(name, (0, 0))
        after = (before[0] - cpus, before[1] - ram)
        if any(after):
            fleet.on_host[name] = after
        there = fleet.at_host[name]
        del there[lease_id]
        if not there:
            del fleet.at_host[name]
    return held


def amounts_on(fleet: Fleet, device: Device) -> tuple[Amounts, dict[str, int] | None]:
    """Amounts that leases hold of a device, by lease; and of its memory, through compute instances that share it."""
    if not fleet.parents:
        # Not a copy: a device that has this very one is told of one lease more or less alone.
        return fleet.on_device.get(device.uuid, {}), None
    own = dict(fleet.on_device.get(device.uuid, ()))
    for uuid in _same_hardware(fleet, device):
        for lease in fleet.on_device.get(uuid, ()):
            own[lease] = (WHOLE_SHARE, device.memory_total)
    beside: dict[str, int] = {}
    for other in sharing_memory(fleet, device):
        if other is not device:
            for lease, (_, memory) in fleet.on_device.get(other.uuid, {}).items():
                if lease not in own:
                    beside[lease] = beside.get(lease, 0) + memory
    return own, beside


def sharing_memory(fleet: Fleet, device: Device) -> list[Device]:
    """The compute instances of a device's GPU instance, itself included; empty if it does not share its memory."""
    info = device.info
    host = fleet.hosts.get(device.host)
    if info.mig_parent is None or info.mig_instance is None or host is None:
        return []
    found = [
        other
        for other in host.devices
        if other.info.mig_parent == info.mig_parent and other.info.mig_instance == info.mig_instance
    ]
    return found if len(found) > 1 else []


def relate(fleet: Fleet, host: Host) -> None:
    """Update which of a host's devices are instances of which boards, and what leases hold of them by that."""
    for device in host.devices:
        if device.info.mig_parent:
            _part_of(fleet, device.uuid, device.info.mig_parent, device.host)
    if not fleet.parents:
        return
    for device in host.devices:
        device.shared_by = max(1, len(sharing_memory(fleet, device)))
        holders, beside = amounts_on(fleet, device)
        if holders != device.holders or beside:
            device.hold(holders, beside)


def _part_of(fleet: Fleet, uuid: str, board: str, host: str) -> None:
    before = fleet.parents.get(uuid)
    if before != (board, host):
        if before is not None:
            fleet.children[before].pop(uuid, None)
        fleet.parents[uuid] = (board, host)
        fleet.children.setdefault((board, host), {})[uuid] = None


def part_gone(fleet: Fleet, uuid: str) -> None:
    """Forget the board of an instance that no longer exists, unless a lease is on it."""
    place = fleet.parents.get(uuid)
    if place is not None and uuid not in fleet.devices and uuid not in fleet.on_device:
        del fleet.parents[uuid]
        siblings = fleet.children[place]
        siblings.pop(uuid, None)
        if not siblings:
            del fleet.children[place]


def _same_hardware(fleet: Fleet, device: Device) -> list[str]:
    """Devices whose leases hold this device, too.

    For an instance these are its board, and instances on the board that no longer exist; for a board all its instances.
    Only devices of one host count: a host can't claim those of another.
    """
    place = fleet.parents.get(device.uuid)
    if place is None:
        return list(fleet.children.get((device.uuid, device.host), ()))
    board, host = place
    if host != device.host:
        return []
    gone = [uuid for uuid in fleet.children[place] if uuid != device.uuid and uuid not in fleet.devices]
    return [board, *gone]


def _touched(fleet: Fleet, held: Held) -> list[Device]:
    """The known devices that a lease holds, directly or as part of the same hardware."""
    if not fleet.parents:
        return [device for uuid in held.devices if (device := fleet.devices.get(uuid)) is not None]
    found: dict[str, Device] = {}
    for uuid in held.devices:
        device = fleet.devices.get(uuid)
        place = fleet.parents.get(uuid) or (uuid, device.host if device is not None else "")
        for other in (uuid, place[0], *fleet.children.get(place, ())):
            if other in fleet.devices:
                found[other] = fleet.devices[other]
    return list(found.values())


def _refresh(fleet: Fleet, held: Held, touched: Sequence[Device]) -> None:
    changed: dict[str, list[Device]] = {name: [] for name in held.hosts}
    for device in touched:
        changed.setdefault(device.host, []).append(device)
    for name, devices in changed.items():
        host = fleet.hosts.get(name)
        if host is not None:
            host.cpus_held, host.memory_held = fleet.on_host.get(name, (0, 0))
            refresh(fleet, host, devices)
