"""Reservations: when and where a waiting request could start, by the expected ends of running leases.

A `Horizon` has, for each host, the time from which it could hold a request (or each further device of it). It follows
the fleet: only hosts that changed are computed anew, so that a choice among thousands costs little.

What a request could take counts as in `placement.feasible`: model, vendor, capability, memory, share, health, drains,
lost hosts, hosts and labels that it names, cores and RAM.

The rule for passing is that of EASY backfilling [1]: whoever is expected to end before a reservation starts may use
what it reserves meanwhile; whoever fits on other devices always may.

[1] D. Lifka: The ANL/IBM SP Scheduling System. JSSPP 1995.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Set
from typing import Final, NamedTuple

from ...schemas.requests import Placement
from ..fleet.device import Device
from ..fleet.fleet import Fleet, Host
from ..fleet.reservation import Reservation
from ..fleet.state import UNLIMITED, WHOLE_SHARE, Ask, HostState, Model
from ..placement.capacity import allowed
from ..placement.feasible import PART_SLACK_BYTES, candidates, capacity, device_verdict, model_allowed
from .ends import Ends

Capacity = tuple[object, object]
"""A kind of capacity: a model of devices, or cores alone; and the hosts and labels that a request names, if any."""
NOW: Final = -math.inf
"""Time of what is free already."""


class Plan(NamedTuple):
    """Where and when a request could start.

    Attributes:
        reservation: devices, cores and RAM.
        starts_at: expected time, in seconds; `NOW` if all is free already.
    """

    reservation: Reservation
    starts_at: float


class _Step(NamedTuple):
    """The time from which a host could hold so many devices of a request."""

    at: float
    host: str
    devices: int


Unit = tuple[float, int, Device]
"""Time from which a device could be taken, its index, and the device."""


def _soonest(unit: Unit) -> tuple[float, int]:
    return unit[:2]


class Horizon:
    """For each host, the times from which it could hold a request.

    Args:
        fleet: live state.
        ends: of the running leases.
        ask: the request, or its part on one host.
        each: true if each number of its devices is of interest, up to all; otherwise all of them on one host.
    """

    def __init__(self, fleet: Fleet, ends: Ends, ask: Ask, each: bool) -> None:
        self._fleet = fleet
        self._ends = ends
        self.ask = ask
        self.each = each
        self._steps: list[_Step] = []
        self._of: dict[str, list[_Step]] = {}
        self._units: dict[str, list[Unit]] = {}
        self._simple = ask.whole and ask.plain and not ask.gpu_memory_bytes
        self._able: dict[HostState, bool] = {}
        self._takes: dict[tuple[object, ...], bool] = {}
        self._moves = self._log = self._shape = -1

    def steps(self, without: Set[str]) -> Iterator[_Step]:
        """Steps of all hosts but some, soonest first; those of one host in order of their number of devices."""
        self._catch_up()
        for step in self._steps:
            if step.host not in without:
                yield step

    def _catch_up(self) -> None:
        index, ends, fleet = self._fleet.index, self._ends, self._fleet
        moved = index.moves_end - self._moves
        behind = moved + ends.log_end - self._log
        lost = self._moves < index.moves_base or self._log < ends.base
        relabelled = self.ask.filtered and self._shape != fleet.shape_version
        if lost or relabelled or behind > len(fleet.hosts):
            self._build()
        elif behind:
            names = set(index.moved[self._moves - index.moves_base :])
            names.update(ends.log[self._log - ends.base :])
            for name in names:
                self._renew(name)
        self._moves, self._log, self._shape = index.moves_end, ends.log_end, fleet.shape_version

    def _build(self) -> None:
        fleet = self._fleet
        self._of, self._units = {}, {}
        for host in allowed(fleet, self.ask) if self.ask.filtered else fleet.hosts.values():
            found = self._compute(host)
            if found:
                self._of[host.name] = found
        self._steps = sorted(step for steps in self._of.values() for step in steps)

    def _renew(self, name: str) -> None:
        steps = self._steps
        host = self._fleet.hosts.get(name)
        inside = host is not None and (not self.ask.filtered or any(host is other for other in self._allowed()))
        found = self._compute(host) if inside and host is not None else []
        before = self._of.pop(name, [])
        if found:
            self._of[name] = found
        if found == before:
            return
        for step in before:
            del steps[bisect_left(steps, step)]
        for step in found:
            insort(steps, step)

    def _allowed(self) -> list[Host]:
        return allowed(self._fleet, self.ask)

    def _compute(self, host: Host) -> list[_Step]:
        state, idle, ask = host.state, host.idle, self.ask
        if state.blocked or idle is None:
            return []
        part = ask.part(1) if self.each else ask
        able = self._able.get(idle)
        if able is None:
            able = self._able[idle] = _could_hold(idle, part)
        if not able:
            return []
        if not ask.gpus:
            return self._step(host, ask, NOW)
        units = self._units[host.name] = self._free_at(host)
        found: list[_Step] = []
        for count in range(1 if self.each else ask.gpus, min(len(units), ask.gpus) + 1):
            more = self._step(host, ask.part(count) if self.each else ask, units[count - 1][0])
            if not more:
                break
            found += more
        return found

    def _step(self, host: Host, part: Ask, devices_at: float) -> list[_Step]:
        at = devices_at
        if part.cpus_milli or part.host_memory_bytes:
            at = max(at, _enough_at(self._fleet, self._ends, host, part))
        # Without an expected end there is nothing to wait for: such a host may still be chosen after all others.
        return [_Step(at, host.name, part.gpus)] if at < math.inf or self._never_ends(host) else []

    def _never_ends(self, host: Host) -> bool:
        return bool(self._fleet.at_host.get(host.name))

    def devices(self, host: str, count: int) -> list[Device]:
        """The devices of a host that are free soonest; after `steps`."""
        return [unit[2] for unit in self._units[host][:count]]

    def _free_at(self, host: Host) -> list[Unit]:
        running, ask, simple = self._ends.running, self.ask, self._simple
        found: list[Unit] = []
        for device in host.devices:
            if device.blocked:
                continue
            if device.in_use or not model_allowed(device.model, ask) if simple else not self._could_take(device):
                continue
            at = NOW
            if not device.holders:
                pass
            elif not ask.whole:
                at = self._share_at(device)
            else:
                for lease in device.holders:
                    known = running.get(lease)
                    at = max(at, math.inf if known is None else known.ends_at)
            found.append((at, device.index, device))
        found.sort(key=_soonest)
        return found

    def _could_take(self, device: Device) -> bool:
        """True if the request could take a device once its leases have ended."""
        key = (device.model, device.memory_most, device.foreign, device.in_use != "")
        found = self._takes.get(key)
        if found is None:
            if len(self._takes) >= 4096:
                self._takes.clear()
            found = self._takes[key] = not device_verdict(device.without_leases(None), self.ask)
        return found

    def _share_at(self, device: Device) -> float:
        ask = self.ask
        share, memory, at = device.share_left, device.memory_free, NOW
        wanted = memory_for(device, ask)
        if not ask.gpu_memory_bytes:  # as `feasible.has_part` has it
            wanted -= min(PART_SLACK_BYTES, wanted // 8)
        for lease in sorted(device.holders, key=lambda lease: (self._ends.ends_at(lease), lease)):
            if share >= ask.share and memory >= wanted:
                break
            at = self._ends.ends_at(lease)
            share += device.holders[lease][0]
            memory += device.holders[lease][1]
        return at


def memory_for(device: Device, ask: Ask) -> int:
    """Bytes of a device's memory to reserve for a request; 0 for a whole device, which leaves nothing to count."""
    return 0 if ask.whole else ask.gpu_memory_bytes or device.memory_most * ask.share // WHOLE_SHARE


