"""Hosts that moves of leases could free: as a whole, or for a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ...schemas.requests import Placement
from ..fleet.fleet import Fleet, Host
from ..fleet.state import BLOCKS, MIG_PARENT, Ask
from ..placement.capacity import allowed
from ..placement.domains import domains
from ..placement.feasible import device_verdict, room
from ..placement.reject import WORDS
from .moves import Gone, Site


def whole_hosts(fleet: Fleet, hosts: Iterable[Host], takes: Mapping[str, float], going: Gone) -> list[Site]:
    """Hosts that would be free as a whole without leases, each for one unit.

    A host with devices that take no work, or that are in use without a lease, is not among them (`why_not_free`).

    Args:
        fleet: live state.
        hosts: to choose from.
        takes: prices of the leases that may be taken.
        going: leases that end anyway.
    """
    found: list[Site] = []
    for host in hosts:
        if not why_not_free(fleet, host, takes, going):
            held = _held(fleet, host) - going
            found.append(Site(host.name, tuple(sorted(held)), _whole(held)))
    return found


def why_not_free(fleet: Fleet, host: Host, takes: Mapping[str, float], going: Gone) -> str:
    """Reason why a host can't be freed as a whole; empty if it can. The arguments are those of `whole_hosts`."""
    if not host.devices:
        return "no devices"
    for device in host.devices:
        blocked = (device.blocked | host.state.blocked) & ~MIG_PARENT
        if blocked:
            return f"GPU {device.index} {WORDS[next(name for bit, name in BLOCKS.items() if blocked & bit)]}"
    stays = sorted(_held(fleet, host) - going - takes.keys())
    if stays:
        return f"{stays[0]} is not preemptible (yet)"
    used = next((device for device in host.devices if device.in_use), None)
    return "" if used is None else f"GPU {used.index} in use: {used.in_use}"


def _held(fleet: Fleet, host: Host) -> frozenset[str]:
    return frozenset(fleet.at_host.get(host.name, ())).union(*(device.holders for device in host.devices))


def _whole(held: frozenset[str]) -> Callable[[Gone], int]:
    def units(gone: Gone) -> int:
        return int(held <= gone)

    return units


def _none(_: Gone) -> int:
    return 0


def sites_for(fleet: Fleet, ask: Ask, takes: Mapping[str, float], going: Gone) -> list[tuple[list[Site], int]]:
    """Hosts that a request could have, and the units of them that it needs; several alternatives if it must stay
    within one domain.

    Args:
        fleet: live state.
        ask: the request.
        takes: prices of the leases that may be taken.
        going: leases that end anyway.
    """
    if ask.within:
        return [each for domain in domains(fleet, ask) for each in sites_for(fleet, domain.ask, takes, going)]
    several = ask.gpus > 0 and ask.placement is not Placement.SAME_HOST
    hosts = allowed(fleet, ask) if ask.filtered else fleet.hosts.values()
    return [([_site(fleet, host, ask, takes, going) for host in hosts], ask.gpus if several else 1)]


def _site(fleet: Fleet, host: Host, ask: Ask, takes: Mapping[str, float], going: Gone) -> Site:
    at_host = {*fleet.at_host.get(host.name, ()), *(lease for device in host.devices for lease in device.holders)}
    leases = tuple(sorted(lease for lease in at_host if lease in takes and lease not in going))
    every = going | set(leases)
    if host.state.blocked or (not ask.gpus and host.booked_from < ask.ends_by):
        return Site(host.name, leases, _none)
    devices = [device for device in host.devices if not device_verdict(device.without(every), ask)]
    amounts = {
        lease: fleet.leases[lease].hosts.get(host.name, (0, 0)) for lease in every & at_host if lease in fleet.leases
    }
    cpus, memory = host.unheld

    def units(gone: Gone) -> int:
        out = gone | going
        if ask.whole:
            usable = sum(device.holders.keys() <= out for device in devices)
        else:
            usable = sum(not device_verdict(device.without(out), ask) for device in devices)
        freed = [amounts[lease] for lease in amounts if lease in out]
        cpus_free = cpus + sum(each[0] for each in freed)
        memory_free = memory + sum(each[1] for each in freed)
        if ask.gpus and ask.placement is not Placement.SAME_HOST:
            held = room(cpus_free, memory_free, ask, usable)
            return min(1, held) if ask.placement is Placement.SPREAD else held
        return int(usable >= ask.gpus and cpus_free >= ask.cpus_milli and memory_free >= ask.host_memory_bytes)

    return Site(host.name, leases, units)
