"""Hosts that moves of leases could free: as a whole, or for a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from ...schemas.requests import Placement
from ..fleet.device import Device
from ..fleet.fleet import Fleet, Host
from ..fleet.state import BLOCKS, MIG_PARENT, Ask
from ..placement.capacity import allowed
from ..placement.domains import domains
from ..placement.feasible import device_verdict, room
from ..placement.reject import WORDS
from .moves import Gone, Site

Spare = Mapping[str, int]
"""Number of devices that elastic leases may be asked to give back, by lease."""
_NO_SPARE: Final[Spare] = {}


def whole_hosts(
    fleet: Fleet, hosts: Iterable[Host], takes: Mapping[str, float], going: Gone, spare: Spare = _NO_SPARE
) -> list[Site]:
    """Hosts that would be free as a whole without leases, each for one unit.

    A host with devices that take no work, or that are in use without a lease, is not among them (`why_not_free`).

    Args:
        fleet: live state.
        hosts: to choose from.
        takes: prices of the leases that may be taken.
        going: leases that end anyway.
        spare: devices that elastic leases may be asked to give back.
    """
    found: list[Site] = []
    hosts = list(hosts)
    most = allotted(fleet, spare, (host.name for host in hosts), wholly=True)
    for host in hosts:
        if not why_not_free(fleet, host, takes, going, spare):
            held = _held(fleet, host) - going
            back = {lease: there for lease in held if (there := _there(fleet, lease, host.name, most))}
            if held <= takes.keys() | back.keys():
                found.append(Site(host.name, tuple(sorted(held & takes.keys())), _whole(held, back), back))
    return found


def why_not_free(fleet: Fleet, host: Host, takes: Mapping[str, float], going: Gone, spare: Spare = _NO_SPARE) -> str:
    """Reason why a host can't be freed as a whole; empty if it can. The arguments are those of `whole_hosts`."""
    if not host.devices:
        return "no devices"
    for device in host.devices:
        blocked = (device.blocked | host.state.blocked) & ~MIG_PARENT
        if blocked:
            return f"GPU {device.index} {WORDS[next(name for bit, name in BLOCKS.items() if blocked & bit)]}"
    rest = sorted(_held(fleet, host) - going - takes.keys())
    leaves = {lease for lease in rest if 0 < len(devices_on(fleet, lease, host.name)) <= spare.get(lease, 0)}
    stays = next((lease for lease in rest if lease not in leaves), None)
    if stays is not None:
        return f"{stays} is not preemptible (yet)"
    used = next((device for device in host.devices if device.in_use), None)
    return "" if used is None else f"GPU {used.index} in use: {used.in_use}"


def devices_on(fleet: Fleet, lease_id: str, host: str) -> list[str]:
    """Devices of a lease on a host, those that it got last first."""
    held = fleet.leases.get(lease_id)
    found = (fleet.devices.get(uuid) for uuid in reversed(held.devices if held is not None else {}))
    return [device.uuid for device in found if device is not None and device.host == host]


def allotted(fleet: Fleet, spare: Spare, hosts: Iterable[str], *, wholly: bool) -> dict[tuple[str, str], int]:
    """Number of devices of each host that each lease may give back, so that they are not too many together.

    Args:
        fleet: live state.
        spare: number of devices of each lease in all.
        hosts: names of the hosts.
        wholly: true if a lease has to leave a host; then those first on which it has few devices.
    """
    names = set(hosts)
    found: dict[tuple[str, str], int] = {}
    for lease, left in spare.items():
        there = Counter(
            device.host
            for uuid in (fleet.leases[lease].devices if lease in fleet.leases else ())
            if (device := fleet.devices.get(uuid)) is not None and device.host in names
        )
        for name, count in sorted(there.items(), key=lambda each: (each[1] if wholly else -each[1], each[0])):
            given = min(left, count)
            if given and (given == count or not wholly):
                found[lease, name] = given
                left -= given
    return found


