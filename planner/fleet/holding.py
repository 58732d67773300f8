"""What leases hold of devices and hosts, known ones or not, in whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from ...schemas.requests import Grant
from .standing import refresh
from .state import milli

if TYPE_CHECKING:
    from .fleet import Fleet


class Held(Struct):
    """What a lease holds, in whole numbers: device → (share, memory), host → (cores, RAM)."""

    lease_id: str
    devices: dict[str, tuple[int, int]]
    hosts: dict[str, tuple[int, int]]


def hold(fleet: Fleet, lease_id: str, grants: Sequence[Grant]) -> Fleet:
    """Take what a lease was granted. The same lease again replaces what it held."""
    if lease_id in fleet.leases:
        free(fleet, lease_id)
    held = Held(lease_id, {}, {})
    for grant in grants:
        if grant.device:
            share, memory = held.devices.get(grant.device, (0, 0))
            held.devices[grant.device] = (share + milli(grant.share), memory + grant.memory_bytes)
        cpus, ram = held.hosts.get(grant.host, (0, 0))
        held.hosts[grant.host] = (cpus + milli(grant.cpus), ram + grant.host_memory_bytes)
    fleet.leases[lease_id] = held
    for uuid, amounts in held.devices.items():
        fleet.on_device.setdefault(uuid, {})[lease_id] = amounts
    for name, (cpus, ram) in held.hosts.items():
        before = fleet.on_host.get(name, (0, 0))
        fleet.on_host[name] = (before[0] + cpus, before[1] + ram)
        fleet.at_host.setdefault(name, {})[lease_id] = None
    _touch(fleet, held)
    return fleet


def free(fleet: Fleet, lease_id: str) -> Fleet:
    """Give back what a lease held; nothing if it holds nothing."""
    held = fleet.leases.pop(lease_id, None)
    if held is None:
        return fleet
    for uuid in held.devices:
        holders = fleet.on_device[uuid]
        del holders[lease_id]
        if not holders:
            del fleet.on_device[uuid]
    for name, (cpus, ram) in held.hosts.items():
        # Several leases without cores or RAM share one entry of nothing.
        before = fleet.on_host.pop(name, (0, 0))
        after = (before[0] - cpus, before[1] - ram)
        if any(after):
            fleet.on_host[name] = after
        there = fleet.at_host[name]
        del there[lease_id]
        if not there:
            del fleet.at_host[name]
    _touch(fleet, held)
    return fleet


def _touch(fleet: Fleet, held: Held) -> None:
    names = set(held.hosts)
    for uuid in held.devices:
        device = fleet.devices.get(uuid)
        if device is not None:
            device.hold(fleet.on_device.get(uuid))
            names.add(device.host)
    for name in names:
        host = fleet.hosts.get(name)
        if host is not None:
            host.cpus_held, host.memory_held = fleet.on_host.get(name, (0, 0))
            refresh(fleet, host)
