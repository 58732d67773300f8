"""Choice of the devices by which elastic leases grow and shrink.

An elastic lease grows into idle devices which no request in the queue could use: models that a waiting request could
use are left alone, unless quotas keep it from them. It is asked to give devices back, beyond its fewest, where a
waiting request could start with them. The leases are asked in the order in which the caller gives them; on the host, or
the hosts, where the fewest devices have to come back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from ...schemas.requests import Placement, WorkRequest
from ..fleet.device import Device
from ..fleet.fleet import Fleet
from ..fleet.state import Ask
from ..groups.state import models_of
from ..placement.capacity import allowed
from ..placement.decide import ask_of
from ..placement.exact import Pick
from ..placement.feasible import model_allowed
from ..placement.policies import Policy
from ..placement.select import select
from .backfill import NOW, PRESENT, Horizons, Unit
from .ends import Ends
from .line import Group


class Surplus(NamedTuple):
    """Devices that an elastic lease could give back.

    Attributes:
        lease_id: of the lease.
        devices: uuids of its devices, those first that it got last.
        spare: number of them that it can do without.
    """

    lease_id: str
    devices: Sequence[str]
    spare: int


def sized(request: WorkRequest, devices: int) -> WorkRequest:
    """An elastic request for a number of devices, with their part of cores and RAM."""
    return replace(
        request,
        gpus=devices,
        gpus_max=None,
        cpus=request.cpus * devices / request.gpus,
        host_memory_bytes=-(-request.host_memory_bytes * devices // request.gpus),
    )


def growth_ask(
    fleet: Fleet, request: WorkRequest, devices: int, barred: Collection[str], windows: tuple[str, ...] = ()
) -> Ask:
    """The ask for further devices of an elastic lease.

    Booked devices are left alone, unless the lease has ended before, or is in their window.

    Args:
        fleet: live state.
        request: of the lease; its `max_seconds` are those that are left.
        devices: number of further devices.
        barred: names of models that it must not take.
        windows: ids of the windows, of those that are now, whose devices it may have.
    """
    # A preemptible lease may be on booked devices until its notice; growth is not worth a notice.
    key = ask_of(fleet, replace(sized(request, devices), preemptible=False)).key
    outlasts = bool(windows) and key.outlasts
    return fleet.ask(key._replace(windows=windows, inside=False, outlasts=outlasts, barred=tuple(sorted(barred))))


def wanted(fleet: Fleet, groups: Iterable[Group]) -> frozenset[str] | None:
    """Models that requests in the queue could take; None if one waits for cores or RAM alone."""
    found: set[str] = set()
    for group in groups:
        if group.refused:
            continue
        if not group.ask.gpus:
            return None
        found.update(_models_there(fleet, group.ask) if group.ask.filtered else models_of(fleet, group.ask))
    return frozenset(found)


def _models_there(fleet: Fleet, ask: Ask) -> frozenset[str]:
    """Models that a request could take on the hosts that it names; cached until hosts or labels change."""
    key = ("models_there", ask)
    kept = fleet.cache.get(key)
    if kept is None or kept[0] != fleet.shape_version:
        there = {device.model for host in allowed(fleet, ask) for device in host.devices}
        names = frozenset(model.name for model in there if model_allowed(model, ask))
        kept = fleet.cache.put(key, (fleet.shape_version, names))
    return kept[1]


def largest(
    fleet: Fleet, policy: Policy, ask_for: Callable[[int], Ask | None], least: int, most: int
) -> tuple[int, list[Pick]] | None:
    """The largest number of devices for which there is a placement, and the placement; None if there is none.

    Args:
        fleet: live state.
        policy: that ranks.
        ask_for: returns the request for a number of devices; None if quotas keep it from so many.
        least: smallest number of devices.
        most: largest number.
    """
    found: tuple[int, list[Pick]] | None = None
    while least <= most:
        number = (least + most + 1) // 2 if found is not None else least
        ask = ask_for(number)
        picks = None if ask is None else select(fleet, policy, ask)
        if picks is None:
            most = number - 1
        else:
            found, least = (number, picks), number + 1
    return found


def returns(fleet: Fleet, ask: Ask, surpluses: Sequence[Surplus]) -> dict[str, list[str]] | None:
    """Choose devices of elastic leases with which a request could start.

    Args:
        fleet: live state.
        ask: a request that does not fit.
        surpluses: of the leases, those first that are asked first.

    Returns:
        UUIDs by lease; None if no choice lets it start, or none on one host for a request with `within`.
    """
    if not ask.gpus or not surpluses:
        return None
    search = _Returns(fleet, surpluses)
    if ask.placement is not Placement.SPREAD:
        one = search.on_one_host(ask)
        if one is not None or ask.placement is Placement.SAME_HOST:
            return one or None
    # Hosts that share the labels which its hosts have to share are not searched for.
    return None if ask.within else search.on_several(ask) or None


class _Returns:
    """Search for devices that could come back."""

    def __init__(self, fleet: Fleet, surpluses: Sequence[Surplus]) -> None:
        self._fleet = fleet
        self._ranks = Ends(fleet)
        self._spare = {each.lease_id: each.spare for each in surpluses}
        self._place = {uuid: at for each in surpluses for at, uuid in enumerate(each.devices)}
        for rank, each in enumerate(surpluses):
            self._ranks.expect(each.lease_id, float(rank))
        self._horizons = Horizons(fleet, self._ranks, stay=PRESENT)

    def on_one_host(self, ask: Ask) -> dict[str, list[str]] | None:
        best: tuple[int, float, dict[str, list[str]]] | None = None
        for name, units in self._horizons.hosts(ask):
            found = self._from(name, units, ask, ask.gpus, self._spare)
            if found is not None:
                back, last = found
                cost = sum(map(len, back.values())), last
                if best is None or cost < best[:2]:
                    best = (*cost, back)
        return None if best is None else best[2]

    def on_several(self, ask: Ask) -> dict[str, list[str]] | None:
        """As many devices on each host as are asked for there, or on a few hosts as many as there could be."""
        spread = ask.placement is Placement.SPREAD
        able: list[tuple[int, str, list[Unit]]] = []
        for name, units in self._horizons.hosts(ask.part(1)):
            count = ask.per_host if spread else min(ask.gpus, sum(unit[0] < math.inf for unit in units))
            back = sum(unit[0] > NOW for unit in units[:count])
            able.append((back if spread else -count, name, units))
        able.sort(key=lambda host: host[:2])
        left, spare = ask.devices, dict(self._spare)
        chosen: dict[str, list[str]] = {}
        for _, name, units in able:
            for count in (ask.per_host,) if spread else range(min(left, len(units)), 0, -1):
                part = ask.part(1 if spread else count)
                found = self._from(name, units, part, count, spare)
                if found is not None:
                    for lease_id, uuids in found[0].items():
                        chosen.setdefault(lease_id, []).extend(uuids)
                        spare[lease_id] -= len(uuids)
                    left -= count
                    break
            if not left:
                return chosen
        return None

    def _from(
        self, name: str, units: Sequence[Unit], part: Ask, count: int, spare: dict[str, int]
    ) -> tuple[dict[str, list[str]], float] | None:
        """Devices of a host that have to come back for a part of a request, and the rank of the last lease."""
        free = sum(at == NOW for at, _, _ in units)
        able = {device.uuid for at, _, device in units if NOW < at < math.inf}
        found: list[tuple[str, str]] = []
        for lease_id in sorted(self._fleet.at_host.get(name, {}).keys() & spare.keys(), key=self._ranks.ends_at):
            left = spare[lease_id]
            for uuid in self._on_host(lease_id, name, able):
                devices = free + sum(other in able for _, other in found)
                roomy = self._roomy(name, part, found)
                if not left or (devices >= count and roomy):
                    break
                if not roomy or (devices < count and uuid in able):
                    found.append((lease_id, uuid))
                    left -= 1
        for one in reversed(found):  # a later one may have made it needless
            rest = [other for other in found if other != one]
            if self._suffice(name, part, count - free, able, rest):
                found = rest
        if not self._suffice(name, part, count - free, able, found):
            return None
        back: dict[str, list[str]] = {}
        for lease_id, uuid in found:
            back.setdefault(lease_id, []).append(uuid)
        return back, max(map(self._ranks.ends_at, back), default=NOW)

    def _suffice(
        self, name: str, part: Ask, wanted: int, able: Collection[str], back: Sequence[tuple[str, str]]
    ) -> bool:
        return sum(uuid in able for _, uuid in back) >= wanted and self._roomy(name, part, back)

    def _on_host(self, lease_id: str, name: str, able: Collection[str]) -> list[str]:
        """Devices of a lease on a host: those that the request could take first, of these those that came last."""
        there = (uuid for uuid in self._fleet.leases[lease_id].devices if _on(self._fleet.devices.get(uuid), name))
        return sorted(there, key=lambda uuid: (uuid not in able, self._place.get(uuid, 0)))

    def _roomy(self, name: str, part: Ask, back: Sequence[tuple[str, str]]) -> bool:
        """True if a host has the cores and RAM once these devices are back, each with its part of them."""
        fleet = self._fleet
        cpus, memory = fleet.hosts[name].unheld
        for lease_id, count in Counter(lease_id for lease_id, _ in back).items():
            held = fleet.leases[lease_id]
            there = sum(_on(fleet.devices.get(uuid), name) for uuid in held.devices)
            amounts = held.hosts.get(name, (0, 0))
            cpus += amounts[0] * count // max(1, there)
            memory += amounts[1] * count // max(1, there)
        return cpus >= part.cpus_milli and memory >= part.host_memory_bytes


def _on(device: Device | None, host: str) -> bool:
    return device is not None and device.host == host