def _there(fleet: Fleet, lease: str, host: str, most: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    return tuple(devices_on(fleet, lease, host)) if (lease, host) in most else ()


def _held(fleet: Fleet, host: Host) -> frozenset[str]:
    return frozenset(fleet.at_host.get(host.name, ())).union(*(device.holders for device in host.devices))


def _whole(held: frozenset[str], back: Mapping[str, tuple[str, ...]]) -> Callable[[Gone], int]:
    def units(gone: Gone) -> int:
        return int(all(lease in gone or (lease in back and set(back[lease]) <= gone) for lease in held))

    return units


def _none(_: Gone) -> int:
    return 0


def sites_for(
    fleet: Fleet, ask: Ask, takes: Mapping[str, float], going: Gone, spare: Spare = _NO_SPARE
) -> list[tuple[list[Site], int]]:
    """Hosts that a request could have, and the units of them that it needs; several alternatives if it must stay
    within one domain.

    Args:
        fleet: live state.
        ask: the request.
        takes: prices of the leases that may be taken.
        going: leases that end anyway.
        spare: devices that elastic leases may be asked to give back.
    """
    if ask.within:
        return [each for domain in domains(fleet, ask) for each in sites_for(fleet, domain.ask, takes, going, spare)]
    several = ask.gpus > 0 and ask.placement is not Placement.SAME_HOST
    hosts = list(allowed(fleet, ask) if ask.filtered else fleet.hosts.values())
    most = allotted(fleet, spare, (host.name for host in hosts), wholly=False) if several else {}

    def spare_on(host: Host) -> Spare:
        if several:
            return {lease: most[lease, host.name] for lease in spare if (lease, host.name) in most}
        return {lease: spare[lease] for lease in fleet.at_host.get(host.name, ()) if lease in spare}

    return [([_site(fleet, host, ask, takes, going, spare_on(host)) for host in hosts], ask.gpus if several else 1)]


def _site(fleet: Fleet, host: Host, ask: Ask, takes: Mapping[str, float], going: Gone, spare: Spare) -> Site:
    at_host = {*fleet.at_host.get(host.name, ()), *(lease for device in host.devices for lease in device.holders)}
    leases = tuple(sorted(lease for lease in at_host if lease in takes and lease not in going))
    shrinking = spare.keys() & at_host - going
    every = going | set(leases) | shrinking
    if host.state.blocked or (not ask.gpus and host.booked_from < ask.ends_by):
        return Site(host.name, leases, _none)
    devices = [device for device in host.devices if not device_verdict(device.without(every), ask)]
    able = {device.uuid for device in devices}
    there = {lease: devices_on(fleet, lease, host.name) for lease in shrinking}
    # Those first that the request could use; the others come with cores and RAM.
    back = {
        lease: tuple(sorted(uuids, key=lambda uuid: uuid not in able)[: spare[lease]])
        for lease, uuids in there.items()
        if uuids
    }
    amounts = {
        lease: fleet.leases[lease].hosts.get(host.name, (0, 0)) for lease in every & at_host if lease in fleet.leases
    }
    amounts = {lease: both for lease, both in amounts.items() if any(both)}
    held = [(device.uuid, frozenset(device.holders)) for device in devices]
    cpus, memory = host.unheld

    def units(gone: Gone) -> int:
        out = gone | going if going else gone
        if ask.whole:
            usable = sum(holders <= out or uuid in gone for uuid, holders in held)
        else:
            usable = sum(not device_verdict(device.without(_less(out, device, gone)), ask) for device in devices)
        cpus_free, memory_free = cpus, memory
        for lease, (cores, ram) in amounts.items():
            if lease in out:
                cpus_free, memory_free = cpus_free + cores, memory_free + ram
            elif lease in back and (given := sum(uuid in gone for uuid in back[lease])):
                cpus_free += cores * given // len(there[lease])
                memory_free += ram * given // len(there[lease])
        if ask.gpus and ask.placement is not Placement.SAME_HOST:
            fitting = room(cpus_free, memory_free, ask, usable)
            return min(1, fitting) if ask.placement is Placement.SPREAD else fitting
        return int(usable >= ask.gpus and cpus_free >= ask.cpus_milli and memory_free >= ask.host_memory_bytes)

    return Site(host.name, leases, units, back)


def _less(out: Gone, device: Device, gone: Gone) -> Gone:
    """Leases without which a device is as if some were out; all of it, if it was given back."""
    return out | device.holders.keys() if device.uuid in gone else out
