"""Reservations: when and where a waiting request could start, by the expected ends of running leases.

A `Horizon` has, for each host, the time from which it could give so many devices. It follows the fleet: only hosts that
changed are computed anew, so that a choice among thousands costs little. Cores and RAM are checked as hosts are chosen.

What a request could take counts as in `placement.feasible`: model, vendor, capability, memory, share, health, drains,
lost hosts, hosts and labels that it names, cores and RAM.

The rule for passing is that of EASY backfilling [1]: whoever is expected to end before a reservation starts may use
what it reserves meanwhile; whoever fits on other devices always may.

[1] D. Lifka: The ANL/IBM SP Scheduling System. JSSPP 1995.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence, Set
from heapq import heappop, heappush
from typing import Final, NamedTuple

from ...schemas.requests import Placement, WorkRequest
from ..fleet.bookings import free_from, lasts_of
from ..fleet.device import Device
from ..fleet.fleet import Fleet, Host
from ..fleet.reservation import Reservation
from ..fleet.state import WHOLE_SHARE, Ask, AskKey, HostState, Model
from ..placement.capacity import allowed
from ..placement.domains import values_of
from ..placement.feasible import PART_SLACK_BYTES, admitted, candidates, device_verdict, model_allowed
from .ends import Ends

Capacity = tuple[object, object]
"""A kind of capacity: a model of devices, or cores alone; and the hosts and labels that a request names, if any."""
HOSTS_COMPARED: Final = 64
"""Limit on the hosts that are compared for their cores and RAM, once one is found."""
_STATES_KEPT: Final = 4096
NOW: Final = -math.inf
"""Time of what is free already."""


class Plan(NamedTuple):
    """Devices on which a request could start, and the time.

    Attributes:
        reservation: devices, cores and RAM.
        starts_at: expected time, in seconds; `NOW` if all is free already.
    """

    reservation: Reservation
    starts_at: float


Unit = tuple[float, int, Device]
"""Time from which a device could be taken, its index, and the device."""
Step = tuple[float, str, int]
"""Time from which a host could hold so many devices of a request, its name, and their number."""


class Stay(NamedTuple):
    """Use that a request may make of booked devices, now and later.

    Attributes:
        lasts: time by which its lease can have ended, in seconds after its grant; infinite if it has no limit.
        windows: ids of the windows that are for its owner.
        later: false if only what it may use now counts, whenever leases end.
    """

    lasts: float = math.inf
    windows: frozenset[str] = frozenset()
    later: bool = True

    def available_at(self, booked: Device | Host, ask: Ask, at: float, now: float) -> float | None:
        """Time from which its lease could be on a booked device, or a booked host.

        Args:
            booked: the device, or host.
            ask: the request.
            at: time from which no other lease is in the way.
            now: seconds.

        Returns:
            The time; None if it may not use it now, and only that counts.
        """
        inside = admitted(booked, ask) if isinstance(booked, Device) else ask.ends_by <= booked.booked_from
        if not self.later:
            return at if inside else None
        if inside and at == NOW:
            return at
        return free_from(booked.bookings, max(at, now), self.lasts, self.windows)


ANYWHERE: Final = Stay()
PRESENT: Final = Stay(later=False)


def stay_of(fleet: Fleet, request: WorkRequest) -> Stay:
    """Use that a request may make of booked devices; the same for all while nothing is booked."""
    if not fleet.bookings:
        return ANYWHERE
    return Stay(lasts_of(request), fleet.bookings.admitted(request.owner))


def _soonest(unit: Unit) -> tuple[float, int]:
    return unit[:2]


class Releases:
    """For each host, the times from which its devices are whole and free, whatever the request.

    They are computed when asked for, and kept until something changes on the host. The horizons of requests for whole
    devices share them.

    Args:
        fleet: live state.
        ends: of the running leases.
    """

    def __init__(self, fleet: Fleet, ends: Ends) -> None:
        self._fleet = fleet
        self._ends = ends
        self._kept: dict[str, tuple[list[Unit], Model | None]] = {}
        self._moves = self._log = self._shape = -1

    def of(self, host: Host, ask: Ask) -> list[Unit]:
        """Devices of a host of the models that a request allows, soonest first."""
        self._catch_up()
        found = self._kept.get(host.name)
        if found is None:
            found = self._kept[host.name] = self._compute(host)
        units, model = found
        if model is None:
            return [unit for unit in units if model_allowed(unit[2].model, ask)]
        return units if model_allowed(model, ask) else []

    def _catch_up(self) -> None:
        index, ends, shape = self._fleet.index, self._ends, self._fleet.shape_version
        if self._moves == index.moved_end and self._log == ends.log_end and self._shape == shape:
            return
        if self._moves < index.moved_base or self._log < ends.base or self._shape != shape:
            self._kept.clear()
        else:
            for name in index.moved[self._moves - index.moved_base :]:
                self._kept.pop(name, None)
            for name in ends.log[self._log - ends.base :]:
                self._kept.pop(name, None)
        self._moves, self._log, self._shape = index.moved_end, ends.log_end, shape

    def _compute(self, host: Host) -> tuple[list[Unit], Model | None]:
        """The devices, and their model if they have the same."""
        running = self._ends.running
        found: list[Unit] = []
        for device in host.devices:
            if device.blocked or device.in_use:
                continue
            at = NOW
            for lease in device.holders:
                known = running.get(lease)
                at = max(at, math.inf if known is None else known.ends_at)
            found.append((at, device.index, device))
        found.sort(key=_soonest)
        models = {unit[2].model for unit in found}
        return found, models.pop() if len(models) == 1 else None


class Horizon:
    """For each host, the times from which its devices could be taken, whatever its cores and RAM.

    Requests that differ in their number of devices, cores, RAM or priority alone share one.

    Args:
        fleet: live state.
        ends: of the running leases.
        releases: of whole devices.
        ask: a request for one such device.
        stay: what booked devices it may use later.
    """

    def __init__(self, fleet: Fleet, ends: Ends, releases: Releases, ask: Ask, stay: Stay) -> None:
        self._fleet = fleet
        self._ends = ends
        self._releases = releases
        self._ask = ask
        self._stay = stay
        self._units: dict[str, list[Unit]] = {}
        self._steps: dict[int, list[Step]] = {}
        self._able: dict[HostState, bool] = {}
        self._takes: dict[tuple[object, ...], bool] = {}
        self._simple = ask.whole and ask.plain and not ask.gpu_memory_bytes
        self._moves = self._log = self._shape = -1

    def steps(self, count: int) -> list[Step]:
        """The times from which so many devices of each host could be taken together, soonest first."""
        self._catch_up()
        found = self._steps.get(count)
        if found is None:
            last = count - 1
            found = [(units[last][0], name, count) for name, units in self._units.items() if len(units) > last]
            found.sort()
            self._steps[count] = found
        return found

    def each(self) -> Iterator[Step]:
        """The times from which one device of each host could be taken, then two, and so on: all, soonest first."""
        further: list[Step] = []
        for first in self.steps(1):
            while further and further[0] < first:
                yield self._advance(further)
            yield first
            self._push(further, first)
        while further:
            yield self._advance(further)

    def _advance(self, further: list[Step]) -> Step:
        found = heappop(further)
        self._push(further, found)
        return found

    def _push(self, further: list[Step], step: Step) -> None:
        """Add the step after this one of the same host."""
        _, name, number = step
        units = self._units[name]
        if number < len(units):
            heappush(further, (units[number][0], name, number + 1))

    def soonest(self, host: str) -> list[Unit]:
        """Devices of a host that could be taken, soonest first."""
        self._catch_up()
        return self._units.get(host, [])

    def _catch_up(self) -> None:
        index, ends, fleet = self._fleet.index, self._ends, self._fleet
        behind = index.moved_end - self._moves + ends.log_end - self._log
        if not behind and self._shape == fleet.shape_version:
            return
        lost = self._moves < index.moved_base or self._log < ends.base
        relabelled = self._ask.filtered and self._shape != fleet.shape_version
        if lost or relabelled or behind > len(fleet.hosts):
            self._build()
        else:
            names = set(index.moved[self._moves - index.moved_base :])
            names.update(ends.log[self._log - ends.base :])
            for name in names:
                self._renew(name)
        self._moves, self._log, self._shape = index.moved_end, ends.log_end, fleet.shape_version

    def _build(self) -> None:
        fleet = self._fleet
        self._units, self._steps = {}, {}
        for host in allowed(fleet, self._ask) if self._ask.filtered else fleet.hosts.values():
            found = self._compute(host)
            if found:
                self._units[host.name] = found

    def _renew(self, name: str) -> None:
        host = self._fleet.hosts.get(name)
        inside = host is not None and (not self._ask.filtered or host in allowed(self._fleet, self._ask))
        found = self._compute(host) if inside and host is not None else []
        before = self._units.pop(name, [])
        if found:
            self._units[name] = found
        if found == before:
            return
        for count, steps in self._steps.items():
            old = before[count - 1][0] if len(before) >= count else None
            new = found[count - 1][0] if len(found) >= count else None
            if old == new:
                continue
            if old is not None:
                del steps[bisect_left(steps, (old, name, count))]
            if new is not None:
                insort(steps, (new, name, count))

    def _compute(self, host: Host) -> list[Unit]:
        idle = host.idle
        if idle is None or host.state.blocked:
            return []
        able = self._able.get(idle)
        if able is None:
            if len(self._able) >= _STATES_KEPT:
                self._able.clear()
            able = self._able[idle] = bool(candidates(idle, self._ask))
        return self._free_at(host) if able else []

    def _free_at(self, host: Host) -> list[Unit]:
        running, ask, simple = self._ends.running, self._ask, self._simple
        if simple and not (self._fleet.bookings and any(device.bookings for device in host.devices)):
            return self._releases.of(host, ask)
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
            if device.bookings:
                at = self._stay.available_at(device, self._ask, at, self._fleet.now)
                if at is None:
                    continue
            found.append((at, device.index, device))
        found.sort(key=_soonest)
        return found

    def _could_take(self, device: Device) -> bool:
        """True if a device could be taken once its leases have ended."""
        key = (device.model, device.memory_most, device.foreign, device.in_use != "")
        found = self._takes.get(key)
        if found is None:
            if len(self._takes) >= _STATES_KEPT:
                self._takes.clear()
            found = self._takes[key] = not device_verdict(device.without_leases(None), self._ask)
        return found

    def _share_at(self, device: Device) -> float:
        ask = self._ask
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


def _roomy_at(fleet: Fleet, ends: Ends, host: Host, part: Ask) -> float:
    """Time from which a host has the cores and RAM for a part of a request; infinite if it never has."""
    if not part.cpus_milli and not part.host_memory_bytes:
        return NOW
    cpus, memory = host.unheld
    if cpus >= part.cpus_milli and memory >= part.host_memory_bytes:
        return NOW
    if host.cpus_total < part.cpus_milli or host.memory_total < part.host_memory_bytes:
        return math.inf
    held = fleet.at_host.get(host.name, {})
    for lease in sorted(held, key=lambda lease: (ends.ends_at(lease), lease)):
        amounts = fleet.leases[lease].hosts[host.name]
        cpus, memory = cpus + amounts[0], memory + amounts[1]
        if cpus >= part.cpus_milli and memory >= part.host_memory_bytes:
            return ends.ends_at(lease)
    return math.inf


class Horizons:
    """Choice of reservations.

    Args:
        fleet: live state.
        ends: of the running leases.
        most: limit on the horizons that are kept, those that were used last.
        stay: what requests may use of booked devices, unless a plan names other.
    """

    def __init__(self, fleet: Fleet, ends: Ends, most: int = 48, stay: Stay = ANYWHERE) -> None:
        self._fleet = fleet
        self._ends = ends
        self._most = most
        self._releases = Releases(fleet, ends)
        self._kept: dict[tuple[AskKey, Stay], Horizon] = {}
        self._stay = self._usual_stay = stay
        self._bookings = fleet.bookings_version

    def plan(
        self,
        ask: Ask,
        owner: str,
        without: Set[str] = frozenset(),
        before: Reservation | None = None,
        stay: Stay | None = None,
    ) -> Plan | None:
        """Choose where a request could start soonest; None if it never could.

        Args:
            ask: the request.
            owner: of the request.
            without: names of hosts that are reserved for others.
            before: its present reservation, which stays unless another place is free sooner.
            stay: what it may use of booked devices; None for that of all requests.
        """
        self._stay = self._usual_stay if stay is None else stay
        if not ask.gpus:
            chosen = self._cores_alone(ask, without)
        elif ask.placement is Placement.FEWEST_HOSTS:
            chosen = self._several(ask, without)
        else:
            part, wanted = (ask.part(1), ask.gpus) if ask.placement is Placement.SPREAD else (ask, 1)
            steps = self._horizon(part).steps(part.gpus)
            if ask.within:
                found = [self._on_each(each, part, wanted, without) for each in self._by_domain(ask, steps)]
                chosen = min(filter(None, found), key=_starts_at, default=[])
            else:
                chosen = self._on_each(steps, part, wanted, without)
        if not chosen:
            return None
        at = _starts_at(chosen)
        if before is not None and all(name not in without for name, _, _ in before.hosts):
            again = self._again(ask, before)
            if again is not None and again <= at:
                return Plan(before, again)
        return Plan(self._reservation(ask, chosen, owner, at), at)

    def hosts(self, ask: Ask) -> Iterator[tuple[str, list[Unit]]]:
        """Hosts that could take a request on one host, soonest first, each with its devices, those free soonest first.

        Args:
            ask: a request for devices of one host.
        """
        horizon = self._horizon(ask)
        for at, name, _ in horizon.steps(ask.gpus):
            host = self._fleet.hosts[name]
            if at < math.inf and _roomy_at(self._fleet, self._ends, host, ask) < math.inf:
                yield name, horizon.soonest(name)

    def _by_domain(self, ask: Ask, steps: Sequence[Step]) -> Iterable[list[Step]]:
        """Steps of the hosts of each domain of a request."""
        hosts = self._fleet.hosts
        found: dict[tuple[str, ...], list[Step]] = {}
        for step in steps:
            host = hosts[step[1]]
            if host.labels.keys() >= set(ask.within):
                found.setdefault(values_of(host, ask), []).append(step)
        return found.values()

    def _on_each(self, steps: Sequence[Step], part: Ask, wanted: int, without: Set[str]) -> list[Step]:
        """The hosts that could take a part of a request each soonest.

        Several are chosen just in time: of all that could by the time when enough can, those that could last, so that
        what is idle until then is of use to others.

        Args:
            steps: of the hosts to choose from, soonest first.
            part: of the request.
            wanted: number of hosts.
            without: names of hosts that are reserved for others.
        """
        fleet, ends, hosts = self._fleet, self._ends, self._fleet.hosts
        needy = part.cpus_milli or part.host_memory_bytes
        found: list[Step] = []
        compared = 0
        for free_at, name, devices in steps:
            if len(found) >= wanted and (free_at > found[wanted - 1][0] or compared >= HOSTS_COMPARED):
                break
            if name in without:
                continue
            compared += len(found) >= wanted
            at = max(free_at, _roomy_at(fleet, ends, hosts[name], part)) if needy else free_at
            if at < math.inf or free_at == math.inf:
                insort(found, (at, name, devices))
        if len(found) < wanted:
            return []
        by = found[wanted - 1][0]
        able = [step for step in found if step[0] <= by]
        return able[-wanted:] if wanted > 1 else able[:1]

    def _several(self, ask: Ask, without: Set[str]) -> list[Step]:
        """Hosts that could take a request together soonest, with as many devices on each as it takes there.

        Of several domains that which could first.
        """
        fleet, ends, hosts = self._fleet, self._ends, self._fleet.hosts
        choices: dict[tuple[str, ...], dict[str, Step]] = {}
        full: set[str] = set()
        left: dict[tuple[str, ...], int] = {}
        best: list[Step] = []
        needy = ask.cpus_milli or ask.host_memory_bytes
        for free_at, name, devices in self._horizon(ask).each():
            if best and free_at >= _starts_at(best):
                break
            if name in without or name in full:
                continue
            domain = values_of(hosts[name], ask) if ask.within else ()
            if left.get(domain) == 0:
                continue
            at = max(free_at, _roomy_at(fleet, ends, hosts[name], ask.part(devices))) if needy else free_at
            if at == math.inf and free_at < math.inf:
                full.add(name)
                continue
            chosen = choices.setdefault(domain, {})
            chosen[name] = (at, name, devices)
            left[domain] = left.get(domain, ask.gpus) - 1
            if not left[domain]:
                done = list(chosen.values())
                if not needy or not ask.within:
                    return done
                best = min(best or done, done, key=_starts_at)
        return best

    def _cores_alone(self, ask: Ask, without: Set[str]) -> list[Step]:
        fleet = self._fleet
        best: Step | None = None
        for host in allowed(fleet, ask) if ask.filtered else fleet.hosts.values():
            if host.name in without or host.state.blocked:
                continue
            at = _roomy_at(fleet, self._ends, host, ask)
            if host.bookings:
                at = self._stay.available_at(host, ask, at, fleet.now)
                if at is None:
                    continue
            if at < math.inf and (best is None or (at, host.name) < best[:2]):
                best = (at, host.name, 0)
        return [] if best is None else [best]

    def _again(self, ask: Ask, reservation: Reservation) -> float | None:
        """Expected start on what is reserved already; None if it could not be used any more."""
        fleet = self._fleet
        counts: dict[str, set[str]] = {name: set() for name, _, _ in reservation.hosts}
        for uuid, _, _ in reservation.devices:
            device = fleet.devices.get(uuid)
            if device is None or device.host not in counts:
                return None
            counts[device.host].add(uuid)
        known = [fleet.hosts[name] for name in counts if name in fleet.hosts]
        if ask.within and len({tuple(map(host.labels.get, ask.within)) for host in known}) != 1:
            return None
        at = NOW
        for name, uuids in counts.items():
            host = fleet.hosts.get(name)
            if host is None or host.state.blocked:
                return None
            part = ask if ask.placement is Placement.SAME_HOST else ask.part(len(uuids))
            if ask.placement is Placement.SPREAD:
                part = ask.part(1)
            if uuids:
                units = [unit for unit in self._horizon(part).soonest(name) if unit[2].uuid in uuids]
                if len(units) < len(uuids):
                    return None
                at = max(at, units[-1][0])
            at = max(at, _roomy_at(fleet, self._ends, host, part))
        return at

    def _horizon(self, ask: Ask) -> Horizon:
        if self._bookings != self._fleet.bookings_version:
            self._bookings = self._fleet.bookings_version
            self._kept.clear()
        # One device of such a request, whatever its host must have: all that says which devices are meant.
        key = (
            ask.key._replace(
                gpus=1, cpus_milli=0, host_memory_bytes=0, placement=Placement.SAME_HOST, prefer_within=""
            ),
            self._stay,
        )
        found = self._kept.pop(key, None)
        if found is None:
            if len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            found = Horizon(self._fleet, self._ends, self._releases, self._fleet.ask(key[0]), self._stay)
        self._kept[key] = found
        return found

    def _reservation(self, ask: Ask, chosen: Sequence[Step], owner: str, at: float) -> Reservation:
        devices: list[tuple[str, int, int]] = []
        hosts: list[tuple[str, int, int]] = []
        spread = ask.placement is Placement.SPREAD
        for _, name, number in chosen:
            part = ask.part(1) if spread else ask.part(number) if len(chosen) > 1 else ask
            if number:
                units = self._horizon(part).soonest(name)
                # Likewise of its devices: those that come free last, but by then.
                able = [unit for unit in units if unit[0] <= max(at, units[number - 1][0])]
                for _, _, device in able[-number:]:
                    devices.append((device.uuid, ask.share, memory_for(device, ask)))
            hosts.append((name, part.cpus_milli, part.host_memory_bytes))
        return Reservation(owner, tuple(devices), tuple(hosts))


def _starts_at(chosen: Sequence[Step]) -> float:
    return max(step[0] for step in chosen)


def could_take(fleet: Fleet, ask: Ask) -> frozenset[Capacity]:
    """Kinds of capacity that a request could take: models of devices, or cores alone; with the hosts that it names."""
    where = (ask.hosts, ask.host_labels, ask.within) if ask.filtered else None
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
