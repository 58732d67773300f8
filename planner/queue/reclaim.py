"""Choice of the leases that are taken back for a request within the guarantee of its group.

Candidates are preemptible leases of groups that use more than they are guaranteed, as seen from the group around both
(`GroupUse.protects`), which have run for their `min_run_seconds` and have no notice yet. The order in which they are
taken: the group with the most use for its weight first; within it the cheapest first, then the youngest. Leases without
which their group has less than it is guaranteed are taken only where no others are enough. The price of a lease is what
is lost with it: its devices times the seconds since its work was last saved, or since its grant.

The devices are chosen as those of a reservation are (`backfill.py`), with a lease's place in that order as its end: so
the request gets devices whose leases come first. On one host all hosts are compared that could be better: the one whose
leases are of the group with the most use, then that with the least price in all, then that with the fewest leases.
Leases on that host that the request does not need are left out, as where a later one has enough devices alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from ...schemas.requests import Lease, Placement
from ..fleet.device import Device
from ..fleet.fleet import Fleet
from ..fleet.state import Ask
from ..groups.tree import Node
from ..groups.use import Amounts, GroupUse, Pending
from .backfill import PRESENT, Horizons
from .ends import Ends

_ROUNDS: Final = 8
"""Limit on the choices for one request: each leaves out leases whose group is not above its guarantee by then."""


class Candidate(NamedTuple):
    """A lease that may be taken back.

    Attributes:
        lease_id: of the lease.
        node: group of its owner.
        amounts: what it holds.
        price: device seconds that are lost with it.
        granted_at: seconds since the epoch.
    """

    lease_id: str
    node: Node
    amounts: Amounts
    price: float
    granted_at: float


def price_of(lease: Lease, devices: float, now: float) -> float:
    """Price of a lease: its devices times the seconds since its work was last saved, or since its grant."""
    since = lease.granted_at if lease.saved_at is None else lease.saved_at
    return devices * max(0.0, now - since.timestamp())


def ranked(candidates: Sequence[Candidate], share: Callable[[Node], float]) -> list[Candidate]:
    """Candidates in the order in which they are taken.

    Args:
        candidates: preemptible leases.
        share: use of a group for its weight.
    """
    shares: dict[Node, tuple[float, ...]] = {}
    for each in candidates:
        if each.node not in shares:
            shares[each.node] = tuple(-share(node) for node in each.node.path)
    return sorted(
        candidates,
        key=lambda each: (shares[each.node], each.node.name, each.price, -each.granted_at, each.lease_id),
    )


class Reclaim:
    """Choice of leases to take back, for requests of the groups within one group, one after the other.

    The groups that ask share it: where none of two has a lease, which leases are protected from them is the same.

    Args:
        fleet: live state.
        use: of the groups.
        around: group around those in whose guarantee there is room; the root around the outermost.
        candidates: preemptible leases in the order of `ranked`.
        given: what groups give up already; the caller adds what is chosen.
    """

    def __init__(
        self, fleet: Fleet, use: GroupUse, around: Node, candidates: Iterable[Candidate], given: Pending
    ) -> None:
        self._fleet = fleet
        self._use = use
        self._around = around
        self._given = given
        self._ranked = [each for each in candidates if not self._protected(each, given)]
        self._able = {each.lease_id: (rank, each) for rank, each in enumerate(self._ranked)}
        self._of: dict[Node, list[Candidate]] = {}
        """The same by group, for the groups around that as well."""
        for each in self._ranked:
            for node in each.node.path:
                self._of.setdefault(node, []).append(each)
        groups = dict.fromkeys(each.node for each in self._ranked)
        self._group = {node: number for number, node in enumerate(groups)}
        self._gone: set[str] = set()
        """Leases that are not chosen, or not chosen again."""
        self._failed: set[Ask] = set()
        self._no_room: dict[Node, int] = {}
        """Devices for which there was no room under the limit of a group."""
        self._ranks = Ends(fleet)
        self._horizons: Horizons | None = None

    def choose(self, ask: Ask, within: Node) -> list[Candidate] | None:
        """Choose the leases to take back for a request; None if no choice lets it start. They are not chosen again.

        Leases without which their group is below its guarantee are taken only where others do not do.

        Args:
            ask: the request.
            within: group, that of its owner or one around it, in whose guarantee there is room: no lease within it is
                taken.
        """
        if ask in self._failed:
            return None
        self._rank_all()
        own = [each for each in self._of.get(within, ()) if each.lease_id not in self._gone]
        self._hide(own)
        chosen: list[Candidate] | None = None
        for keep in (True, False):
            chosen, kept = self._choose_above(ask, keep)
            if chosen is not None or not kept:
                break
        self._unhide(own)
        if chosen is None and not own:
            self._failed.add(ask)
        return chosen

    def make_room(self, devices: int, within: Node, limited: Node) -> list[Candidate] | None:
        """Choose leases that hold so many devices together; None if there are not enough. They are not chosen again.

        Args:
            devices: billionths of devices.
            within: see `choose`.
            limited: group around that: only leases within it are taken, which makes room under its limit.
        """
        if devices >= self._no_room.get(limited, devices + 1):
            return None
        for keep in (True, False):
            removed, chosen, held = Pending(self._given), list[Candidate](), 0
            for each in self._of.get(limited, ()):
                if each.lease_id in self._gone or within in each.node.path or self._protected(each, removed):
                    continue
                removed.add(each.node, each.amounts)
                if keep and self._falls_below(each, removed):
                    removed.add(each.node, each.amounts, -1)
                    continue
                chosen.append(each)
                held += sum(each.amounts.devices.values())
                if held >= devices:
                    break
            if held < devices:
                continue
            for each in sorted(chosen, key=lambda each: -each.price):
                left = held - sum(each.amounts.devices.values())
                if left >= devices:
                    chosen.remove(each)
                    held = left
            self.leave_out(each.lease_id for each in chosen)
            return chosen
        if within not in self._of:
            self._no_room[limited] = devices
        return None

    def leave_out(self, leases: Iterable[str]) -> None:
        """Choose some leases no more: they are taken back already."""
        for lease_id in leases:
            if lease_id in self._able and lease_id not in self._gone:
                self._gone.add(lease_id)
                if self._horizons is not None:
                    self._ranks.expect(lease_id, math.inf)

    def _rank_all(self) -> None:
        """Make ready to choose devices: the place of a lease in the order is its end."""
        if self._horizons is None:
            self._horizons = Horizons(self._fleet, self._ranks, stay=PRESENT)
            for lease_id, (rank, _) in self._able.items():
                if lease_id not in self._gone:
                    self._ranks.expect(lease_id, float(rank))

    def _hide(self, candidates: Iterable[Candidate]) -> None:
        for each in candidates:
            self._ranks.expect(each.lease_id, math.inf)

    def _unhide(self, candidates: Iterable[Candidate]) -> None:
        for each in candidates:
            self._ranks.expect(each.lease_id, float(self._able[each.lease_id][0]))

    def _choose_above(self, ask: Ask, keep: bool) -> tuple[list[Candidate] | None, bool]:
        """Choose leases of groups above their guarantee; with `keep`, of such that are not below it without them.

        Returns:
            the leases, or None; and whether `keep` has left any out.
        """
        spared: list[Candidate] = []
        chosen: list[Candidate] | None = None
        kept = False
        for _ in range(_ROUNDS):
            chosen = self._choose(ask)
            if chosen is None:
                break
            removed, beyond = Pending(self._given), list[Candidate]()
            for each in chosen:
                if self._protected(each, removed):
                    beyond.append(each)
                    continue
                removed.add(each.node, each.amounts)
                if keep and self._falls_below(each, removed):
                    removed.add(each.node, each.amounts, -1)
                    beyond.append(each)
                    kept = True
            if not beyond:
                break
            spared += beyond
            self._hide(beyond)
            chosen = None
        self._unhide(spared)  # another request may do with fewer, or other ones
        self.leave_out(each.lease_id for each in chosen or ())
        return chosen, kept

    def _protected(self, each: Candidate, removed: Pending) -> bool:
        return self._use.protects(each.node, each.amounts, self._around, removed)

    def _falls_below(self, each: Candidate, removed: Pending) -> bool:
        return self._use.falls_below(each.node, each.amounts, self._around, removed)

    def _choose(self, ask: Ask) -> list[Candidate] | None:
        if ask.gpus and ask.placement is Placement.SAME_HOST:
            return self._on_one_host(ask)
        assert self._horizons is not None
        plan = self._horizons.plan(ask, "")
        if plan is None or plan.starts_at == math.inf:
            return None
        uuids = [uuid for uuid, _, _ in plan.reservation.devices]
        return self._victims(uuids, plan.reservation.hosts, ask, plan.starts_at)

    def _on_one_host(self, ask: Ask) -> list[Candidate] | None:
        best: list[Candidate] | None = None
        least: tuple[int, float, int] | None = None
        assert self._horizons is not None
        for host, units in self._horizons.hosts(ask):
            chosen = [device.uuid for _, _, device in units[: ask.gpus]]
            last = units[ask.gpus - 1][0]
            if best is not None and least is not None and last >= 0:
                first = self._ranked[int(last)]
                if (self._group[first.node], first.price, 1) >= least:  # no host from here on costs less
                    break
            victims = self._victims(chosen, [(host, ask.cpus_milli, ask.host_memory_bytes)], ask, math.inf)
            if len(victims) > 1:
                victims = self._needed(victims, host, [device for _, _, device in units], ask)
            cost = self._cost(victims)
            if least is None or cost < least:
                best, least = victims, cost
        return best

    def _needed(self, victims: list[Candidate], host: str, devices: Sequence[Device], ask: Ask) -> list[Candidate]:
        """The needed ones of the leases to take back on a host: without each the request could not start there."""
        kept = victims
        for each in reversed(victims):
            rest = [other for other in kept if other is not each]
            if self._suffice({other.lease_id: None for other in rest}, host, devices, ask):
                kept = rest
        return kept

    def _suffice(self, gone: Mapping[str, None], host: str, devices: Iterable[Device], ask: Ask) -> bool:
        """True if a host has the devices, cores and RAM for a request once some leases are gone."""
        cpus, memory = self._left_on(host, gone)
        if cpus < ask.cpus_milli or memory < ask.host_memory_bytes:
            return False
        free = 0
        for device in devices:
            holders = device.holders
            if ask.whole:
                free += holders.keys() <= gone.keys()
            else:
                share = sum(holders[lease][0] for lease in holders.keys() & gone.keys())
                free += device.share_left + share >= ask.share
        return free >= ask.gpus

    def _cost(self, victims: Sequence[Candidate]) -> tuple[int, float, int]:
        worst = max((self._group[each.node] for each in victims), default=0)
        return worst, sum(each.price for each in victims), len(victims)

    def _victims(
        self, uuids: Iterable[str], hosts: Iterable[tuple[str, int, int]], ask: Ask, most: float
    ) -> list[Candidate]:
        """Leases that have to go so that a request can have some devices, in order.

        Args:
            uuids: of the devices.
            hosts: their hosts, with the thousandths of cores and the bytes of RAM that it takes of each.
            ask: the request.
            most: place in the order beyond which leases are not taken for cores and RAM.
        """
        fleet, ranks = self._fleet, self._ranks
        found: dict[str, None] = {}
        for uuid in uuids:
            device = fleet.devices[uuid]
            left = device.share_left
            for lease in sorted(device.holders, key=ranks.ends_at):
                if ask.whole or left < ask.share:
                    found[lease] = None
                    left += device.holders[lease][0]
        if ask.cpus_milli or ask.host_memory_bytes or not ask.gpus:
            for host in hosts:
                found |= dict.fromkeys(self._for_cores(*host, found, most))
        return sorted((self._able[lease][1] for lease in found), key=lambda each: ranks.ends_at(each.lease_id))

    def _for_cores(
        self, name: str, cpus_milli: int, memory_bytes: int, gone: Mapping[str, None], most: float
    ) -> list[str]:
        """Further leases of a host that have to go for the cores and RAM of a request there."""
        fleet = self._fleet
        cpus, memory = self._left_on(name, gone)
        found: list[str] = []
        for lease in sorted(fleet.at_host.get(name, ()), key=self._ranks.ends_at):
            if cpus >= cpus_milli and memory >= memory_bytes:
                break
            if lease in gone or self._ranks.ends_at(lease) == math.inf or self._ranks.ends_at(lease) > most:
                continue
            amounts = fleet.leases[lease].hosts[name]
            if any(amounts):
                found.append(lease)
                cpus, memory = cpus + amounts[0], memory + amounts[1]
        return found

    def _left_on(self, name: str, gone: Iterable[str]) -> tuple[int, int]:
        """Cores and RAM of a host that are free once some leases are gone."""
        cpus, memory = self._fleet.hosts[name].unheld
        for lease in gone:
            amounts = self._fleet.leases[lease].hosts.get(name, (0, 0))
            cpus, memory = cpus + amounts[0], memory + amounts[1]
        return cpus, memory