def _could_hold(idle: HostState, part: Ask) -> bool:
    if not part.gpus:
        return idle.cpus_free >= part.cpus_milli and idle.memory_free >= part.host_memory_bytes
    return capacity(idle, part, len(candidates(idle, part))) >= part.gpus


def _enough_at(fleet: Fleet, ends: Ends, host: Host, part: Ask) -> float:
    """Time from which a host has the cores and RAM for a part of a request."""
    cpus = host.cpus_total - host.cpus_held if host.cpus_total < UNLIMITED else UNLIMITED
    memory = host.memory_total - host.memory_held if host.memory_total < UNLIMITED else UNLIMITED
    if cpus >= part.cpus_milli and memory >= part.host_memory_bytes:
        return NOW
    held = fleet.at_host.get(host.name, {})
    for lease in sorted(held, key=lambda lease: (ends.ends_at(lease), lease)):
        amounts = fleet.leases[lease].hosts[host.name]
        cpus, memory = cpus + amounts[0], memory + amounts[1]
        if cpus >= part.cpus_milli and memory >= part.host_memory_bytes:
            return ends.ends_at(lease)
    return math.inf


class Horizons:
    """The horizons of the requests for which reservations were chosen recently.

    Args:
        fleet: live state.
        ends: of the running leases.
        most: limit on their number.
    """

    def __init__(self, fleet: Fleet, ends: Ends, most: int = 32) -> None:
        self._fleet = fleet
        self._ends = ends
        self._most = most
        self._kept: dict[Ask, Horizon] = {}

    def plan(self, ask: Ask, owner: str, without: Set[str] = frozenset()) -> Plan | None:
        """Choose where a request could start soonest; None if it never could.

        Args:
            ask: the request.
            owner: of the request.
            without: names of hosts that are reserved for others.
        """
        if ask.placement is Placement.SPREAD:
            part, wanted, each = ask.part(1), ask.gpus, False
        elif ask.placement is Placement.FEWEST_HOSTS:
            part, wanted, each = ask, ask.gpus, True
        else:
            part, wanted, each = ask, 1, False
        horizon = self._horizon(part, each)
        chosen: dict[str, int] = {}
        at, left = NOW, wanted
        for step in horizon.steps(without):
            chosen[step.host] = step.devices
            at = step.at
            left -= 1
            if not left:
                return Plan(self._reservation(horizon, chosen, owner), at)
        return None

    def _horizon(self, ask: Ask, each: bool) -> Horizon:
        found = self._kept.pop(ask, None)
        if found is None:
            if len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            found = Horizon(self._fleet, self._ends, ask, each)
        self._kept[ask] = found
        return found

    def _reservation(self, horizon: Horizon, chosen: dict[str, int], owner: str) -> Reservation:
        ask = horizon.ask
        devices: list[tuple[str, int, int]] = []
        hosts: list[tuple[str, int, int]] = []
        for name, count in chosen.items():
            part = ask.part(count) if horizon.each else ask
            if count:
                devices += [
                    (device.uuid, ask.share, memory_for(device, ask)) for device in horizon.devices(name, count)
                ]
            hosts.append((name, part.cpus_milli, part.host_memory_bytes))
        return Reservation(owner, tuple(devices), tuple(hosts))


def could_take(fleet: Fleet, ask: Ask) -> frozenset[Capacity]:
    """Kinds of capacity that a request could take: models of devices, or cores alone; with the hosts that it names."""
    where = (ask.hosts, ask.host_labels) if ask.filtered else None
    if not ask.gpus:
        return frozenset([("cores", where)])
    return frozenset((model, where) for model in _models(fleet) if model_allowed(model, ask))


def covered(kinds: frozenset[Capacity], by: Set[Capacity]) -> bool:
    """True if all kinds of capacity are among others; kinds of all hosts include those of named hosts."""
    return all(kind in by or (kind[0], None) in by for kind in kinds)


def _models(fleet: Fleet) -> frozenset[Model]:
    kept = fleet.cache.get("queue_models")
    if kept is None or kept[0] != fleet.shape_version:
        found = frozenset(device.model for device in fleet.devices.values())
        kept = fleet.cache.put("queue_models", (fleet.shape_version, found))
    return kept[1]
