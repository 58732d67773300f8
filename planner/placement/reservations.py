"""Choice of the devices to reserve for a request that was queued for long: those that can serve it soonest, no more.

A pure function of the fleet, with the reservations of the requests ahead applied. A device is eligible if the request
could take it once leases have ended: model, vendor, capability, memory, share, health, drains and the host's cores and
RAM are checked as in `feasible`. Devices that need the fewest leases to end come first, then those that were reserved
before, then those whose leases end first. A request that could not be served even so gets no reservation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Set
from typing import Final, NamedTuple

from ...schemas.requests import Placement
from ..fleet.device import Device
from ..fleet.fleet import Fleet, Host
from ..fleet.reservation import Reservation
from ..fleet.state import UNLIMITED, WHOLE_SHARE, Ask, HostState
from .capacity import allowed
from .feasible import PART_SLACK_BYTES, candidates, capacity, device_verdict

HOSTS_COMPARED: Final = 64
"""Limit on the hosts that are compared for a request; the others are equal or need more leases to end."""

Ends = Callable[[str], float]
"""Returns the end of a lease unless it is renewed, seconds since the epoch; infinity if not known."""


class _Unit(NamedTuple):
    """One device that the request could take, and the leases that must end first."""

    device: Device
    leases: tuple[str, ...]
    ends: float
    other: bool
    """True if it was not reserved for the request before."""

    @property
    def order(self) -> tuple[bool, bool, float, int]:
        return bool(self.leases), self.other, self.ends, self.device.index


class _Offer(NamedTuple):
    """Devices of one host for a request, or for a part of it."""

    busy: int
    other: bool
    ends: float
    name: str
    units: tuple[_Unit, ...]
    part: Ask

    @property
    def order(self) -> tuple[int, bool, float, str]:
        return self.busy, self.other, self.ends, self.name


def choose(fleet: Fleet, ask: Ask, owner: str, ends: Ends, before: Reservation | None = None) -> Reservation | None:
    """Choose the reservation for a queued request.

    Args:
        fleet: with the reservations of the requests ahead applied.
        ask: the request.
        owner: of the request.
        ends: returns the end of a lease.
        before: its present reservation, which is not applied to the fleet: it is preferred among equals.

    Returns:
        The reservation; None if there would be no room even after leases have ended.
    """
    look = _Look(fleet, ask, ends, before)
    if ask.placement is Placement.SPREAD:
        offers = look.spread()
    else:
        one = look.one_host()
        offers = None if one is None else [one]
        if ask.placement is Placement.FEWEST_HOSTS and (one is None or one.busy):
            several = look.several()
            if one is None or (several is not None and sum(offer.busy for offer in several) < one.busy):
                offers = several
    return None if offers is None else _reservation(owner, ask, offers)


def holds(fleet: Fleet, ask: Ask, reservation: Reservation) -> bool:
    """True if a reservation, which is not applied to the fleet, could still serve its request."""
    inside = {host.name for host in allowed(fleet, ask)} if ask.filtered else None
    for name, cpus, memory in reservation.hosts:
        host = fleet.hosts.get(name)
        if host is None or host.blocked or (inside is not None and name not in inside):
            return False
        if not _enough(fleet, host, cpus, memory):
            return False
    for uuid, _, _ in reservation.devices:
        device = fleet.devices.get(uuid)
        if device is None or not _takes(fleet, device, ask):
            return False
    return True


def _reservation(owner: str, ask: Ask, offers: Iterable[_Offer]) -> Reservation:
    devices: list[tuple[str, int, int]] = []
    hosts: list[tuple[str, int, int]] = []
    busy = 0
    for offer in offers:
        devices += [(unit.device.uuid, ask.share, _memory(unit.device, ask)) for unit in offer.units]
        hosts.append((offer.name, offer.part.cpus_milli, offer.part.host_memory_bytes))
        busy += offer.busy
    return Reservation(owner, tuple(devices), tuple(hosts), busy)


class _Look:
    """One search over the hosts, for one request."""

    def __init__(self, fleet: Fleet, ask: Ask, ends: Ends, before: Reservation | None) -> None:
        self.fleet = fleet
        self.ask = ask
        self.ends = ends
        self.kept_devices = frozenset(uuid for uuid, _, _ in before.devices) if before is not None else frozenset()
        self.kept_hosts = frozenset(name for name, _, _ in before.hosts) if before is not None else frozenset()

    def one_host(self) -> _Offer | None:
        """The host that could take all of the request soonest; None if none could."""
        best: _Offer | None = None
        compared = 0
        for least, name in self._hosts(self.ask):
            if best is not None and (least > best.busy or compared >= HOSTS_COMPARED):
                break
            offer = self._offer(self.fleet.hosts[name], self.ask)
            if offer is not None:
                compared += 1
                if best is None or offer.order < best.order:
                    best = offer
        return best

    def spread(self) -> list[_Offer] | None:
        """The hosts that could take one device each soonest; None if there are too few."""
        part, wanted = self.ask.part(1), self.ask.gpus
        found: list[_Offer] = []
        for least, name in self._hosts(part):
            if len(found) >= wanted + HOSTS_COMPARED or (least and sum(not offer.busy for offer in found) >= wanted):
                break
            offer = self._offer(self.fleet.hosts[name], part)
            if offer is not None:
                found.append(offer)
        found.sort(key=lambda offer: offer.order)
        return found[:wanted] if len(found) >= wanted else None

    def several(self) -> list[_Offer] | None:
        """Hosts that could take all of the request together soonest, preferably few; None if they can't."""
        wanted = self.ask.gpus
        steps: list[tuple[int, bool, int, str, int, _Offer]] = []
        idle = compared = 0
        for _, name in self._hosts(self.ask.part(1), by_room=True):
            if idle >= wanted or (compared >= HOSTS_COMPARED and len(steps) >= wanted):
                break
            mine = self._steps(self.fleet.hosts[name])
            compared += bool(mine)
            free = sum(not cost for cost, _ in mine)
            idle += free
            for number, (cost, offer) in enumerate(mine):
                steps.append((cost, offer.other, -free, name, number, offer))
        if len(steps) < wanted:
            return None
        # The steps of a host never cost less than those before, so its last taken step includes all before it.
        taken = sorted(steps, key=lambda step: step[:5])[:wanted]
        return list({step[3]: step[5] for step in taken}.values())

    def _steps(self, host: Host) -> list[tuple[int, _Offer]]:
        """For each further device on a host: its cost in leases that must end, and the offer of all devices so far."""
        found: list[tuple[int, _Offer]] = []
        units = self._units(host)
        cost = before = 0
        for count in range(1, min(len(units), self.ask.gpus) + 1):
            offer = self._offer(host, self.ask.part(count), units)
            if offer is None:
                break
            cost = max(cost, offer.busy - before)
            before = offer.busy
            found.append((cost, offer))
        return found

    def _hosts(self, part: Ask, by_room: bool = False) -> list[tuple[int, str]]:
        """Hosts that could ever take a part of the request, sorted by a lower bound on the leases that must end there.

        Args:
            part: of the request that one host takes.
            by_room: sort by most usable devices instead.
        """
        fleet = self.fleet
        bounds: dict[HostState, int] = {}
        able: dict[HostState, bool] = {}
        found: list[tuple[int, str]] = []
        for host in allowed(fleet, self.ask) if self.ask.filtered else fleet.hosts.values():
            state, idle = host.state, host.idle
            if state.blocked or idle is None:
                continue
            fits = able.get(idle)
            if fits is None:
                fits = able[idle] = _could_hold(idle, part)
            if not fits:
                continue
            least = bounds.get(state)
            if least is None:
                usable = len(candidates(state, part))
                short = state.cpus_free < part.cpus_milli or state.memory_free < part.host_memory_bytes
                least = bounds[state] = -usable if by_room else max(part.gpus - usable, int(short))
            found.append((least, host.name))
        found.sort(key=lambda entry: (entry[0], entry[1] not in self.kept_hosts, entry[1]))
        return found

    def _units(self, host: Host) -> list[_Unit]:
        units = [unit for device in host.devices if (unit := self._unit(device)) is not None]
        units.sort(key=lambda unit: unit.order)
        return units

    def _offer(self, host: Host, part: Ask, units: list[_Unit] | None = None) -> _Offer | None:
        if part.gpus:
            units = self._units(host) if units is None else units
            if len(units) < part.gpus:
                return None
            units = units[: part.gpus]
        else:
            units = []
        leaving = {lease for unit in units for lease in unit.leases}
        more = self._until_enough(host, part, leaving)
        if more is None:
            return None
        return _Offer(
            busy=sum(bool(unit.leases) for unit in units) + len(more),
            other=host.name not in self.kept_hosts,
            ends=max(map(self.ends, (*leaving, *more)), default=-math.inf),
            name=host.name,
            units=tuple(units),
            part=part,
        )

    def _unit(self, device: Device) -> _Unit | None:
        fleet, ask = self.fleet, self.ask
        if not _takes(fleet, device, ask):
            return None
        leases: tuple[str, ...] = ()
        if device.holders:
            leases = tuple(device.holders) if ask.whole else self._until_share(device)
        ends = max(map(self.ends, leases), default=-math.inf)
        return _Unit(device, leases, ends, device.uuid not in self.kept_devices)

    def _until_share(self, device: Device) -> tuple[str, ...]:
        """The leases that must end until the requested share of a device is free, those first that end first."""
        ask, kept = self.ask, self.fleet.reserved.get(device.uuid)
        share, memory = device.share_left, device.memory_free
        if kept is not None:
            share, memory = share - kept.amount, memory - kept.memory
        wanted = _memory(device, ask)
        if not ask.gpu_memory_bytes:  # as `feasible.has_part` has it
            wanted -= min(PART_SLACK_BYTES, wanted // 8)
        found: list[str] = []
        for lease in sorted(device.holders, key=lambda lease: (self.ends(lease), lease)):
            if share >= ask.share and memory >= wanted:
                break
            found.append(lease)
            share += device.holders[lease][0]
            memory += device.holders[lease][1]
        return tuple(found)

    def _until_enough(self, host: Host, part: Ask, leaving: Set[str]) -> list[str] | None:
        """Leases that must end, beyond those `leaving`, until a host has the cores and RAM; None if it never has."""
        cpus, memory = part.cpus_milli, part.host_memory_bytes
        fleet, name = self.fleet, host.name
        if not _enough(fleet, host, cpus, memory):
            return None
        free = _free(fleet, host)
        held = {lease: fleet.leases[lease].hosts[name] for lease in fleet.at_host.get(name, ())}
        free_cpus = free[0] + sum(held[lease][0] for lease in leaving if lease in held)
        free_memory = free[1] + sum(held[lease][1] for lease in leaving if lease in held)
        more: list[str] = []
        if free_cpus >= cpus and free_memory >= memory:
            return more
        for lease in sorted(held, key=lambda lease: (self.ends(lease), lease)):
            frees = (free_cpus < cpus and held[lease][0]) or (free_memory < memory and held[lease][1])
            if lease in leaving or not frees:
                continue
            more.append(lease)
            free_cpus += held[lease][0]
            free_memory += held[lease][1]
            if free_cpus >= cpus and free_memory >= memory:
                return more
        return None


def _memory(device: Device, ask: Ask) -> int:
    """Bytes of a device's memory to reserve for a request; 0 for a whole device, which leaves nothing to count."""
    return 0 if ask.whole else ask.gpu_memory_bytes or device.memory_most * ask.share // WHOLE_SHARE


def _takes(fleet: Fleet, device: Device, ask: Ask) -> bool:
    """True if a request could take a device once its leases have ended."""
    kept = fleet.reserved.get(device.uuid) if fleet.reserved else None
    return not device.blocked and not device_verdict(device.without_leases(kept), ask)


def _could_hold(idle: HostState, part: Ask) -> bool:
    if not part.gpus:
        return idle.cpus_free >= part.cpus_milli and idle.memory_free >= part.host_memory_bytes
    return capacity(idle, part, len(candidates(idle, part))) >= part.gpus


def _most(fleet: Fleet, host: Host) -> tuple[int, int]:
    """Cores (thousandths) and RAM (bytes) of a host that are not reserved."""
    kept = fleet.reserved_hosts.get(host.name)
    cpus, memory = host.cpus_total, host.memory_total
    if kept is not None:
        cpus = cpus - kept.amount if cpus < UNLIMITED else cpus
        memory = memory - kept.memory if memory < UNLIMITED else memory
    return cpus, memory


def _free(fleet: Fleet, host: Host) -> tuple[int, int]:
    """Cores (thousandths) and RAM (bytes) of a host that are neither reserved nor held by leases."""
    cpus, memory = _most(fleet, host)
    return (
        cpus - host.cpus_held if cpus < UNLIMITED else cpus,
        memory - host.memory_held if memory < UNLIMITED else memory,
    )


def _enough(fleet: Fleet, host: Host, cpus: int, memory: int) -> bool:
    most = _most(fleet, host)
    return most[0] >= cpus and most[1] >= memory
