"""State of the groups of a fleet: who is in which, what each uses now and has used, and what quotas allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from ...schemas.inventory import BOARD_SLICES, FEW_SLICES
from ...schemas.requests import Grant
from ...schemas.work.groups import GroupTree
from ..fleet.known import Fleet
from ..fleet.state import (
    RESERVED,
    UNLIMITED,
    WHOLE_SHARE,
    Ask,
    DeviceState,
    HostState,
    Model,
    milli,
    share_of,
)
from ..placement.feasible import model_allowed
from .tree import Node, Tree
from .usage import AHEAD_SECONDS, Total, Usage
from .use import Admission, Amounts, GroupUse, Stamp, Wanted

NO_GROUPS: Final = GroupTree()
_STATES_KEPT: Final = 4096
_FEW_SLICED: Final = ("A30", "RTX PRO 6000")
"""Boards with `FEW_SLICES` (NVIDIA's MIG User Guide, "Supported MIG Profiles")."""


class GroupState:
    """Groups of a fleet. Where none is configured, nothing is counted, and everything is allowed.

    Args:
        config: the groups.

    Attributes:
        tree: the groups.
        use: what they use now.
        usage: what they have used.
        revision: of the configuration.
    """

    def __init__(self, config: GroupTree = NO_GROUPS, revision: int = 0) -> None:
        self.tree = Tree(config)
        self.use = GroupUse(self.tree)
        self.usage = Usage(self.tree)
        self.revision = revision
        self._capacity = _Capacity()
        self._noted: tuple[dict[str, int], int, Tree | None] = {}, -1, None

    @property
    def active(self) -> bool:
        """True if groups are configured."""
        return not self.tree.empty

    def change(self, tree: Tree, revision: int, now: float) -> None:
        """Take other groups: from now on what runs counts for them."""
        self.tree, self.revision = tree, revision
        self.use.change(tree)
        self.usage.change(tree, now)

    def node_of(self, owner: str) -> Node:
        """Group of an owner."""
        return self.tree.node_of(owner)

    def note_fleet(self, fleet: Fleet) -> None:
        """Note what the fleet has at present: quotas and fair share are relative to it."""
        capacity = self._capacity.of(fleet)
        before, shape, tree = self._noted
        if capacity is before and fleet.shape_version == shape and tree is self.tree:
            return
        self._noted = capacity, fleet.shape_version, self.tree
        kept = fleet.cache.get("group_totals")
        if kept is None or kept[0] != fleet.shape_version:
            kept = fleet.cache.put("group_totals", (fleet.shape_version, _hosts_total(fleet)))
        cpus, memory, cores = kept[1]
        self.use.note_capacity(capacity, cores)
        devices = sum(self.tree.price(model) * amount / WHOLE_SHARE for model, amount in capacity.items())
        self.usage.total = Total(devices, cpus, memory)

    def admission(self, fleet: Fleet, owner: str, ask: Ask, preemptible: bool) -> Admission:
        """Say what quotas allow a request.

        Args:
            fleet: live state.
            owner: of the request.
            ask: the request, without barred models.
            preemptible: true if its lease may be taken back.
        """
        models = models_of(fleet, ask) if ask.gpus else ()
        node = self.tree.node_of(owner)
        return self.use.admission(node, models, devices_of(ask), ask.cpus_milli, ask.host_memory_bytes, preemptible)

    def wanted(self, fleet: Fleet, ask: Ask) -> Wanted:
        """Models that a request could take, and the billionths of devices that it asks for."""
        return (tuple(models_of(fleet, ask)) if ask.gpus else (), devices_of(ask))

    def stamp(self, fleet: Fleet, node: Node, preemptible: bool) -> tuple[Stamp, int]:
        """Stamp that changes when the admission of a request of a group may have changed."""
        return self.use.stamp(node, preemptible), fleet.shape_version

    def share(self, node: Node, now: float) -> float:
        """Use of a group relative to its weight: the group with the least is next."""
        use = self.use.of(node)
        held = (use.priced, use.cpus_milli / 1000, float(use.memory_bytes))
        return (self.usage.of(node, now) + self.usage.dominant(held) * AHEAD_SECONDS) / node.weight

    def own_share(self, node: Node, now: float) -> float:
        """Use of a group's own members, with weight 1: they compete with the groups within it."""
        whole = self.share(node, now) * node.weight
        return max(0.0, whole - sum(self.share(child, now) * child.weight for child in node.children.values()))


class _Capacity:
    """Billionths of devices of a fleet that take work, by model, kept up to date by the moves of hosts."""

    def __init__(self) -> None:
        self._amounts: dict[str, int] = {}
        self._moves = -1
        self._on: dict[HostState, dict[str, int]] = {}
        """Amounts on a host in a state."""

    def of(self, fleet: Fleet) -> dict[str, int]:
        """The amounts now."""
        index = fleet.index
        behind = index.moves_end - self._moves
        if not behind:
            return self._amounts
        if self._moves < index.moves_base or behind > len(index.devices):
            self._amounts = _amounts(index.devices.items())
        else:
            for before, after in index.moves[self._moves - index.moves_base :]:
                self._move(before, after)
        self._moves = index.moves_end
        return self._amounts

    def _move(self, before: HostState | None, after: HostState | None) -> None:
        gone, come = self._at(before), self._at(after)
        if gone == come:
            return
        amounts = self._amounts = dict(self._amounts)
        for found, sign in ((gone, -1), (come, 1)):
            for model, amount in found.items():
                left = amounts.get(model, 0) + sign * amount
                if left:
                    amounts[model] = left
                else:
                    del amounts[model]

    def _at(self, state: HostState | None) -> dict[str, int]:
        if state is None:
            return {}
        found = self._on.get(state)
        if found is None:
            if len(self._on) >= _STATES_KEPT:
                self._on.clear()
            found = self._on[state] = _amounts((device, len(places)) for device, places in state.kinds)
        return found


def _amounts(devices: Iterable[tuple[DeviceState, int]]) -> dict[str, int]:
    """Billionths of devices by model, of those that take work."""
    found: dict[str, int] = {}
    for device, count in devices:
        if not device.blocked & ~RESERVED:
            name = device.model.name
            found[name] = found.get(name, 0) + count * slices_of(device.model)
    return found


def models_of(fleet: Fleet, ask: Ask) -> Sequence[str]:
    """Names of the models that a request could take, sorted."""
    key = ("group_models", ask)
    kept = fleet.cache.get(key)
    if kept is None or kept[0] != fleet.shape_version:
        found = {device.model for device in fleet.devices.values()}
        names = tuple(sorted({model.name for model in found if model_allowed(model, ask)}))
        kept = fleet.cache.put(key, (fleet.shape_version, names))
    return kept[1]


def devices_of(ask: Ask) -> int:
    """Billionths of devices that a request asks for; one MIG instance of unknown size counts as a device."""
    if ask.mig and len(ask.mig) == 1 and ask.mig[0][:1].isdigit():
        return WHOLE_SHARE * int(ask.mig[0][0]) // BOARD_SLICES
    return ask.devices * ask.share


def slices_of(model: Model) -> int:
    """Billionths of a board that a device of a model is."""
    profile = model.mig_profile
    if not profile[:1].isdigit():
        return WHOLE_SHARE
    few = any(board in model.name for board in _FEW_SLICED)
    return WHOLE_SHARE * int(profile[0]) // (FEW_SLICES if few else BOARD_SLICES)


def amounts_of(fleet: Fleet, grants: Iterable[Grant]) -> Amounts:
    """Amounts that a lease holds."""
    devices: dict[str, int] = {}
    cpus = memory = 0
    for grant in grants:
        if grant.device:
            known = fleet.devices.get(grant.device)
            share = share_of(grant.share)
            if grant.mig_parent and known is not None:
                share = slices_of(known.model)
            model = grant.model if known is None else known.model.name
            devices[model] = devices.get(model, 0) + share
        cpus += milli(grant.cpus)
        memory += grant.host_memory_bytes
    return Amounts(devices, cpus, memory)


def _hosts_total(fleet: Fleet) -> tuple[float, float, tuple[int, int]]:
    """Cores and RAM of the hosts that say how much they have; and both of all hosts, thousandths of cores and bytes."""
    hosts = fleet.hosts.values()
    cpus = sum(host.cpus_total for host in hosts if host.cpus_total < UNLIMITED) / 1000
    memory = sum(host.memory_total for host in hosts if host.memory_total < UNLIMITED)
    return cpus, float(memory), (sum(host.cpus_total for host in hosts), sum(host.memory_total for host in hosts))
