"""What groups use now, and what quotas allow them.

A start is *within guarantee* if its group, or a group around it, has room in the guarantee for all of it. It is allowed
if no limit of these groups is exceeded, and, for work that can't be preempted beyond the guarantee, if the other groups
could still have what they are guaranteed: such work never takes what someone else is guaranteed.

A request that asks for several devices is counted as if all were of one model, for each model that it could take: so
devices of two models are granted together only where each model alone has room for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...schemas import globs
from ..fleet.state import WHOLE_SHARE
from .tree import Node, Quota, Tree

Barred = tuple[str, ...]
"""Models that a request must not take, sorted."""


class Amounts(NamedTuple):
    """What a lease holds, or a request asks for.

    Attributes:
        devices: billionths of devices by model.
        cpus_milli: thousandths of cores.
        memory_bytes: host RAM.
    """

    devices: Mapping[str, int]
    cpus_milli: int = 0
    memory_bytes: int = 0


class Holding(NamedTuple):
    """A lease that counts.

    Attributes:
        owner: of the lease.
        amounts: what it holds.
        preemptible: true if it may be taken back.
    """

    owner: str
    amounts: Amounts
    preemptible: bool


class NodeUse:
    """What a group, with those within, uses.

    Attributes:
        guaranteed: billionths of devices by pattern of its guarantee.
        firm: the part of that which can't be preempted.
        limited: billionths of devices by pattern of each of its limits.
        devices: billionths of devices by model.
        preemptible: the part of all devices that may be preempted.
        cpus_milli: thousandths of cores.
        memory_bytes: host RAM.
        priced: devices, each counted by its price.
    """

    __slots__ = ("cpus_milli", "devices", "firm", "guaranteed", "limited", "memory_bytes", "preemptible", "priced")

    def __init__(self, node: Node) -> None:
        self.guaranteed = [0] * len(node.guarantee.patterns)
        self.firm = [0] * len(node.guarantee.patterns)
        self.limited = [[0] * len(limit.patterns) for limit in node.limits]
        self.devices: dict[str, int] = {}
        self.preemptible = 0
        self.cpus_milli = 0
        self.memory_bytes = 0
        self.priced = 0.0


class Admission(NamedTuple):
    """What quotas allow a request.

    Attributes:
        within: models that it must not take to stay within guarantee; None if it can't stay within.
        barred: models that it must not take at all; None if it must not start.
        reason: why models are barred, or why it must not start, in words; empty if nothing is.
    """

    within: Barred | None
    barred: Barred | None
    reason: str = ""


class GroupUse:
    """Use of all groups, kept up to date lease by lease.

    Args:
        tree: the groups.

    Attributes:
        tree: as given.
        version: number of changes.
        holdings: leases that count, by id.
    """

    def __init__(self, tree: Tree) -> None:
        self.holdings: dict[str, Holding] = {}
        self.version = 0
        self._capacity: dict[str, int] = {}
        self._firm: dict[str, int] = {}
        self._set(tree)

    def _set(self, tree: Tree) -> None:
        self.tree = tree
        self._uses = {node: NodeUse(node) for node in [tree.root, *tree.nodes.values()]}
        self._firm = {}
        self.version += 1

    def change(self, tree: Tree) -> None:
        """Take other groups: what runs counts for the groups that its owners have now."""
        self._set(tree)
        for holding in self.holdings.values():
            self._count(holding, 1)

    def of(self, node: Node) -> NodeUse:
        """Use of a group; of the root, that of all."""
        return self._uses[node]

    def hold(self, lease_id: str, owner: str, amounts: Amounts, preemptible: bool) -> None:
        """Count a lease; the same lease again replaces what it counted."""
        self.drop(lease_id)
        holding = self.holdings[lease_id] = Holding(owner, amounts, preemptible)
        self._count(holding, 1)

    def drop(self, lease_id: str) -> None:
        """Count a lease no more, if it did."""
        holding = self.holdings.pop(lease_id, None)
        if holding is not None:
            self._count(holding, -1)

    def _count(self, holding: Holding, sign: int) -> None:
        self.version += 1
        amounts = holding.amounts
        node = self.tree.node_of(holding.owner)
        for each in (self.tree.root, *node.path):
            use = self._uses[each]
            use.cpus_milli += sign * amounts.cpus_milli
            use.memory_bytes += sign * amounts.memory_bytes
            for model, share in amounts.devices.items():
                share *= sign
                _add(use.devices, model, share)
                use.priced += self.tree.price(model) * share / WHOLE_SHARE
                if holding.preemptible:
                    use.preemptible += share
                at = each.guarantee.first(model)
                if at is not None:
                    use.guaranteed[at] += share
                    if not holding.preemptible:
                        use.firm[at] += share
                for limit, used in zip(each.limits, use.limited, strict=True):
                    for number in limit.every(model):
                        used[number] += share
        if not holding.preemptible:
            for model, share in amounts.devices.items():
                _add(self._firm, model, sign * share)

    def note_capacity(self, capacity: Mapping[str, int]) -> None:
        """Note what the fleet has: billionths of devices that could take work, by model."""
        if capacity != self._capacity:
            self._capacity = dict(capacity)
            self.version += 1

    # What quotas allow

    def admission(
        self, node: Node, models: Sequence[str], devices: int, cpus_milli: int, memory_bytes: int, preemptible: bool
    ) -> Admission:
        """Say what quotas allow a request.

        Args:
            node: group of its owner.
            models: models that it could take; empty for a request without devices.
            devices: billionths of devices that it asks for.
            cpus_milli: thousandths of cores.
            memory_bytes: host RAM.
            preemptible: true if its lease may be taken back.
        """
        why = self._over_limit(node, None, 0, cpus_milli, memory_bytes)
        if why:
            return Admission(None, None, why)
        if not models:
            within = self.is_within(node, None, 0, cpus_milli, memory_bytes)
            return Admission(() if within else None, ())
        over: list[str] = []
        beyond: list[str] = []
        for model in models:
            reason = self._over_limit(node, model, devices, 0, 0)
            within = not reason and self.is_within(node, model, devices, 0, 0)
            if not reason and not within and not preemptible:
                reason = self._needed_by_others(node, model, devices)
            if reason:
                over.append(model)
                why = why or reason
            if not within:
                beyond.append(model)
        return Admission(
            None if len(beyond) == len(models) else tuple(sorted(beyond)),
            None if len(over) == len(models) else tuple(sorted(over)),
            why,
        )

    def is_within(self, node: Node, model: str | None, devices: int, cpus_milli: int, memory_bytes: int) -> bool:
        """True if one of the groups on the way to a group has room in its guarantee."""
        return self.within_level(node, model, devices, cpus_milli, memory_bytes) is not None

    def within_level(
        self, node: Node, model: str | None, devices: int, cpus_milli: int = 0, memory_bytes: int = 0
    ) -> Node | None:
        """The innermost of the groups on the way to a group that has room in its guarantee; None if none has.

        Args:
            node: group of the owner.
            model: of the devices; None for cores and RAM alone.
            devices: billionths of devices.
            cpus_milli: thousandths of cores.
            memory_bytes: host RAM.
        """
        for each in reversed(node.path):
            use, quota = self._uses[each], each.guarantee
            if model is None:
                if _has_room(quota, use, cpus_milli, memory_bytes):
                    return each
                continue
            at = quota.first(model)
            if at is not None and use.guaranteed[at] + devices <= quota.patterns[at][1]:
                return each
        return None

    def _over_limit(self, node: Node, model: str | None, devices: int, cpus_milli: int, memory_bytes: int) -> str:
        """Say which limit a start would exceed; empty if none."""
        for each in node.path:
            use = self._uses[each]
            for limit, used in zip(each.limits, use.limited, strict=True):
                if model is None:
                    if limit.cpus_milli is not None and use.cpus_milli + cpus_milli > limit.cpus_milli:
                        return f"group {each.name} may use {limit.cpus_milli / 1000:g} cores"
                    if limit.memory_bytes is not None and use.memory_bytes + memory_bytes > limit.memory_bytes:
                        return f"group {each.name} may use {limit.memory_bytes} bytes of RAM"
                    continue
                for at in limit.every(model):
                    glob, most = limit.patterns[at]
                    if used[at] + devices > most:
                        return (
                            f"group {each.name} uses {used[at] / WHOLE_SHARE:g} devices of {glob!r}, and "
                            f"{most / WHOLE_SHARE:g} are its limit"
                        )
        return ""

    def _needed_by_others(self, node: Node, model: str, devices: int) -> str:
        """Say which guarantee of others a start that can't be preempted would take from; empty if none."""
        name = model.lower()
        for glob in self.tree.patterns:
            if not globs.matches(name, glob):
                continue
            owed = sum(self._owed_beside(each, glob) for each in node.path)
            if not owed:
                continue
            firm = _matching(self._firm, glob)
            if firm + devices + owed > _matching(self._capacity, glob):
                return (
                    f"what is free of {glob!r} is guaranteed to other groups: "
                    "ask for work that may be preempted (preemptible)"
                )
        return ""

    def _owed_beside(self, node: Node, glob: str) -> int:
        assert node.parent is not None
        return sum(self.owed(each, glob) for each in node.parent.children.values() if each is not node)

    def owed(self, node: Node, glob: str) -> int:
        """Billionths of devices under a pattern that a group is guaranteed beyond its work that can't be preempted."""
        use = self._uses[node]
        own = sum(
            max(0, amount - use.firm[at])
            for at, (pattern, amount) in enumerate(node.guarantee.patterns)
            if pattern == glob
        )
        return max(own, sum(self.owed(child, glob) for child in node.children.values()))

    # Whose leases may be taken back

    def protects(self, node: Node, model: str, claimant: Node, removed: Mapping[Node, int] = {}) -> bool:
        """True if a group's guarantee keeps its leases on a model from another group.

        Args:
            node: group of the lease.
            model: of its devices.
            claimant: group that asks.
            removed: billionths of devices that groups give up already.
        """
        around = set(claimant.path)
        for each in node.path:
            at = each.guarantee.first(model)
            if each in around or at is None:
                continue
            if self._uses[each].guaranteed[at] - removed.get(each, 0) <= each.guarantee.patterns[at][1]:
                return True
        return False

    def borrowed(self, node: Node) -> int:
        """Billionths of devices that a group uses beyond its guarantee."""
        use = self._uses[node]
        kept = sum(min(used, amount) for used, (_, amount) in zip(use.guaranteed, node.guarantee.patterns, strict=True))
        return sum(use.devices.values()) - kept


def _has_room(quota: Quota, use: NodeUse, cpus_milli: int, memory_bytes: int) -> bool:
    if quota.cpus_milli is None and quota.memory_bytes is None:
        return False
    return (quota.cpus_milli is None or use.cpus_milli + cpus_milli <= quota.cpus_milli) and (
        quota.memory_bytes is None or use.memory_bytes + memory_bytes <= quota.memory_bytes
    )


def _add(into: dict[str, int], key: str, amount: int) -> None:
    left = into.get(key, 0) + amount
    if left:
        into[key] = left
    else:
        into.pop(key, None)


def _matching(amounts: Mapping[str, int], glob: str) -> int:
    return sum(amount for model, amount in amounts.items() if globs.matches(model.lower(), glob))
